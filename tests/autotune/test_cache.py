"""A budget of cache bytes: which plans are tried, which one is taken, and what is told."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.autotune import record
from attnopt.autotune.accuracy import Accuracy
from attnopt.autotune.cache_levels import Level, allot, tail
from attnopt.autotune.cache_run import CacheRun, Settled, require_cache
from attnopt.autotune.cache_search import CacheSearch, Kept, Limits, best, loses_less
from attnopt.autotune.data import Data
from attnopt.autotune.report import markdown
from attnopt.autotune.report_html import page
from attnopt.autotune.request import HealBudget, Request, parse_kv_bytes
from attnopt.autotune.result import Result
from attnopt.autotune.step_time import Load, _Steps, load_of, race
from attnopt.autotune.timing import Timing
from attnopt.autotune.workbench import Journal, Workbench
from attnopt.compiler.contract import Notes, passes
from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.errors import Problem
from attnopt.compiler.pipeline import apply_plan
from attnopt.compiler.plan import Plan, Step
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising import raise_program
from tests.autotune.results import full
from tests.cli.conftest import LENGTH, ROWS, WIDTH, encoder
from tests.decoder import BLOCKS, HEAD_DIM, KV_HEADS, VOCABULARY, decoder
from tests.residual_models import traced
from tests.tolerance import assert_close

SHARE = 0.75
WHOLE = BLOCKS * KV_HEADS * 2 * HEAD_DIM * 4  # bytes per token in float32


@lru_cache(maxsize=1)
def _program() -> Program:
    """A decoder whose first layer has one key/value head twice: half of its cache is for nothing,
    while all of the second layer's counts."""
    made = decoder(3, 16).copy()
    for name in ("k", "v"):
        weight = made.weight(f"blocks.0.{name}.weight").detach().clone()
        weight[HEAD_DIM:] = weight[:HEAD_DIM]
        made.set_weight(f"blocks.0.{name}.weight", weight)
    for block in range(BLOCKS):
        for name in ("q", "k", "out"):
            key = f"blocks.{block}.{name}.weight"
            made.set_weight(key, 3 * made.weight(key).detach())
    made.module.recompile()
    return made


def _text(rows: int) -> Tensor:
    """Sequences of 16 tokens that the model itself would write, so that changes make it worse."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCABULARY, (rows, 2), generator=draw)
    while ids.shape[1] < 16:
        likely = _program().module(input_ids=ids)["logits"][:, -1].softmax(-1).detach()
        ids = torch.cat((ids, torch.multinomial(likely, 1, generator=draw)), 1)
    return ids


@lru_cache(maxsize=1)
def _bench() -> Workbench:
    """Made once: plans that several tests ask for are built and measured once."""
    batches = [Batch((), {"input_ids": ids}) for ids in _text(36).split(3)]
    data = Data(
        tuple(batches[:1]), tuple(batches[:6]), tuple(batches[6:9]), tuple(batches[9:]), True
    )
    program = _program()
    return Workbench(program.module, program, data, task="causal-lm")


def _request(**more: Any) -> Request:
    return Request(**{"kv_bytes": SHARE, "max_drop": 0.9, **more})


def _faster(monkeypatch: pytest.MonkeyPatch, latent: float) -> list[int]:
    """Let steps with latents take `latent` times as fast as others; answers with the calls."""
    asked: list[int] = []
    found = _bench().journal.found
    timed = {key for key in found if key.startswith("step ")}
    monkeypatch.setattr(
        _bench().journal, "found", {key: found[key] for key in found.keys() - timed}
    )

    def told(decoders: Mapping[str, Decoder], load: Load, *more: Any) -> Timing:
        asked.append(len(decoders))
        kinds = {name: type(next(iter(d.caches.values()))) for name, d in decoders.items()}
        speeds = {n: latent if "Latent" in kind.__name__ else 1.0 for n, kind in kinds.items()}
        return Timing({name: (1.0 / by, 1.0 / by, 1.01 / by) for name, by in speeds.items()})

    monkeypatch.setattr("attnopt.autotune.cache_offer.race", told)
    return asked


def _settled(bench: Workbench, **more: Any) -> tuple[CacheRun, Settled]:
    run = CacheRun(bench, bench.build([]), _request(**more))
    return run, run.settle()


def _only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let a search know these passes alone."""
    kinds = [passes()[name] for name in names]
    monkeypatch.setattr("attnopt.autotune.cache_search.approximate", lambda: kinds)


