"""report.md: what was done, what was not and why, and what it cost, for reading in a terminal or
a review.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from attnopt.autotune import cache_wording as words
from attnopt.autotune import wording as say
from attnopt.autotune.result import Result

_MOST = 24  # rows of attentions that are told one by one
_SPECIAL = re.compile(r"([\\`*_\[\]<>#|])")


def markdown(result: Result) -> str:
    """The report as Markdown. Text that came from the user is escaped."""
    parts = [
        [f"# {_plain(say.headline(result))}"],
        _summary(result),
        _relaxation(result),
        _speed(result),
        _accuracy(result),
        _rewritten(result),
        _refused(result),
        _ceiling(result),
        _cache(result),
        _decoding(result),
        _sensitivities(result),
        _front(result),
        _healing(result),
        _warnings(result),
        _environment(result),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _summary(result: Result) -> list[str]:
    rows = [
        ("model", _plain(result.model)),
        ("asked for", _plain(say.demands(result))),
        ("workload", _plain(say.workload(result))),
        ("tier", result.accuracy.tier if result.accuracy else say.NONE),
        *([("took", say.duration(result.seconds))] if result.seconds else []),
    ]
    return _table(("", ""), rows)


def _relaxation(result: Result) -> list[str]:
    if result.relaxation is None:
        return []
    return [f"> The smallest relaxation that would do: {_plain(result.relaxation.words)}"]


def _speed(result: Result) -> list[str]:
    forms = [*result.baselines, *([result.optimized] if result.optimized else [])]
    over = result.speed.over if result.speed else {}
    rows = [
        (
            _plain(form.name),
            say.seconds(form.seconds),
            say.times(over.get(form.name)),
            _plain(say.status(form)),
        )
        for form in forms
    ]
    told = _table(("form", "median (quartiles)", "result is faster by (95%)", "evidence"), rows)
    verdict = [f"Verdict: {result.speed.verdict}.", ""] if result.speed else []
    return ["## Speed", "", *verdict, *told]


def _accuracy(result: Result) -> list[str]:
    entry = result.accuracy
    if entry is None:
        return ["## Accuracy", "", "Not measured."]
    rows = [
        (entry.metric, say.plain(entry.original), say.plain(entry.optimized)),
        ("drop", "", f"{say.percent(entry.drop)}, {say.share(entry.bound)} allowed"),
        *((name, "", say.plain(number)) for name, number in entry.also.items()),
    ]
    seen = f"{entry.sequences} held-out sequences, {entry.tokens} tokens."
    why = f" {_plain(entry.reason)}" if entry.reason else ""
    told = _table(("figure", "original", "result"), rows)
    return ["## Accuracy", "", f"{say.test(entry.verdict)}. {seen}{why}", "", *told]


def _rewritten(result: Result) -> list[str]:
    rows = [
        (
            _code(site.module or site.id),
            _code(site.source),
            _plain(say.facts(site)),
            ", ".join(map(_code, site.applied)) or _plain(site.reason or say.NONE),
        )
        for site in result.sites
    ]
    plan = ["```text", *(say.plan_lines(result.plan) or ["(nothing)"]), "```"]
    branches = [
        (_code(s.module or s.id), s.kind, ", ".join(map(_code, s.applied)))
        for s in result.sublayers
        if s.applied
    ]
    return [
        "## What was rewritten",
        "",
        *plan,
        "",
        *_table(("attention", "source", "facts", "applied, or why not"), rows),
        *(["", *_table(("sublayer", "kind", "applied"), branches)] if branches else []),
    ]


def _refused(result: Result) -> list[str]:
    rows = [
        (
            _code(outcome.rewrite),
            _plain(say.targets(where).removeprefix("on ") or "the whole model"),
            _plain(outcome.reason),
            _code(outcome.at),
            _plain(outcome.help),
        )
        for outcome, where in say.refusals(result.outcomes)
    ]
    if not rows:
        return []
    head = ("rewrite", "not at", "because", "node", "help")
    return ["## What was not, and why", "", *_table(head, rows)]


def _ceiling(result: Result) -> list[str]:
    listed = [*([result.ceiling] if result.ceiling else []), *result.ceilings]
    if not listed:
        return []
    rows = [
        (_plain(c.what), say.percent(c.share), say.times(c.speedup), _plain(c.note)) for c in listed
    ]
    head = ("what", "share of the time", "at most", "note")
    return ["## Ceiling", "", *_table(head, rows)]


def _decoding(result: Result) -> list[str]:
    rows = say.decoding_rows(result)
    if not rows:
        return []
    sites = [tuple(map(_plain, row)) for row in say.phase_rows(result)]
    shown, more = sites[:_MOST], len(sites) - _MOST
    left = ["", f"{more} more rows are in report.html."] if more > 0 else []
    return ["## Decoding", "", *_table(say.DECODING, rows), "", *_table(say.PHASES, shown), *left]


def _cache(result: Result) -> list[str]:
    entry = result.cache
    if entry is None:
        return []
    told = ["## Cache", "", words.lead(entry), "", *_table(words.FIGURES, words.figures(entry))]
    plans = [(_code(plan), *map(_plain, rest)) for plan, *rest in words.plans(entry)]
    if plans:
        told += ["", *_table(words.PLANS, plans)]
    layers = [tuple(map(_plain, row)) for row in words.layers(entry)]
    if layers:
        told += ["", *_table(words.LAYERS, layers)]
    return told


def _sensitivities(result: Result) -> list[str]:
    rows = [
        (
            _code(s.rewrite),
            _plain(s.target),
            say.percent(s.drop),
            _plain(s.reason),
        )
        for s in result.sensitivities
    ]
    if not rows:
        return []
    return ["## Sensitivities", "", *_table(("rewrite", "alone at", "drop", ""), rows)]


def _front(result: Result) -> list[str]:
    rows = [
        (
            str(trial.number) + (" (chosen)" if trial.chosen else ""),
            _code(trial.plan),
            say.times(trial.speed),
            say.percent(trial.drop),
            trial.tier,
        )
        for trial in result.trials
        if trial.front or trial.chosen
    ]
    if not rows:
        return []
    tried = f"{len(result.trials)} plans tried; these are the ones that no other beats on both."
    return ["## Plans", "", tried, "", *_table(("trial", "plan", "speed", "drop", "tier"), rows)]


def _healing(result: Result) -> list[str]:
    told = [*_trained(result), *_refitted(result)]
    return ["## Healing", "", *told] if told else []


def _trained(result: Result) -> list[str]:
    entry = result.healing
    if entry is None:
        return []
    lead = _plain(say.healing(entry))
    if not entry.accepted:
        return [lead, ""]
    head = ("figure", "original", "before healing", "after")
    return [lead, "", *_table(head, [tuple(map(_plain, row)) for row in say.healed(entry)]), ""]


def _refitted(result: Result) -> list[str]:
    rows = [
        (
            _code(fit.target),
            f"{fit.before:.3g}",
            f"{fit.after:.3g}",
            "kept" if fit.accepted else "reverted",
        )
        for fit in result.refits
    ]
    head = ("output", "held-out error before", "after", "")
    return _table(head, rows) if rows else []


def _warnings(result: Result) -> list[str]:
    if not result.warnings:
        return []
    return ["## Warnings", "", *(f"- {_plain(warning)}" for warning in result.warnings)]


def _environment(result: Result) -> list[str]:
    facts = {**result.environment, **result.data, "model sha256": result.model_sha256}
    rows = [(_plain(key), _plain(_flat(value))) for key, value in facts.items() if value]
    command = ["```sh", result.command.replace("```", ""), "```", ""] if result.command else []
    return ["## Environment, and how to reproduce", "", *command, *_table(("", ""), rows)]


def _flat(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *(_row(row) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |"


def _plain(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)


def _code(text: str) -> str:
    """Text in code style, inside a table cell too."""
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`" if text else ""
