"""How figures and verdicts are put into words: the same in report.md, report.html and the
terminal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from attnopt.autotune.number import Number
from attnopt.autotune.result import HealingEntry, Result, SiteEntry, Timed
from attnopt.compiler.decode.phase_cost import Decoding, Phase, SitePhases
from attnopt.compiler.plan import Outcome, Plan

NONE = "–"
_NUMBERED = re.compile(r"^(.*?)(\d+)(.*)$")


def times(number: Number | None, *, interval: bool = True) -> str:
    """A ratio: `2.31× (2.25 to 2.38)`."""
    return _said(number, lambda value: f"{value:.2f}×", interval)


def percent(number: Number | None, *, interval: bool = True) -> str:
    """A fraction in percent: `0.42% (0.31% to 0.55%)`."""
    return _said(number, share, interval)


def plain(number: Number | None, *, interval: bool = True) -> str:
    """A number with its unit, to four digits."""
    said = _said(number, lambda value: f"{value:.4g}", interval)
    return f"{said} {number.unit}" if number is not None and number.unit else said


def seconds(number: Number | None, *, interval: bool = True) -> str:
    """A duration in the unit that suits it: `12.3 ms (12.1 ms to 12.6 ms)`."""
    return _said(number, duration, interval)


def share(value: float) -> str:
    """A fraction in percent, with more digits where it is small."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value) * 100
    if size < 1e-6:  # rounding
        return "0%"
    if size < 1e-3:
        return f"{value * 100:.0e}%"
    digits = f"{value * 100:.{3 if size < 0.1 else 2 if size < 10 else 1}f}"
    return digits.rstrip("0").rstrip(".") + "%"


def allowing(drop: float) -> tuple[str, float | None]:
    """What `--max-drop` would have to be for a drop that may be as large as this: in words, and as
    a fraction; None where it allows none so large."""
    if not math.isfinite(drop):
        return "more than --max-drop allows: its drop has no bound", None
    needed = math.ceil(drop * 1000) / 1000
    if needed >= 1:
        return f"more than --max-drop allows: it may drop by {share(drop)}", None
    return f"--max-drop {share(needed)}", needed


def duration(value: float) -> str:
    """Seconds in s, ms or µs."""
    if not value < 60:
        return f"{value:.0f} s"
    for least, scale, unit in ((1.0, 1.0, "s"), (1e-3, 1e3, "ms")):
        if value >= least:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def factor(value: float) -> str:
    """A ratio that was asked for: `2×`."""
    return f"{value:g}×"


def healing(entry: HealingEntry) -> str:
    """What the training of touched sites was, and whether it was kept."""
    if not entry.accepted:
        return f"Healing ({entry.rewrite}) was not kept: {entry.reason}."
    what = "whole weights" if not entry.rank else f"changes of rank {entry.rank}"
    return (
        f"{entry.numbers:,} numbers of {entry.sites} sites ({what}) were trained on "
        f"{entry.tokens:,} tokens in {seconds(entry.seconds)}; the loss of held-out data decided."
    )


def healed(entry: HealingEntry) -> list[tuple[str, str, str, str]]:
    """The figures of a healing: name, of the original, before and after."""
    return [
        ("held-out loss", NONE, plain(entry.loss_before), plain(entry.loss_after)),
        (
            f"{entry.metric}, evaluation data",
            plain(entry.original),
            plain(entry.before),
            plain(entry.after),
        ),
        ("drop, evaluation data", NONE, percent(entry.drop_before), percent(entry.drop_after)),
    ]


def headline(result: Result) -> str:
    """One sentence: whether the demands are met, how fast it is, and what it costs."""
    asked = "Budget met" if result.met else "Budget not met"
    if result.budget is None:
        faster = result.speed is None or result.speed.verdict == "faster"
        asked = "Best plan found" if faster else "Nothing faster was found"
    parts = [asked]
    if result.cache is not None:
        asked = "Cache budget met" if result.met else "Cache budget not met"
        parts = [asked, f"{share(result.cache.share)} of the bytes per token"]
    elif result.speed is not None:
        parts.append(f"{times(result.speed.ratio, interval=False)} over {result.speed.best}")
    parts.append(cost(result))
    return parts[0] + (": " + ", ".join(parts[1:]) if parts[1:] else "")