@pytest.fixture(scope="module")
def per_layer() -> Settled:
    """A run that merges heads or caches latents, whose steps are faster."""
    with pytest.MonkeyPatch.context() as patch:
        _only(patch, "merge_kv_heads", "latent_kv")
        _faster(patch, 1.5)
        return _settled(_bench())[1]


def test_sizes_per_layer_are_taken_where_they_lose_less(per_layer: Settled) -> None:
    bench, made = _bench(), per_layer
    entry = made.entry
    assert entry.before == WHOLE and entry.met and made.relaxation is None
    (taken,) = [plan for plan in entry.plans if plan.kept]
    assert "latent_kv" in taken.plan and "@ s0" in taken.plan and taken.within
    assert taken.bytes == entry.after <= SHARE * WHOLE
    assert taken.step and taken.step.value == pytest.approx(1.5) and taken.step == entry.step
    accepted = [tried for tried in entry.per_layer if tried.accepted]
    assert accepted and all(t.loss.value < 0.5 * t.uniform.value for t in accepted)
    assert all(t.shares["s0"] < t.shares["s1"] for t in accepted)
    worse = [plan for plan in entry.plans if plan.loss and not plan.kept]
    assert worse and all(plan.reason for plan in worse)
    least = min(plan.loss.value for plan in entry.plans if plan.loss)
    assert taken.loss and taken.loss.value == least
    replayed = Plan.from_json(json.loads(json.dumps(made.built.plan.as_json())))
    notes = Notes(_program(), bench.data.calibration, bench.data.heldout)
    again, _ = apply_plan(_program(), replayed, notes)
    for name, value in made.built.program.module.named_parameters():
        assert torch.equal(again.weight(name), value), name
    assert derive(again).bytes_per_token() == entry.after


def test_latents_whose_step_is_no_faster_are_not_taken_and_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = _faster(monkeypatch, 0.5)
    _only(monkeypatch, "latent_kv", "prune_heads")
    _, made = _settled(_bench(), kv_bytes=0.5)
    (taken,) = [plan for plan in made.entry.plans if plan.kept]
    assert "latent" not in taken.plan and made.entry.met
    told = [warning for warning in made.warnings if "latent_kv" in warning]
    assert told and "runs at 0.50x" in told[0] and "the exact plan's" in told[0]
    assert asked


def test_a_run_that_goes_on_measures_nothing_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits = Limits(0.5 * WHOLE, 0.9, trials=3)
    whole = derive(_bench().build([]).program, check=False)
    searches = []
    for _ in range(2):  # the second reads what the first one wrote
        monkeypatch.setattr(_bench(), "journal", Journal(tmp_path / "measurements.jsonl", "scope"))
        searches.append(CacheSearch(_bench(), whole, limits))
        searches[-1].uniform()
        monkeypatch.setattr(_bench(), "_drop", _measured_again)
        monkeypatch.setattr("attnopt.autotune.cache_search._facts", _measured_again)
    assert searches[0].tried == searches[1].tried and len(searches[0].tried) > 1


def _measured_again(*asked: Any) -> Accuracy:
    pytest.fail("it was measured before")


def test_latents_are_not_held_against_steps_of_another_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("attnopt.autotune.cache_offer.race", _measured_again)
    bench = _bench()
    monkeypatch.setattr(bench, "notes", replace(bench.notes, device="a100"))
    run = CacheRun(bench, bench.build([]), _request())
    latent = run.search.look(["latent_kv{keep=0.5}"])
    assert latent.latent and run.offers.too_slow(latent) == ""


