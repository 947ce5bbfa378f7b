"""prune_heads: a head that does nothing goes without a trace, others at the cost that was told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from attnopt.compiler.contract import Notes, passes, read_pass
from attnopt.compiler.cost import cost
from attnopt.compiler.decode import derive
from attnopt.compiler.grams import rows
from attnopt.compiler.head_costs import WEAKEST, Results
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.lower import export
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.site_heads import Heads, output_source
from attnopt.compiler.site_weights import write_output
from attnopt.compiler.trace import trace
from attnopt.passes.prune_heads import PruneHeads
from attnopt.passes.refit import Refit
from tests.attention_models import applied, distance, fused, logits, missed, notes, raised, tokens
from tests.families import Block
from tests.tolerance import assert_close

KINDS = ("grouped", "learned", "partial", "alibi", "none", "bloom", "by groups")


def silenced(program: Program, group: int) -> Program:
    """The program with nothing of a key/value head read by the output projection."""
    made = program.copy()
    site = made.sites[0]
    heads = Heads.read(made, site)
    out = heads.out.clone()
    out[heads.query_heads([group])] = 0
    return made.with_sites([write_output(made, site, out)])


def emptied(program: Program, group: int) -> Program:
    """The program with the values of one key/value head zero."""
    made = program.copy()
    path = made.sites[0].v
    assert path is not None
    for name, whole in ((path.weight, path.layout == "out_in"), (path.bias, True)):
        if name is None:
            continue
        value = made.weight(name).detach().clone()
        (value if whole else value.T)[path.channels[group]] = 0
        made.set_weight(name, value)
    return made


def plain(module: torch.nn.Module, x: Tensor) -> Program:
    """A module of x `[batch, seq, width]` as a raised program."""
    loaded = Loaded(module.double().eval(), None, (), {"x": x}, "plain", "callable")
    return raise_program(trace(loaded))


@lru_cache(maxsize=16)
def pruned(kind: str, line: str = "prune_heads{keep=0.5}") -> tuple[Program, dict[str, float]]:
    program = raised(kind)
    made, edits = applied(program, read_pass(line), notes(program))
    return made, dict(edits[0].evidence)


@pytest.mark.parametrize(
    ("kind", "make"),
    [*((kind, silenced) for kind in KINDS), ("partial", emptied)],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_a_head_without_result_goes_without_a_trace(
    kind: str, make: Callable[[Program, int], Program]
) -> None:
    program = make(raised(kind), 1)
    made, edits = applied(program, PruneHeads(0.75), notes(program))
    assert_close(logits(made, tokens(3, 19)), logits(program, tokens(3, 19)))
    assert edits[0].evidence["predicted"] < 1e-8
    assert made.spec(made.sites[0]).kv_heads == 3


@pytest.mark.parametrize("kind", ("grouped", "learned"))
def test_the_tensors_are_smaller(kind: str) -> None:
    before, after = raised(kind), pruned(kind)[0]
    spec, was = after.spec(after.sites[0]), before.spec(before.sites[0])
    assert (2 * spec.heads, spec.kv_heads) == (was.heads, 2)
    assert spec.scale == was.scale
    site, old = after.sites[0], before.sites[0]
    for which in ("q", "k", "v", "out"):
        now, then = getattr(site, which), getattr(old, which)
        assert 2 * now.channels.numel() == then.channels.numel()
    counted = cost(after).site_flops[site.id] / cost(before).site_flops[old.id]
    assert counted == pytest.approx(0.5, abs=1e-9)
    names = {name for name, _ in after.module.named_parameters()}
    assert not any("k_proj" in name or "c_attn" in name for name in names)


@pytest.mark.parametrize("kind", ("grouped", "learned"))
def test_the_cost_is_that_of_least_squares(kind: str) -> None:
    """Told by the closed form, and found by fitting the rows of the kept heads' results."""
    program = raised(kind)
    site, known = program.sites[0], notes(program)
    assert site.out is not None
    path, heads = site.out, Heads.read(program, site)
    source = output_source(program, site).name
    z = torch.cat([rows(v[source].double(), None) for v, _ in known.record(program, [source])])
    weight = heads.out.flatten(0, 1)
    target = z[:, path.channels.reshape(-1)] @ weight
    _, evidence = pruned(kind)
    made = pruned(kind)[0]
    new_site = made.sites[0]
    assert new_site.out is not None
    columns = kept_columns(program, made)
    given = z[:, columns]
    if path.bias is not None:
        given = torch.cat((given, torch.ones(len(z), 1, dtype=torch.float64)), 1)
    best = torch.linalg.lstsq(given, target).solution
    left = float((target - given @ best).square().sum() / target.square().sum())
    assert evidence["predicted"] == pytest.approx(left, rel=1e-6)
    assert evidence["predicted"] <= evidence["residual"] < evidence["unfitted"]


def kept_columns(before: Program, after: Program) -> Tensor:
    """The columns of the old output projection's input that the new one reads too."""
    old, new = Heads.read(before, before.sites[0]), Heads.read(after, after.sites[0])
    kept = [int((old.v - v).abs().sum((1, 2)).argmin()) for v in new.v]
    out = before.sites[0].out
    assert out is not None
    return out.channels[old.query_heads(kept)].reshape(-1)