def cost(result: Result) -> str:
    """What the result costs in accuracy, in a few words."""
    entry = result.accuracy
    if entry is None:
        return "accuracy not measured"
    if entry.tier == "exact":
        return "the same outputs"
    drop = percent(entry.drop, interval=False)
    return f"{drop} drop of {entry.metric} ({share(entry.bound)} allowed)"


def test(verdict: str) -> str:
    """The verdict on the drop, as a clause."""
    return {
        "pass": "The drop stays within the bound",
        "fail": "The drop is beyond the bound",
        "inconclusive": "Too little data to tell whether the drop stays within the bound",
    }[verdict]


def demands(result: Result) -> str:
    """What was asked for."""
    budget = "the fastest there is"
    if result.budget is not None:
        budget = f"at least {factor(result.budget)} over the fastest baseline"
    if result.cache is not None:
        budget = f"at most {share(result.cache.wanted)} of the bytes that a decoder caches"
    kept = (
        "exact rewrites only" if result.max_drop == 0 else f"at most {share(result.max_drop)} drop"
    )
    there = "" if result.device == "cpu" else f", fitted and judged on {result.device}"
    return f"{budget}, {kept}, on {result.target}{there}"


def workload(result: Result) -> str:
    """What was timed."""
    load = result.workload
    real = "" if load.fill >= 1 else f", {share(load.fill)} of it real tokens"
    source = f" ({load.source})" if load.source else ""
    return f"{load.batch} × {load.length} positions{real}{source}"


def bytes_of(value: float) -> str:
    """Bytes in B, kB, MB or GB (powers of 1000)."""
    for least, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= least:
            return f"{value / least:.3g} {unit}"
    return f"{value:.0f} B"


def decoding(told: Mapping[str, Any]) -> str:
    """What a step reads, from the JSON form of a `Decoding`."""
    weights, cache = bytes_of(told["weight_bytes"]), bytes_of(told["cache_bytes"])
    return (
        f"after {told['batch']} × {told['cached']} tokens it reads {weights} of weights and "
        f"{cache} of cache: at most {told['ceiling']:.2f}× faster without the cache"
    )


DECODING = ("decoding, estimated", "before", "after")


def decoding_rows(result: Result) -> list[tuple[str, str, str]]:
    """The figures of decoding before and after, in the columns of `DECODING`; none where there is
    no cache."""
    if not result.decoding:
        return []
    before, after = (result.decoding[name] for name in ("before", "after"))
    load = f"{before.batch} × {before.cached} tokens"

    def row(what: str, say: Callable[[Decoding], str]) -> tuple[str, str, str]:
        return what, say(before), say(after)

    return [
        row("cache per token", lambda d: bytes_of(d.cache_bytes_per_token)),
        row("weights that a step reads", lambda d: bytes_of(d.weight_bytes)),
        row(f"cache that a step reads after {load}", lambda d: bytes_of(d.cache_bytes)),
        row("at most faster without the cache", lambda d: f"{d.ceiling:.2f}×"),
        row(f"attention on a prompt of {load}", lambda d: _phase(d.prefill)),
        row("attention in a step", lambda d: _phase(d.step)),
    ]


PHASES = (
    "attention, estimated", "", "cache per token", "prompt FLOP", "bytes", "FLOP/B", "step FLOP",
    "bytes", "FLOP/B",
)  # fmt: skip


