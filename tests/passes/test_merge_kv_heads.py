"""merge_kv_heads: exact where heads are images of each other, else better than the mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.compiler.contract import Notes, passes, read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.head_groups import fixed_order
from attnopt.compiler.lower import export
from attnopt.compiler.program import Program
from attnopt.compiler.site import Site
from attnopt.compiler.site_weights import read_output, read_weight, write_output, write_query
from attnopt.compiler.spec import AttentionSpec
from attnopt.compiler.temperature import GRID, divergences
from attnopt.passes.merge_kv_heads import MergeKvHeads
from tests.attention_models import (
    applied,
    distance,
    fused,
    logits,
    missed,
    notes,
    put,
    raised,
    redundant,
    tokens,
)
from tests.programs import one_attention
from tests.tolerance import assert_close

EXACT32 = 1e-4  # of the logits' norm: the accepted loss of a merge that loses nothing, in float32
ROTARY = ("llama", "grouped", "biased", "partial", "learned")
# Bias by distance, no positions, heads joined to the batch, and a product split by groups.
OTHERS = ("alibi", "none", "bloom", "by groups")
IDENTITY = 1e-10  # of the logits' norm, in float64


@pytest.mark.parametrize("kind", (*ROTARY, *OTHERS))
def test_heads_that_are_images_of_each_other_merge_with_no_loss(kind: str) -> None:
    program = redundant(raised(kind), 2)
    merged, edits = applied(program, MergeKvHeads(2), notes(program))
    assert_close(logits(merged, tokens(3, 19)), logits(program, tokens(3, 19)))
    for edit in edits:
        assert edit.evidence["k_predicted"] < 1e-9
        assert edit.evidence["v_predicted"] < 1e-9


@pytest.mark.parametrize("kind", ("llama", "learned"))
def test_the_same_in_float32(kind: str) -> None:
    program = redundant(raised(kind, torch.float32), 4)
    merged, _ = applied(program, MergeKvHeads(4), notes(program))
    assert distance(merged, program) < EXACT32


@pytest.mark.parametrize("kind", (*ROTARY, *OTHERS, "normed"))
@pytest.mark.parametrize("method", ("mean", "closed"))
def test_equal_heads_merge_with_no_loss(kind: str, method: str) -> None:
    program = redundant(raised(kind), 2, turns=False)
    merged, _ = applied(program, MergeKvHeads(2, method), notes(program))
    assert distance(merged, program) < IDENTITY
    assert merged.spec(merged.sites[0]).kv_heads == program.sites[0].kv_heads // 2


@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize("factor", (2, 4))
def test_closed_is_nearer_than_the_mean(kind: str, factor: int) -> None:
    program = raised(kind)
    known = notes(program)
    mean, mean_edits = applied(program, MergeKvHeads(factor, "mean"), known)
    closed, closed_edits = applied(program, MergeKvHeads(factor), known)
    for one, other in zip(closed_edits, mean_edits, strict=True):
        assert one.evidence["k_residual"] <= other.evidence["k_residual"]
        assert one.evidence["v_residual"] <= other.evidence["v_residual"]
    assert 0 < distance(closed, program) < distance(mean, program)


@pytest.mark.parametrize("kind", (*ROTARY, *OTHERS))
def test_the_predicted_loss_is_the_measured_one(kind: str) -> None:
    program = raised(kind)
    for edit in applied(program, MergeKvHeads(2), notes(program))[1]:
        for name in ("k", "v"):
            predicted, measured = (
                edit.evidence[f"{name}_predicted"],
                edit.evidence[f"{name}_residual"],
            )
            assert predicted > 1e-3
            assert abs(predicted - measured) < 1e-6
            assert edit.evidence[f"{name}_heldout"] > 0


def test_the_sites_and_the_graph_say_what_became_of_them() -> None:
    program = raised("grouped")
    merged, edits = applied(program, MergeKvHeads(2), notes(program))
    for site in merged.sites:
        spec = merged.spec(site)
        assert (spec.heads, spec.kv_heads, site.kv_heads) == (8, 2, 2)
        assert site.k is not None and site.v is not None
        assert merged.weight(site.k.weight).shape == (8, 32)
        assert merged.has(site.k.projection) and merged.has(site.v.split)
    assert "4 -> 2" in edits[0].note
    names = {name for name, _ in merged.module.named_parameters()}
    assert not any("k_proj" in name or "v_proj" in name for name in names)
    before = {name for name, _ in program.module.named_parameters()}
    assert any("k_proj" in name for name in before)  # the original still has its own


@pytest.mark.parametrize("kind", ("grouped", "learned", "partial", *OTHERS))
def test_merges_again_down_to_one_head(kind: str) -> None:
    program = raised(kind)
    known = notes(program)
    once, _ = applied(program, MergeKvHeads(2), known)
    twice, _ = applied(once, MergeKvHeads(2), known)
    assert {twice.spec(site).kv_heads for site in twice.sites} == {1}
    straight, _ = applied(program, MergeKvHeads(4), known)
    assert distance(straight, program) < 1
    assert distance(twice, program) < 1
    assert "one key/value head" in missed(twice, MergeKvHeads(2), known).reason


def test_a_norm_on_keys_leaves_only_what_commutes_with_it() -> None:
    program = raised("normed")
    _, edits = applied(program, MergeKvHeads(2), notes(program))
    assert "keys averaged" in edits[0].note and "norm" in edits[0].note
    assert "k_predicted" not in edits[0].evidence


def test_an_even_norm_lets_phases_be_aligned() -> None:
    program = raised("normed").copy()
    for name, weight in list(program.module.named_parameters()):
        if "q_norm" in name or "k_norm" in name:
            program.set_weight(name, torch.full_like(weight, 1.3))
    known = notes(program)
    closed, edits = applied(program, MergeKvHeads(2), known)
    mean, _ = applied(program, MergeKvHeads(2, "mean"), known)
    assert "aligned in phase" in edits[0].note
    assert distance(closed, program) < distance(mean, program)


def test_exports_with_dynamic_sizes() -> None:
    program = raised("grouped")
    merged, _ = applied(program, MergeKvHeads(2), notes(program))
    module = export(merged).module()
    for batch in (tokens(3, 19), tokens(2, 5)):
        assert_close(module(**batch.kwargs)["logits"], logits(merged, batch))


def without(program: Program, known: Notes, **changes: object) -> str:
    made = program.copy().with_sites(replace(s, **changes) for s in program.sites)  # type: ignore[arg-type]
    return missed(made, MergeKvHeads(2), known).reason


@pytest.mark.parametrize("kind", ("llama", "learned"))
def test_heads_that_are_alike_are_found_wherever_they_stand(kind: str) -> None:
    program = redundant(raised(kind), 2)
    apart = program.copy()
    for site in apart.sites:  # 0 1 2 3, alike in twos, become 0 2 1 3
        _swap(apart, site)
    assert distance(apart, program) < 1e-9
    known = notes(apart)
    merged, edits = applied(apart, MergeKvHeads(2, grouping="similar"), known)
    assert distance(merged, program) < 1e-6
    neighbours, _ = applied(apart, MergeKvHeads(2), known)
    assert distance(neighbours, program) > 1e-3
    assert edits[0].evidence["k_predicted"] < 1e-9


def _swap(program: Program, site: Site) -> None:
    order = torch.tensor([0, 2, 1, 3])
    for path in (site.q, site.k, site.v):
        assert path is not None
        weight, bias = read_weight(program, path)
        put(program, path, weight[order], None if bias is None else bias[order])
    write_output(program, site, read_output(program, site.out)[order])  # type: ignore[arg-type]


def test_heads_with_a_bias_of_their_own_keep_their_places() -> None:
    spec = AttentionSpec(4, 4, 8, 8, 0.35, extras=("bias",))
    program = one_attention(spec, extras=[torch.randn(1, 4, 7, 7, dtype=torch.float64)])
    order = torch.tensor([0, 2, 1, 3])
    miss = fixed_order(program, program.sites[0], order, order)
    assert miss is not None and "bias" in miss.reason
    assert fixed_order(program, program.sites[0], torch.arange(4), torch.arange(4)) is None


@pytest.mark.parametrize("kind", ROTARY)
def test_one_head_for_all(kind: str) -> None:
    program = raised(kind)
    made, edits = applied(program, MergeKvHeads(0), notes(program))
    assert {made.spec(site).kv_heads for site in made.sites} == {1}
    assert "4 -> 1" in edits[0].note
    straight, _ = applied(program, MergeKvHeads(4), notes(program))
    assert distance(made, straight) < 1e-9


def test_a_temperature_brings_the_weights_nearer() -> None:
    program = raised("llama")
    known = notes(program)
    _, edits = applied(program, MergeKvHeads(4, "mean", temperature=True), known)
    assert 0 < edits[0].evidence["kl_after"] < edits[0].evidence["kl_before"]
    assert "norm" in missed(raised("normed"), MergeKvHeads(2, temperature=True), known).reason


def test_a_temperature_that_was_planted_is_found() -> None:
    program = raised("llama")
    site = program.sites[0]
    cold = program.copy()
    weight, bias = read_weight(cold, site.q)  # type: ignore[arg-type]
    write_query(cold, site, weight / 1.25, bias)
    lost = divergences(program, cold, site.node, torch.arange(4), notes(program).calibration)
    assert [GRID[int(at)] for at in lost.argmin(0)] == [1.25] * 4
    assert float(lost.min()) < 1e-9 < float(lost[GRID.index(1.0)].min())


def test_says_why_it_does_not_fire() -> None:
    assert (
        "merge nothing" in missed(raised("llama"), MergeKvHeads(1), notes(raised("llama"))).reason
    )
    program = raised("llama")
    known = notes(program)
    assert "made so" in missed(fused(program), MergeKvHeads(2), known).reason
    assert "groups of 8" in missed(program, MergeKvHeads(8), known).reason
    bare = missed(program, MergeKvHeads(2), Notes(program))
    assert "calibration" in bare.reason and "mean" in bare.help
    assert "rotary" in without(program, known, missing={"rotary": "q and k differ"})
    assert "projection of out was not found" in without(program, known, out=None)


@pytest.mark.parametrize(
    ("kind", "why"),
    [("norm of all", "one norm over all heads of k"), ("own norms", "a way of its own")],
)
def test_says_which_norm_stands_in_the_way(kind: str, why: str) -> None:
    for pass_ in (MergeKvHeads(2), read_pass("prune_heads{keep=0.5}")):
        said = missed(raised(kind), pass_, notes(raised(kind))).reason
        assert (why if pass_.name == "merge_kv_heads" else why.replace(" of k", " of q")) in said


def test_the_mean_needs_no_data() -> None:
    program = raised("llama")
    merged, edits = applied(program, MergeKvHeads(2, "mean"), Notes(program))
    assert edits[0].evidence.keys() <= {"k_residual", "v_residual"}
    assert distance(merged, program) > 0


def test_reads_back_from_its_text() -> None:
    made = passes()["merge_kv_heads"](factor=4, method="mean")
    assert made.text == "merge_kv_heads{factor=4 method=mean}"
    assert read_pass(made.text) == made
    for wrong in ("method=best", "grouping=random"):
        with pytest.raises(Problem, match="cannot be"):
            read_pass(f"merge_kv_heads{{{wrong}}}")