def test_a_budget_that_nothing_meets_says_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    _faster(monkeypatch, 1.5)
    _only(monkeypatch, "prune_heads")
    _, made = _settled(_bench(), kv_bytes=0.02, trials=4)
    assert not made.entry.met and made.relaxation is not None
    assert "no plan tried keeps 2% and may be offered" in made.relaxation.words
    _, made = _settled(_bench(), kv_bytes=0.5, max_drop=1e-6)
    assert made.relaxation is not None and "would take --max-drop" in made.relaxation.words
    assert made.relaxation.max_drop is not None and made.entry.after <= WHOLE


def test_larger_shares_are_tried_until_a_plan_that_may_be_offered_is_within_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _only(monkeypatch, "latent_kv", "prune_heads", "merge_kv_heads")
    search = CacheSearch(_bench(), derive(_program(), check=False), Limits(0.5 * WHOLE, 0.01))
    losses = {"latent_kv": 0.001, "prune_heads": 0.02, "merge_kv_heads": 0.5}

    def look(forms: list[str]) -> Kept:
        name = forms[0].partition("{")[0]
        made = replace(_kept(losses[name], int(0.5 * WHOLE)), steps=(Step(forms[0]),))
        search.tried.append(replace(made, latent=name == "latent_kv"))
        losses["prune_heads"] /= 4
        return search.tried[-1]

    monkeypatch.setattr(search, "look", look)
    search.uniform()
    before = len(search.tried)
    monkeypatch.setattr("attnopt.autotune.cache_search.LOOSER", (0.5,))
    search.looser(lambda kept: not kept.latent)
    after = search.tried[before:]
    assert after and all("latent_kv" not in kept.form for kept in after)
    assert after[-1].within(0.01) and not any(kept.within(0.01) for kept in after[:-1])


def test_a_plan_beyond_the_bound_is_healed(monkeypatch: pytest.MonkeyPatch) -> None:
    _faster(monkeypatch, 1.5)
    _only(monkeypatch, "prune_heads")
    _, made = _settled(_bench(), kv_bytes=0.5, max_drop=1e-6, trials=3,
                       heal=HealBudget(tokens=96))  # fmt: skip
    assert made.healing is not None
    assert made.healing.accepted or "healing was not kept" in made.warnings[-1]


def test_every_form_keeps_what_it_was_made_for() -> None:
    bench = _bench()
    search = CacheSearch(bench, derive(bench.build([]).program), Limits(WHOLE, 0.9))
    seen = set()
    for share in (0.75, 0.5):
        for form in search.forms(share):
            kept = search.look([form.text])
            if not kept.reason:
                assert kept.bytes <= share * WHOLE, form.text
                seen.add(form.name)
    assert seen == {"latent_kv", "merge_kv_heads", "share_kv_layers", "prune_heads"}
    program = _program()
    shrink = passes()["shrink_head_dim"]
    assert not shrink.caching(program, 0.5)  # heads of 6 dims lose none
    wide: Any = SimpleNamespace(sites=[SimpleNamespace(spec=SimpleNamespace(head_dim=32))])
    assert shrink.caching(wide, 0.6) == (shrink(keep=0.5),)  # type: ignore[call-arg]
    assert not passes()["merge_kv_heads"].caching(program, 0.4)  # two heads make no third of one
    assert not passes()["sliding_window"].caching(program, 0.5)


def _kept(loss: float, bytes: int, spread: float = 0.0, latent: bool = False) -> Kept:
    each = tuple(loss + spread * (i % 3 - 1) for i in range(12))
    found = {"tokens": (1.0,) * 12, "kl": each}
    accuracy = Accuracy(
        "causal-lm", loss, loss, loss, worst=loss, kl=loss, sequences=12, per_sequence=found
    )
    return Kept((Step(f"latent_kv{{keep={loss}}}"),), bytes, latent, accuracy)


def test_of_equal_losses_the_fewest_bytes_are_taken() -> None:
    latent, grouped = _kept(0.1, 60, 0.05, latent=True), _kept(0.101, 50)
    assert best([latent, grouped]) is grouped  # 0.1 is not surely less
    assert best([replace(latent, accuracy=_kept(0.1, 0).accuracy), _kept(0.3, 50)]).bytes == 60
    assert loses_less(_kept(0.1, 1), _kept(0.2, 1)) and not loses_less(latent, grouped)
    bare = replace(grouped, accuracy=Accuracy("mine", 0.2, 0.2, 0.2, bounded=False))
    assert loses_less(latent, bare) and not loses_less(bare, latent)
    assert math.isinf(Kept(()).loss) and not Kept(()).within(1.0)


