"""latent_kv: exact where the rank allows it, as predicted where not, and smaller in the cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.compiler import latent
from attnopt.compiler.contract import Miss, Notes, read_pass
from attnopt.compiler.decode import derive
from attnopt.compiler.decode.latents import Latent
from attnopt.compiler.latent_graph import install
from attnopt.compiler.lower import export
from attnopt.compiler.program import Program
from attnopt.compiler.site_heads import Heads
from attnopt.passes.latent_kv import LatentKv, _Known
from attnopt.passes.merge_kv_heads import MergeKvHeads
from attnopt.passes.refit import Refit
from tests.attention_models import applied, distance, logits, missed, notes, raised, tokens
from tests.tolerance import assert_close

LINEAR = ("llama", "grouped", "biased", "partial", "learned", "alibi", "by groups")
IDENTITY = 1e-10  # of the logits' norm, in float64


def full(program: Program, real: bool = False) -> Program:
    """All slots keep their rotary, at full rank."""
    made = program.copy()
    site = made.sites[0]
    heads = Heads.read(made, site)
    x = torch.randn(4 * heads.k.shape[2], heads.k.shape[2], dtype=torch.float64)
    x[:, -1] = 1.0
    gram = x.T @ x
    rotary = site.rotary
    pairs = torch.empty(0, 2).long() if rotary is None else rotary.pairs
    frequencies = torch.empty(0) if rotary is None else rotary.frequencies
    slots = latent.slots(
        heads.k, gram, heads.queries(gram), pairs, frequencies, len(pairs) * len(heads.k),
        real=real,
    )  # fmt: skip
    eye = [torch.eye(w.shape[1], dtype=torch.float64).expand(len(w), -1, -1)
           for w in (heads.k, heads.v)]  # fmt: skip
    rest = latent.without(heads.k, pairs, slots)
    rank = min(heads.k.shape[2] - 1, 2 * heads.k.shape[0] * heads.k.shape[1])
    facts = install(
        made, site, heads, slots, latent.joint(rest, heads.v, gram, eye[0], eye[1], rank)
    )
    assert not isinstance(facts, Miss), facts
    made = made.with_sites([facts])
    made.clean()
    return made


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("real", [False, True], ids=["unitary", "orthogonal"])
def test_at_full_rank_it_is_the_identity(kind: str, real: bool) -> None:
    program = raised(kind)
    assert distance(full(program, real), program) < IDENTITY


@pytest.mark.parametrize("kind", ("partial", "learned"))
def test_absorbed_is_expanded(kind: str) -> None:
    program = full(raised(kind))
    decoder = derive(program)
    assert all(isinstance(cache, Latent) for cache in decoder.caches.values())
    batch = tokens(2, 12)
    ids, state = batch.kwargs["input_ids"], decoder.state(2, 12)
    made = torch.cat([decoder.step(state, ids[:, at : at + 1]) for at in range(12)], 1)
    assert float((made - logits(program, batch)).abs().max()) < IDENTITY


def test_without_rotary_half_of_the_cache_is_free() -> None:
    program = raised("learned")
    made, edits = applied(program, LatentKv(0.5), notes(program))
    assert distance(made, program) < IDENTITY
    assert "exact" in edits[0].note
    assert derive(made).bytes_per_token() * 2 == derive(program).bytes_per_token()


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("keep", (0.5, 0.25))
def test_the_cache_shrinks_to_what_was_asked_for(kind: str, keep: float) -> None:
    program = raised(kind)
    made, _ = applied(program, LatentKv(keep), notes(program))
    before, after = (derive(p, check=False).bytes_per_token() for p in (program, made))
    assert after <= keep * before
    assert distance(made, program) < 1


@pytest.mark.parametrize("kind", LINEAR)
def test_the_predicted_loss_is_the_measured_one(kind: str) -> None:
    program = raised(kind)
    for edit in applied(program, LatentKv(0.25), notes(program))[1]:
        for name in ("k", "v"):
            predicted = edit.evidence[f"{name}_predicted"]
            assert predicted > 1e-3
            assert abs(predicted - edit.evidence[f"{name}_residual"]) < 1e-6
            assert edit.evidence[f"{name}_heldout"] > 0


@pytest.mark.parametrize(
    ("kind", "keep", "rotary", "told"),
    [("llama", 0.5, 0.5, False), ("llama", 0.25, 0.5, True), ("llama", 0.25, 0.0, True),
     ("partial", 0.33, 0.25, True), ("learned", 0.25, 0.5, False)],
)  # fmt: skip
def test_small_caches_of_rotary_models_are_experimental(
    kind: str, keep: float, rotary: float, told: bool
) -> None:
    program = raised(kind)
    _, edits = applied(program, LatentKv(keep, rotary), notes(program))
    assert ("experimental unless healed" in edits[0].note) == told
    assert ("none of them with rotary" in edits[0].note) == (rotary == 0)


@pytest.mark.parametrize("kind", ("llama", "learned"))
def test_one_head_for_all_gets_a_smaller_cache_too(kind: str) -> None:
    program = raised(kind)
    alone, _ = applied(program, MergeKvHeads(0, "mean"), notes(program))
    made, edits = applied(alone, LatentKv(0.5), notes(program))
    before, after = (derive(p, check=False).bytes_per_token() for p in (alone, made))
    assert after == before // 2 and "16 -> 8" in edits[0].note


def test_any_unitary_map_holds_more_than_an_orthogonal_one() -> None:
    program = raised("llama")
    kept = {
        method: applied(program, LatentKv(0.25, method=method), notes(program))[1][0]
        for method in ("complex", "real", "average")
    }
    energy = {method: edit.evidence["rotary_kept"] for method, edit in kept.items()}
    assert energy["complex"] > energy["real"] > energy["average"] > 0


def test_folded_frequencies_hold_more_in_as_many_slots() -> None:
    program = raised("llama")
    energy = [
        applied(program, LatentKv(0.25, fold=fold), notes(program))[1][0].evidence["rotary_kept"]
        for fold in (1, 2, 4)
    ]
    assert energy == sorted(energy) and energy[0] < energy[2]


@pytest.mark.parametrize("method", ("complex", "real", "average"))
def test_evenly_spread_slots_are_those_of_a_smaller_rotary_embedding(method: str) -> None:
    program = raised("llama")
    rotary = program.sites[0].rotary
    assert rotary is not None and len(rotary.pairs) == 4
    chosen = LatentKv(0.5, 0.25, method=method, even=True)  # 4 slots
    known = _Known.read(program, program.sites[0], notes(program), method != "average")
    for count, stride in ((4, 1), (2, 2), (1, 4)):
        made = chosen._slots(known, count)
        turning = rotary.frequencies[made.pair].sort(descending=True).values
        wanted = rotary.frequencies.sort(descending=True).values[::stride]
        assert torch.equal(turning, wanted)
    made_all, edits = applied(program, replace(chosen, rotary=0.4), notes(program))  # room for 6
    assert ", 8 of them with rotary" in edits[0].note and distance(made_all, program) < 1
    strongest = applied(program, replace(chosen, even=False), notes(program))[1][0]
    assert 0 < edits[0].evidence["rotary_kept"] <= strongest.evidence["rotary_kept"]


def test_the_average_needs_no_data() -> None:
    program = raised("llama")
    made, edits = applied(program, LatentKv(0.5, method="average"), Notes(program))
    assert 0 < distance(made, program) < 1
    assert "k_predicted" not in edits[0].evidence


def test_a_refit_mends_it() -> None:
    program = raised("learned")
    known = notes(program, 48)
    made, _ = applied(program, LatentKv(0.25), known)
    mended, edits = applied(made, Refit(), known)
    assert edits[0].evidence["heldout_after"] < edits[0].evidence["heldout_before"]
    assert distance(mended, program) < distance(made, program)


def test_the_sites_and_the_graph_say_what_became_of_them() -> None:
    program = raised("biased")
    made, _ = applied(program, LatentKv(0.25), notes(program))
    for site in made.sites:
        spec = made.spec(site)
        assert (spec.heads, spec.kv_heads, spec.v_dim) == (4, 4, 8)
        assert spec.head_dim == 8 + 8 and site.rotary is None  # 8 of the 16 numbers kept
        assert site.v is not None and made.weight(site.v.weight).shape == (32, 8)
        assert "latent" in site.missing["k"]
    names = {name for name, _ in made.module.named_parameters()}
    assert not any("k_proj" in name or "v_proj" in name for name in names)
    module = export(made).module()
    for batch in (tokens(3, 19), tokens(2, 5)):
        assert_close(module(**batch.kwargs)["logits"], logits(made, batch))


def test_says_why_it_does_not_fire() -> None:
    program = raised("llama")
    known = notes(program)
    assert "norm" in missed(raised("normed"), LatentKv(), notes(raised("normed"))).reason
    bare = missed(program, LatentKv(), Notes(program))
    assert "calibration" in bare.reason and "average" in bare.help
    for wrong in (LatentKv(1.0), LatentKv(-0.5), LatentKv(rotary=-1.0), LatentKv(fold=0)):
        assert "a share" in missed(program, wrong, known).reason
    assert "would be stored of 64" in missed(program, LatentKv(0.03, 1.0), known).reason
    made, _ = applied(program, LatentKv(), known)
    assert (
        "latent" in missed(made, LatentKv(), known).reason
        or "rotary" in missed(made, LatentKv(), known).reason
    )
    unlike = program.copy().with_sites(replace(s, out=None) for s in program.sites)
    assert "out" in missed(unlike, LatentKv(), known).reason


def test_reads_back_from_its_text() -> None:
    made = LatentKv(0.25, 0.125, 2, "real", even=True)
    assert read_pass(made.text) == made
