"""low_rank_projections: exact where the rank is there, the best of its rank elsewhere."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from attnopt.compiler.contract import Edit, Notes, passes, read_pass
from attnopt.compiler.cost import cost
from attnopt.compiler.decode import derive
from attnopt.compiler.grams import rows
from attnopt.compiler.lower import export
from attnopt.compiler.pipeline import apply_edit
from attnopt.compiler.program import Program
from attnopt.compiler.raising.projections import projection
from attnopt.passes.low_rank_projections import LowRankProjections
from attnopt.passes.merge_kv_heads import MergeKvHeads
from attnopt.passes.prune_heads import PruneHeads
from attnopt.passes.refit import Refit
from tests.attention_models import applied, distance, logits, missed, notes, raised, tokens
from tests.tolerance import assert_close

KINDS = ("grouped", "learned")
SPLIT, FUSED = ("q", "k", "v", "out"), ("qkv", "out")


@lru_cache(maxsize=8)
def lowered(kind: str, line: str = "low_rank_projections{keep=0.5}") -> tuple[Program, Edit]:
    program = raised(kind)
    edit = read_pass(line).rewrite(program.sites[0], program, notes(program))
    assert isinstance(edit, Edit), edit
    return apply_edit(program, program.sites[0], edit), edit


def products(program: Program) -> dict[str, str]:
    """The nodes of the site's products, by the parts that they make."""
    site = program.sites[0]
    named = {"q": site.q, "k": site.k, "v": site.v, "out": site.out}
    found: dict[str, str] = {}
    for part, path in named.items():
        assert path is not None
        found[path.projection] = found.get(path.projection, "") + part
    return {parts: node for node, parts in found.items()}


def thin(program: Program, rank: int) -> Program:
    """The program with every product of a site of this rank."""
    made = program.copy()
    for node in products(made).values():
        found = projection(made.node(node))
        assert found is not None
        u, s, v = torch.linalg.svd(made.weight(found.weight).detach(), full_matrices=False)
        made.set_weight(found.weight, u[:, :rank] * s[:rank] @ v[:rank])
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_of_that_rank_lose_nothing(kind: str) -> None:
    program = thin(raised(kind), 5)
    made, edits = applied(program, LowRankProjections(0.5), notes(program))
    assert_close(logits(made, tokens(3, 19)), logits(program, tokens(3, 19)))
    assert max(v for k, v in edits[0].evidence.items() if "predicted" in k) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_the_one_that_was_told_and_the_least(kind: str) -> None:
    """Measured on the rows that enter each product, against the singular values of what it gives
    and against factors that do not look at the data."""
    program, (made, edit) = raised(kind), lowered(kind)
    known = notes(program)
    assert set(products(program)) == set(FUSED if kind == "learned" else SPLIT)
    for parts, name in products(program).items():
        old, up = projection(program.node(name)), projection(made.node(name))
        assert old is not None and up is not None
        down = projection(up.source)
        assert down is not None
        seen = [v[old.source.name] for v, _ in known.record(program, [old.source.name])]
        x = torch.cat([rows(value.double(), None) for value in seen])
        weight, first, second = (
            p.weight(m.weight).T if m.layout == "out_in" else p.weight(m.weight)
            for p, m in ((program, old), (made, down), (made, up))
        )
        rank = first.shape[1]
        assert rank == edit_rank(edit, parts) < min(weight.shape)
        whole = x @ weight
        error = (whole - x @ first @ second).norm() / whole.norm()
        assert edit.evidence[f"{parts}_predicted"] == pytest.approx(float(error), rel=1e-9)
        assert edit.evidence[f"{parts}_residual"] == pytest.approx(float(error), rel=1e-9)
        values = torch.linalg.svdvals(whole)
        assert float(error) == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-9)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        blind = (whole - x @ (u[:, :rank] * s[:rank] @ v[:rank])).norm() / whole.norm()
        assert error < blind


def edit_rank(edit: Edit, parts: str) -> int:
    said = next(part for part in edit.note.split(", ") if part.startswith(f"{parts} to rank"))
    return int(said.split()[3])


@pytest.mark.parametrize("kind", KINDS)
def test_it_costs_the_share_that_stays(kind: str) -> None:
    program, (made, _) = raised(kind), lowered(kind)
    before, after = (cost(p).nodes for p in (program, made))
    for name in products(program).values():
        up = projection(made.node(name))
        assert up is not None
        spent = after[name].flops + after[up.source.name].flops
        assert 0.3 * before[name].flops < spent <= 0.5 * before[name].flops
    names = {name for name, _ in made.module.named_parameters()}
    old = products(program)
    for node in old.values():
        found = projection(program.node(node))
        assert found is not None and found.weight not in names


@pytest.mark.parametrize("kind", ("grouped",))
def test_what_comes_after_still_works(kind: str) -> None:
    program, (made, _) = raised(kind), lowered(kind)
    module = export(made).module()
    for batch in (tokens(3, 19), tokens(2, 5)):
        assert_close(module(**batch.kwargs)["logits"], logits(made, batch))
    derive(made)
    data = Notes(program, [tokens(8, 24, s) for s in (1, 2, 3)], [tokens(8, 24, 9)])
    mended, _ = applied(made, Refit(), data)
    assert distance(mended, program) < distance(made, program)
    assert "factors" in missed(made, PruneHeads(0.5), data).reason
    assert "factors" in missed(made, MergeKvHeads(2), data).reason


def test_heads_go_where_their_own_factors_are_left() -> None:
    """With the output projection whole, q and k read fewer numbers, and can be made anew."""
    program = raised("grouped")
    made, _ = lowered("grouped", "low_rank_projections{parts=qk}")
    pruned, _ = applied(made, PruneHeads(0.5), notes(program))
    assert pruned.spec(pruned.sites[0]).kv_heads == 2
    assert distance(pruned, made) < 1


def test_ranks_by_decay_share_the_same_products() -> None:
    """A matrix of rank one leaves its share to the others."""
    program = raised("grouped").copy()
    site = program.sites[0]
    assert site.k is not None
    old = program.weight(site.k.weight).detach()
    program.set_weight(site.k.weight, torch.outer(old[:, 0], old[0]))
    known = notes(program)
    _, even = applied(program, LowRankProjections(0.5), known)
    made, uneven = applied(program, LowRankProjections(0.5, ranks="decay"), known)
    assert edit_rank(uneven[0], "k") == 1 < edit_rank(even[0], "k")
    assert sum(v**2 for k, v in uneven[0].evidence.items() if "predicted" in k) < sum(
        v**2 for k, v in even[0].evidence.items() if "predicted" in k
    )
    flat, _ = applied(program, LowRankProjections(0.5), known)
    assert cost(made).flops <= 1.01 * cost(flat).flops


def test_says_why_it_does_not_fire() -> None:
    program = raised("grouped")
    known = notes(program)
    assert "calibration" in missed(program, LowRankProjections(), Notes(program)).reason
    assert "nothing cheaper" in missed(program, LowRankProjections(1.0), known).reason
    assert "unknown parts" in missed(program, LowRankProjections(parts="q"), known).reason
    site = program.sites[0]
    bare = replace(site, q=None, k=None, missing={"q": "made so"})
    other = program.copy().with_sites([bare])
    assert "made so" in missed(other, LowRankProjections(parts="qk"), known).reason


def test_reads_back_from_its_text() -> None:
    made = passes()["low_rank_projections"](keep=0.5, parts="vo", ranks="decay")
    assert made.text == "low_rank_projections{keep=0.5 parts=vo ranks=decay}"
    assert read_pass(made.text) == made
