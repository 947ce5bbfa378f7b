"""A budget of cache bytes: which plans are tried, which one is taken, and what is told."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnopt.autotune import cache_wording, record, wording
from attnopt.autotune.accuracy import Accuracy
from attnopt.autotune.cache_run import CacheRun, Settled
from attnopt.autotune.cache_search import CacheSearch, Kept, Limits, best, loses_less
from attnopt.autotune.heal import HealedPlan
from attnopt.autotune.place import Place
from attnopt.autotune.report import markdown
from attnopt.autotune.report_html import page
from attnopt.autotune.request import HealBudget
from attnopt.autotune.result import HealingEntry, Result
from attnopt.autotune.workbench import Journal, Workbench
from attnopt.compiler.contract import Notes, passes
from attnopt.compiler.decode import derive
from attnopt.compiler.device import CPU
from attnopt.compiler.pipeline import apply_plan
from attnopt.compiler.plan import Plan, Step
from tests.autotune import cache_bench as cb
from tests.autotune.cache_bench import SHARE, WHOLE
from tests.autotune.results import full


@pytest.fixture(scope="module")
def per_layer() -> Settled:
    """A run that merges heads or caches latents, whose steps are faster."""
    with pytest.MonkeyPatch.context() as patch:
        cb.only(patch, "merge_kv_heads", "latent_kv")
        cb.faster(patch, 1.5)
        return cb.settled(cb.bench())[1]


def test_sizes_per_layer_are_taken_where_they_lose_less(per_layer: Settled) -> None:
    bench, made = cb.bench(), per_layer
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
    notes = Notes(cb.program(), bench.data.calibration, bench.data.heldout)
    again, _ = apply_plan(cb.program(), replayed, notes)
    for name, value in made.built.program.module.named_parameters():
        assert torch.equal(again.weight(name), value), name
    assert derive(again).bytes_per_token() == entry.after


def test_latents_whose_step_is_no_faster_are_not_taken_and_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = cb.faster(monkeypatch, 0.5)
    cb.only(monkeypatch, "latent_kv", "prune_heads")
    _, made = cb.settled(cb.bench(), kv_bytes=0.5)
    (taken,) = [plan for plan in made.entry.plans if plan.kept]
    assert "latent" not in taken.plan and made.entry.met
    told = [warning for warning in made.warnings if "latent_kv" in warning]
    assert told and "uncompiled, runs at 0.50x" in told[0] and "the exact plan's" in told[0]
    assert asked


def test_a_run_that_goes_on_measures_nothing_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits = Limits(WHOLE // 2, 0.9, trials=3)
    whole = derive(cb.bench().build([]).program, check=False)
    searches = []
    for _ in range(2):  # the second reads what the first one wrote
        monkeypatch.setattr(
            cb.bench(), "journal", Journal(tmp_path / "measurements.jsonl", "scope")
        )
        searches.append(CacheSearch(cb.bench(), whole, limits))
        searches[-1].uniform(_any)
        monkeypatch.setattr(cb.bench(), "_drop", _measured_again)
        monkeypatch.setattr("attnopt.autotune.cache_search._facts", _measured_again)
    assert searches[0].tried == searches[1].tried and len(searches[0].tried) > 1


def _any(kept: Kept) -> bool:
    return True


def _measured_again(*asked: Any) -> Accuracy:
    pytest.fail("it was measured before")


def test_latents_are_not_held_against_steps_of_another_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("attnopt.autotune.cache_offer.race", _measured_again)
    bench = cb.bench()
    monkeypatch.setattr(bench, "place", Place(CPU, "a100", timed=False))
    run = CacheRun(bench, bench.build([]), cb.request())
    latent = run.search.look(["latent_kv{keep=0.5}"])
    assert latent.latent and run.offers.too_slow(latent) == ""


def test_a_budget_that_nothing_meets_says_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    cb.faster(monkeypatch, 1.5)
    cb.only(monkeypatch, "prune_heads")
    _, made = cb.settled(cb.bench(), kv_bytes=0.02, trials=4)
    assert not made.entry.met and made.relaxation is not None
    assert "no plan tried keeps 2% and may be offered" in made.relaxation.words
    run, made = cb.settled(cb.bench(), kv_bytes=0.5, max_drop=1e-6)
    assert made.relaxation is not None and "would take --max-drop" in made.relaxation.words
    assert made.relaxation.max_drop is not None and made.entry.after == WHOLE
    (judged,) = run.offers.judged.values()  # an offer has to hold on both kinds of data
    (held,) = (k.accuracy for k in run.search.tried if k.steps in run.offers.judged)
    assert held and judged.drop_upper != held.drop_upper
    upper = max(judged.drop_upper, held.drop_upper)
    assert made.relaxation.max_drop == pytest.approx(upper, abs=1e-3)
    assert made.relaxation.max_drop >= upper


@pytest.mark.parametrize(
    ("held", "judged", "rows", "said", "drop"),
    [
        (0.002, 3.2, 12, "would take more than --max-drop allows: it may drop by 320%", None),
        (0.002, 0.4, 12, "50% would take --max-drop 40%", 0.4),
        (0.3, 0.1, 12, "50% would take --max-drop 30%", 0.3),
        (0.002, math.inf, 12, "its drop has no bound", None),
        (0.002, 0.003, 5, "5 sequences are too few to bound a loss", None),
    ],
)
def test_what_would_do_holds_on_both_kinds_of_data(
    held: float, judged: float, rows: int, said: str, drop: float | None
) -> None:
    run = CacheRun(cb.bench(), cb.bench().build([]), cb.request(kv_bytes=0.5, max_drop=0.01))
    kept = cb.a_plan(held, WHOLE // 2)
    assert kept.accuracy
    run.search.tried.append(kept)
    found = replace(kept.accuracy, drop_upper=judged, sequences=rows)
    run.offers.judged[kept.steps], run.offers.beyond[kept.steps] = found, "it drops"
    run.offers.slow[kept.steps] = ""
    made = run._relaxation(None)
    assert said in made.words and made.max_drop == drop
    assert ("give data" in made.words) is (rows < 8)


def test_larger_shares_are_tried_until_a_plan_that_may_be_offered_is_within_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cb.only(monkeypatch, "latent_kv", "prune_heads", "merge_kv_heads")
    search = CacheSearch(cb.bench(), derive(cb.program(), check=False), Limits(WHOLE // 2, 0.01))
    losses = {"latent_kv": 0.001, "prune_heads": 0.02, "merge_kv_heads": 0.5}

    def look(forms: list[str]) -> Kept:
        name = forms[0].partition("{")[0]
        made = replace(cb.a_plan(losses[name], WHOLE // 2), steps=(Step(forms[0]),))
        search.tried.append(replace(made, latent=name == "latent_kv"))
        losses["prune_heads"] /= 4
        return search.tried[-1]

    monkeypatch.setattr(search, "look", look)
    search.uniform(_any)
    before = len(search.tried)
    monkeypatch.setattr("attnopt.autotune.cache_search.LOOSER", (0.5,))
    search.looser(lambda kept: not kept.latent)
    after = search.tried[before:]
    assert after and all("latent_kv" not in kept.form for kept in after)
    assert after[-1].within(0.01) and not any(kept.within(0.01) for kept in after[:-1])


def test_where_the_first_plans_may_not_be_offered_the_others_have_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = cb.faster(monkeypatch, 0.5)
    cb.only(monkeypatch, "latent_kv", "prune_heads")
    _, made = cb.settled(cb.bench(), kv_bytes=0.5, trials=2)
    assert asked and [plan.plan.partition("{")[0] for plan in made.entry.plans if plan.kept] == [
        "prune_heads"
    ]
    assert made.entry.met and made.relaxation is None and len(made.entry.plans) == 2


def test_a_healed_plan_is_kept_where_it_is_within_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cb.only(monkeypatch, "prune_heads")
    cb.faster(monkeypatch, 1.5)
    asked: dict[str, Any] = {"kv_bytes": 0.5, "trials": 3, "heal": HealBudget(tokens=96)}
    _, beyond = cb.settled(cb.bench(), **asked, max_drop=1e-6)
    assert beyond.healing is not None and not beyond.healing.accepted
    assert "healing was not kept: healed it drops by" in beyond.warnings[-1]
    assert beyond.relaxation is not None and beyond.entry.after == WHOLE
    _, made = cb.settled(cb.bench(), **asked)
    assert made.healing is not None and made.healing.accepted and made.entry.met
    assert any(step.rewrite.startswith("heal{") for step in made.built.plan.steps)
    assert made.relaxation is None
    rows = [row for row in cache_wording.plans(made.entry) if row[-1].startswith("taken")]
    assert [row[-1] for row in rows] == ["taken, then healed; figures are before healing"]


def test_a_plan_beyond_the_bound_wins_where_healing_brings_it_within(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cb.only(monkeypatch, "prune_heads")
    cb.faster(monkeypatch, 1.5)
    done: list[list[Step]] = []

    def mended(bench: Workbench, steps: list[Step], asked: HealBudget, before: Accuracy) -> Any:
        done.append(steps)
        none = replace(before, drop=0.0, drop_lower=0.0, drop_upper=0.0)
        return HealedPlan(bench.build(steps), none, HealingEntry(True, "heal{}"))

    monkeypatch.setattr("attnopt.autotune.cache_run.healed", mended)
    _, made = cb.settled(cb.bench(), kv_bytes=0.5, max_drop=1e-6, trials=3,
                       heal=HealBudget(tokens=96))  # fmt: skip
    assert len(done) == 1 and made.entry.met and made.relaxation is None
    (taken,) = [plan for plan in made.entry.plans if plan.kept]
    assert not taken.within and "before healing" in taken.reason


def test_a_plan_is_held_against_the_one_that_decided() -> None:
    least, kept = cb.a_plan(0.10, 60, 0.05), cb.a_plan(0.101, 40, 0.06)
    worse, same, more = (
        cb.a_plan(0.1011, 30),
        cb.a_plan(0.102, 40, 0.07),
        cb.a_plan(0.103, 50, 0.07),
    )
    worse = replace(worse, accuracy=replace(least.accuracy, kl=0.1011, per_sequence={
        "tokens": (1.0,) * 12, "kl": tuple(0.1011 + 0.05 * (i % 3 - 1) for i in range(12))
    }))  # fmt: skip
    assert loses_less(least, worse) and not loses_less(kept, worse)  # it is not transitive
    assert best([least, kept, worse]) is kept
    run = CacheRun(cb.bench(), cb.bench().build([]), cb.request(kv_bytes=0.5))
    run.least = least
    assert run._why_not(worse, kept) == f"it loses more than {least.form}, which loses least"
    assert run._why_not(cb.a_plan(0.4, 30), kept) == "it loses more"
    assert run._why_not(same, kept) == "it stores as much, and does not surely lose less"
    assert run._why_not(more, kept) == "it stores more, and does not surely lose less"
    run.least = kept
    assert (
        run._why_not(cb.a_plan(0.101, 30, 0.06), kept) == "it was not judged on the evaluation data"
    )


def test_a_latent_that_was_raced_is_not_raced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cb.only(monkeypatch, "latent_kv")
    asked = cb.faster(monkeypatch, 1.5)
    run = CacheRun(cb.bench(), cb.bench().build([]), cb.request())
    latent = run.search.look(["latent_kv{keep=0.5}"])
    assert run.offers.too_slow(latent) == "" and len(asked) == 1
    first = run.offers.steps[latent.steps]
    assert run.offers.step(latent, run.offers._decoder(latent)) is first and len(asked) == 1


def test_what_was_not_tried_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = derive(cb.bench().build([]).program, check=False)
    search = CacheSearch(cb.bench(), whole, Limits(WHOLE // 2, 0.9, trials=1))
    first, *others = (form.text for form in search.forms(0.5))
    search.uniform(_any)
    assert [kept.steps[0].rewrite for kept in search.tried] == [first] and others
    (told,) = search.untold
    assert all(form in told for form in others) and first not in told.split(", ")
    assert "at 50% of the cache:" in told and "--trials 1 ran out (of which 67%" in told
    tight = CacheSearch(cb.bench(), whole, Limits(WHOLE // 2, 0.9, trials=1))
    tight.uniform(lambda kept: False)
    tight.looser(_any)
    assert tight.tried == search.tried and tight.untold[0].endswith("--trials 1 ran out")
    assert "at 62.5% of the cache and above:" in tight.untold[1] and len(tight.untold) == 2
    found = CacheSearch(cb.bench(), whole, Limits(WHOLE // 2, 0.9, trials=3))
    found.uniform(lambda kept: len(found.tried) == 3)  # the third, of what is left for others
    assert len(found.tried) == 3 and len(found.untold) == 1
    assert all(form in found.untold[0] for form in others[2:])
    late = CacheSearch(cb.bench(), whole, Limits(WHOLE // 2, 0.9, seconds=0.0))
    late.looser(_any)
    assert "--timeout 0s ran out" in late.untold[0] and not late.tried
    whole_run = CacheSearch(cb.bench(), whole, Limits(WHOLE // 2, 0.9))
    monkeypatch.setattr(whole_run, "look", lambda forms: cb.a_plan(0.1, WHOLE // 2))
    whole_run.uniform(_any)
    assert not whole_run.untold


def test_every_form_keeps_what_it_was_made_for() -> None:
    bench = cb.bench()
    search = CacheSearch(bench, derive(bench.build([]).program), Limits(WHOLE, 0.9))
    seen = set()
    for share in (0.75, 0.5, 0.4, 0.3):
        for form in search.forms(share):
            kept = search.look([form.text])
            if not kept.reason:
                assert kept.bytes <= share * WHOLE, form.text
                seen.add(form.name)
    assert seen == {"latent_kv", "merge_kv_heads", "share_kv_layers", "prune_heads"}
    program = cb.program()
    shrink = passes()["shrink_head_dim"]
    assert not shrink.caching(program, 0.5)  # heads of 6 dims lose none
    wide: Any = SimpleNamespace(sites=[SimpleNamespace(spec=SimpleNamespace(head_dim=32))])
    assert shrink.caching(wide, 0.6) == (shrink(keep=0.5),)  # type: ignore[call-arg]
    assert not passes()["merge_kv_heads"].caching(program, 0.4)  # two heads make no third of one
    assert not passes()["sliding_window"].caching(program, 0.5)


def test_reports_tell_of_the_cache(per_layer: Settled) -> None:
    result = replace(full("m", met=True), cache=per_layer.entry, budget=None)
    assert Result.from_json(json.loads(json.dumps(result.as_json()))) == result
    assert result.as_json()["cache"]["met"] is True
    for text in (markdown(result), page(result)):
        plain = re.sub(r"\\|<[^>]*>", "", text)
        share = wording.share(per_layer.entry.share)
        assert f"Cache budget met: {share} of the bytes per token" in plain
        assert "most 75% of the bytes that a decoder caches" in plain
        assert "by predicted tail" in plain and "1.50×" in plain and "taken" in plain
        assert "nats/token" in plain and "uncompiled" in plain and "not compiled" not in plain
    told = dict(cache_wording.terminal(per_layer.entry))["step"]
    assert told.startswith("1.50×") and "as fast as the exact plan's, uncompiled, after" in told
    unasked = replace(result, cache=None)
    assert "## Cache" not in markdown(unasked) and record.dump(unasked)["cache"] is None