def phase_rows(result: Result) -> list[tuple[str, ...]]:
    """The phases of each attention before and after, in the columns of `PHASES`; attentions that
    cost alike share a row, and what the plan leaves alone has one."""
    if not result.decoding:
        return []
    cells = {
        name: {site.site: _phases(site) for site in told.sites}
        for name, told in result.decoding.items()
    }
    before, after = cells["before"], cells["after"]
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for id in dict.fromkeys((*before, *after)):
        groups.setdefault((before.get(id, ()), after.get(id, ())), []).append(id)
    rows = list[tuple[str, ...]]()
    for (old, new), ids in groups.items():
        where = targets(ids).removeprefix("on ")
        named = (("before", old), ("after", new)) if old != new else (("before and after", old),)
        rows += [(where, when, *told) for when, told in named if told]
    return rows


def _phases(site: SitePhases) -> tuple[str, ...]:
    figures = (
        (f"{phase.flops:.3g}", bytes_of(phase.bytes), f"{phase.intensity:.3g}")
        for phase in (site.prefill, site.step)
    )
    return bytes_of(site.cache_bytes_per_token), *(cell for each in figures for cell in each)


def _phase(phase: Phase) -> str:
    return f"{phase.flops:.3g} FLOP, {bytes_of(phase.bytes)}: {phase.intensity:.3g} FLOP/B"


def status(timed: Timed) -> str:
    """Where a time comes from, or why there is none."""
    if timed.status == "measured" and timed.rounds:
        return f"measured, {timed.rounds} rounds"
    return f"{timed.status}: {timed.reason}" if timed.reason else timed.status


def facts(site: SiteEntry) -> str:
    """The facts of a site in one line: `8q/2kv × 64, causal, rotary`."""
    known = site.facts
    if not site.raised:
        return NONE
    heads, shared = known.get("heads"), known.get("kv_heads")
    parts = [f"{heads}q/{shared}kv × {known.get('head_dim')}"] if heads else []
    parts += [
        str(known[key]) for key in ("mask", "position") if known.get(key) not in (None, "none")
    ]
    return ", ".join(parts)


def plan_lines(plan: Plan) -> list[str]:
    """The plan's steps, one per line, with long lists of targets folded to ranges."""
    lines = [f"{step.rewrite}  {targets(step.targets)}".rstrip() for step in plan.steps]
    return lines + (["run under torch.compile"] if plan.compiled else [])


def targets(names: Iterable[str]) -> str:
    """Targets in short: `s0..s5, s9`; nothing for all of them."""
    listed = list(names)
    if listed == ["*"]:
        return ""
    runs: list[list[str]] = []
    for name in listed:
        if runs and _follows(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    told = [run[0] if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return "on " + ", ".join(told)


def refusals(outcomes: Iterable[Outcome]) -> list[tuple[Outcome, list[str]]]:
    """What was not applied, one entry per rewrite and reason, with all its targets."""
    found: dict[tuple[str, str], tuple[Outcome, list[str]]] = {}
    for outcome in outcomes:
        if not outcome.applied:
            key = (outcome.rewrite, outcome.reason)
            found.setdefault(key, (outcome, []))[1].append(outcome.target)
    return list(found.values())


def layer(target: str) -> tuple[str, str]:
    """The number in a target's id, and the kind that is left: `b3.mlp` is ("3", "mlp")."""
    match = _NUMBERED.match(target)
    if match is None:
        return "all", ""
    return match.group(2), match.group(3).strip(".")


def _follows(one: str, other: str) -> bool:
    a, b = _NUMBERED.match(one), _NUMBERED.match(other)
    if a is None or b is None or (a.group(1), a.group(3)) != (b.group(1), b.group(3)):
        return False
    return int(b.group(2)) == int(a.group(2)) + 1


def _said(number: Number | None, shape: object, interval: bool) -> str:
    if number is None:
        return NONE
    assert callable(shape)
    said = str(shape(number.value))
    if interval and number.low is not None and number.high is not None:
        bounds = (str(shape(number.low)), str(shape(number.high)))
        said += f" ({bounds[0]} to {bounds[1]})" if {*bounds} != {said} else ""
    return said if number.kind == "measured" else f"{said} (estimated)"