def test_bytes_go_where_they_spare_most() -> None:
    def levels(cost: float) -> list[Level]:
        return [Level("", 8.0, 0.0), Level("half", 4.0, cost), Level("quarter", 2.0, 3 * cost)]

    sites = {"s0": levels(1.0), "s1": levels(10.0), "s2": levels(0.1)}
    chosen = allot(sites, 14.0)
    assert [chosen[site].form for site in sites] == ["half", "", "quarter"]
    assert [level.form for level in allot(sites, 24.0).values()] == ["", "", ""]
    assert allot(sites, 5.0) == {}


def test_what_a_site_loses_is_read_off_its_evidence() -> None:
    told = {"k_predicted": 0.5, "k_heldout": 0.1, "v_heldout": 0.2, "rotary_kept": 0.9}
    assert tail(told) == pytest.approx(0.4)
    assert tail({"k_predicted": 0.5}) == 0.5 and tail({"kl_before": 1.0}) is None


def test_a_timed_sample_is_decoding_and_leaves_its_state() -> None:
    made = derive(_program(), check=False)
    load = load_of(made)
    assert load.prompt[0].shape == (3, 8) and load.after[0].shape == (3, 8)
    assert load.words == "3 × 8 tokens cached"
    steps = _Steps(made, load)
    whole = _program().module(input_ids=torch.cat((*load.prompt, *load.after), 1))["logits"]
    for _ in range(2):
        assert_close(steps(*load.after), whole[:, -1:])
        assert steps.state.length == 8
    timing = race({"a": made, "b": made}, load, 0.0)
    assert timing.rounds == 7 and set(timing.samples) == {"a", "b"}


def test_a_model_without_a_cache_is_refused() -> None:
    program = raise_program(traced(encoder(), torch.randn(ROWS, LENGTH, WIDTH)))
    with pytest.raises(Problem, match="has no cache to shrink") as caught:
        require_cache(program)
    assert caught.value.code.startswith("A70") and caught.value.help
    require_cache(_program())


@pytest.mark.parametrize(("said", "meant"), [("50%", 0.5), ("0.5", 0.5), (" 12.5 % ", 0.125)])
def test_shares_are_read(said: str, meant: float) -> None:
    assert parse_kv_bytes(said) == meant


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kv_bytes": 1.0}, "no share of a cache"),
        ({"kv_bytes": 0.0}, "no share of a cache"),
        ({"kv_bytes": 50.0}, "no share of a cache"),
        ({"kv_bytes": math.nan}, "no share of a cache"),
        ({"budget": 2.0}, "at once"),
        ({"max_drop": 0.0}, "--max-drop 0"),
        ({"effort": "none"}, "--effort none"),
    ],
)
def test_demands_that_cannot_be_met_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(Problem, match=said) as caught:
        _request(**given)
    assert caught.value.code == "A410" and caught.value.help
    with pytest.raises(Problem, match="cannot read the share of the cache `half`") as caught:
        parse_kv_bytes("half")
    assert "--kv-bytes 50%" in caught.value.help


def test_reports_tell_of_the_cache(per_layer: Settled) -> None:
    result = replace(full("m", met=True), cache=per_layer.entry, budget=None)
    assert Result.from_json(json.loads(json.dumps(result.as_json()))) == result
    assert result.as_json()["cache"]["met"] is True
    for text in (markdown(result), page(result)):
        plain = re.sub(r"\\|<[^>]*>", "", text)
        assert "Cache budget met: 75% of the bytes per token" in plain
        assert "most 75% of the bytes that a decoder caches" in plain
        assert "by predicted tail" in plain and "1.50×" in plain and "taken" in plain
        assert "nats/token" in plain
    unasked = replace(result, cache=None)
    assert "## Cache" not in markdown(unasked) and record.dump(unasked)["cache"] is None
    assert Journal(None, "x").found == {}