@pytest.mark.parametrize("kind", ("grouped", "learned"))
def test_the_residual_is_that_of_the_graphs(kind: str) -> None:
    program, known = raised(kind), notes(raised(kind))
    made, evidence = pruned(kind)
    out = program.sites[0].out
    assert out is not None
    name = out.projection
    for batches, key in ((known.calibration, "residual"), (known.heldout, "heldout")):
        lost = energy = 0.0
        for (mine, _), (theirs, _) in zip(
            known.record(made, [name], batches), known.record(program, [name], batches),
            strict=True,
        ):  # fmt: skip
            bias = 0.0 if out.bias is None else program.weight(out.bias)
            lost += float((mine[name] - theirs[name]).square().sum())
            energy += float((theirs[name] - bias).square().sum())
        assert evidence[key] == pytest.approx(lost / energy, rel=1e-6)


def test_greedy_costs_add_up_and_beat_the_plain_ranking() -> None:
    """Deletion costs against least squares on random rows of a low rank and some noise."""
    torch.manual_seed(0)
    z = torch.randn(200, 6).double() @ torch.randn(6, 12).double() + 0.1 * torch.randn(200, 12)
    results = Results(z.T @ z, torch.randn(12, 7).double())
    blocks = list(torch.arange(12).view(4, 3))
    target = z @ results.weight
    gone, told = results.cheapest(blocks, 2)
    keep = torch.cat([b for at, b in enumerate(blocks) if at not in gone])
    best = torch.linalg.lstsq(z[:, keep], target).solution
    left = float((target - z[:, keep] @ best).square().sum() / target.square().sum())
    assert told == pytest.approx(left, rel=1e-6)
    assert results.lost(keep, results.fitted(keep, results.weight[keep], WEAKEST)) == pytest.approx(
        left, rel=1e-6
    )
    energies = results.energies(blocks)
    assert energies[1] == pytest.approx(
        float((z[:, blocks[1]] @ results.weight[blocks[1]]).square().sum())
    )
    single = [results.cost(block) for block in blocks]
    assert gone[0] == single.index(min(single))


def test_the_better_ranking_is_taken() -> None:
    both = pruned("learned", "prune_heads{}")[1]
    one, other = (
        pruned("learned", f"prune_heads{{method={name}}}")[0] for name in ("cost", "energy")
    )
    best = pruned("learned", "prune_heads{}")[0]
    chosen = one if both["damage_cost"] <= both["damage_energy"] else other
    assert distance(best, chosen) == 0.0
    assert distance(one, other) > 0


def test_masks_with_a_slice_per_head_lose_those_of_heads_that_go() -> None:
    """A head whose bias was another's would give another result."""
    program = plain(Sloped(), torch.randn(2, 9, 32).double())
    program = silenced(program, 0)
    batches = [Batch((), {"x": torch.randn(3, 12, 32).double()}) for _ in range(3)]
    known = Notes(program, batches[:2], batches[2:])
    made, _ = applied(program, PruneHeads(0.75), known)
    assert_close(made.run(batches[0]), program.run(batches[0]))


class Sloped(torch.nn.Module):
    """An attention with a bias by distance, steeper from head to head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(32, 32) for _ in range(4))
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        at = torch.arange(x.shape[1])
        bias = -(at[None, :] - at[:, None]).abs() * self.slopes[:, None, None]  # type: ignore[index]
        mixed = ((q @ k.transpose(-1, -2)) / 8**0.5 + bias).softmax(-1) @ v
        made: Tensor = x + self.o(mixed.transpose(1, 2).flatten(2))
        return made


def test_a_plain_module_with_fused_projections() -> None:
    x = torch.randn(2, 11, 64).double()
    program = plain(Block(), x)
    known = Notes(program, [Batch((), {"x": torch.randn(8, 20, 64).double()})])
    made, edits = applied(program, PruneHeads(0.5), known)
    assert made.run(Batch((), {"x": x})).shape == x.shape
    assert "4 -> 2" in edits[0].note
    assert "heldout" not in edits[0].evidence


@pytest.mark.parametrize("kind", ("grouped", "bloom", "by groups"))
def test_what_comes_after_still_works(kind: str) -> None:
    program, made = raised(kind), pruned(kind)[0]
    module = export(made).module()
    for batch in (tokens(3, 19), tokens(2, 5)):
        assert_close(module(**batch.kwargs)["logits"], logits(made, batch))
    derive(made)
    again, _ = applied(made, PruneHeads(0.5), notes(program))
    assert again.spec(again.sites[0]).kv_heads == 1
    assert "one key/value head" in missed(again, PruneHeads(), notes(program)).reason
    changed = silenced(made, 0)
    mended, _ = applied(changed, Refit(), Notes(program, [tokens(8, 24, 5)], [tokens(4, 24, 9)]))
    assert distance(mended, program) < distance(changed, program)


def test_says_why_it_does_not_fire() -> None:
    program = raised("llama")
    known = notes(program)
    assert "made so" in missed(fused(program), PruneHeads(), known).reason
    assert "all of them" in missed(program, PruneHeads(0.875), known).reason
    assert "calibration" in missed(program, PruneHeads(), Notes(program)).reason
    site = program.sites[0]
    assert site.out is not None
    part = replace(site, out=replace(site.out, channels=site.out.channels[:3]))
    other = program.copy().with_sites([part])
    assert "more than the heads" in missed(other, PruneHeads(), known).reason


def test_reads_back_from_its_text() -> None:
    made = passes()["prune_heads"](keep=0.5, method="cost")
    assert made.text == "prune_heads{keep=0.5 method=cost}"
    assert read_pass(made.text) == made
