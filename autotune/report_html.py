"""report.html: one self-contained page, without scripts and without a single request to the
network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from attnopt.autotune import cache_page, charts, diagnostics_html
from attnopt.autotune import wording as say
from attnopt.autotune.markup import Markup, join, table, tag
from attnopt.autotune.number import Number
from attnopt.autotune.report_style import STYLE
from attnopt.autotune.result import Result, Timed, Trial
from attnopt.compiler.plan import Outcome

_MANY = 24


def page(result: Result) -> str:
    """The report as an HTML document."""
    return document(f"{result.model}: {say.headline(result)}", _parts(result))


def document(title: str, parts: Sequence[Markup | None]) -> str:
    """A page with this title and these parts, that may load nothing."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = tag(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    body = tag("body", tag("main", *parts))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _parts(result: Result) -> list[Markup | None]:
    return [
        _header(result),
        _cards(result),
        _callout(result),
        _speed(result),
        _accuracy(result),
        _rewritten(result),
        _refused(result),
        _ceiling(result),
        cache_page.section(result.cache),
        _decoding(result),
        _sensitivities(result),
        diagnostics_html.section(result.diagnostics) if result.diagnostics else None,
        _plans(result),
        _healing(result),
        _warnings(result),
        _environment(result),
    ]


def _header(result: Result) -> Markup:
    badge = tag("span", "met" if result.met else "not met", class_=f"badge {'good' * result.met}")
    asked = f"{say.demands(result)[0].upper()}{say.demands(result)[1:]}."
    return join([
        badge,
        tag("h1", say.headline(result)),
        tag("p", tag("strong", result.model), f" · {say.workload(result)}. {asked}", class_="lead"),
    ])  # fmt: skip


def _cards(result: Result) -> Markup:
    cards = []
    for name, ratio in (result.speed.over if result.speed else {}).items():
        note = f"{_range(ratio, '95%: {:.2f}× to {:.2f}×')} · {_kind(ratio)}"
        cards.append(_card(f"speed over {name}", say.times(ratio, interval=False), note))
    if result.cache is not None:
        note = f"{say.bytes_of(result.cache.after)} of {say.bytes_of(result.cache.before)}"
        cards.append(_card("cache per token", say.share(result.cache.share), note))
    entry = result.accuracy
    if entry is not None:
        low, high = entry.drop.low, entry.drop.high
        known = low is not None and high is not None
        bounds = f"95% bounds {say.share(low or 0.0)} to {say.share(high or 0.0)}" if known else ""
        note = " · ".join(filter(None, [bounds, f"{say.share(entry.bound)} allowed"]))
        cards.append(_card(f"drop of {entry.metric}", say.share(entry.drop.value), note))
        cards.append(_card("tier", entry.tier, f"accuracy test: {entry.verdict}"))
    if result.ceiling is not None:
        share = say.percent(result.ceiling.share, interval=False)
        note = f"{result.ceiling.what} takes {share} of the time"
        cards.append(_card("ceiling", say.times(result.ceiling.speedup, interval=False), note))
    return tag("div", *cards, class_="cards")


def _callout(result: Result) -> Markup | None:
    if result.relaxation is None:
        return None
    words = result.relaxation.words
    return tag(
        "div", tag("strong", "The smallest relaxation that would do: "), words, class_="callout"
    )


def _speed(result: Result) -> Markup:
    forms = [*result.baselines, *([result.optimized] if result.optimized else [])]
    shown = [_bar(form, form is result.optimized) for form in forms if form.seconds is not None]
    chart = charts.bars(shown, "Median time of each form, with quartiles") if shown else None
    over = result.speed.over if result.speed else {}
    rows = [
        (form.name, say.seconds(form.seconds), say.times(over.get(form.name)), say.status(form))
        for form in forms
    ]
    verdict = f"The result is {result.speed.verdict}." if result.speed else "Nothing was timed."
    if result.speed and result.speed.verdict == "inconclusive":
        verdict = "Whether the result is faster is inconclusive."
    head = ("form", "median (quartiles)", "result is faster by (95%)", "evidence")
    return _section("Speed", f"{verdict} Less time is better.", chart, table(head, rows))


def _accuracy(result: Result) -> Markup:
    entry = result.accuracy
    if entry is None:
        return _section("Accuracy", "Not measured.")
    drop = entry.drop
    low = drop.value if drop.low is None else drop.low
    high = drop.value if drop.high is None else drop.high
    mark = charts.Bar("drop", drop.value, low, high, say.percent(drop), entry.verdict)
    chart = None
    if math.isfinite(drop.value) and entry.tier != "exact":  # rounding is nothing to draw
        title = "Relative drop with its 95% bounds; the shaded part is allowed"
        chart = charts.interval(mark, entry.bound, title, say.share)
    rows = [
        (entry.metric, say.plain(entry.original), say.plain(entry.optimized)),
        ("drop", "", say.percent(drop)),
        *((name, "", say.plain(number)) for name, number in entry.also.items()),
    ]
    lead = (
        f"{say.test(entry.verdict)}, against the original model on {entry.sequences} held-out "
        f"sequences ({entry.tokens} tokens). {entry.reason}"
    )
    return _section("Accuracy", lead, chart, table(("figure", "original", "result"), rows))


def _rewritten(result: Result) -> Markup:
    rows = [
        (
            tag("code", site.module or site.id),
            tag("code", site.source),
            say.facts(site),
            _codes(site.applied) if site.raised else tag("span", site.reason, class_="bad"),
        )
        for site in result.sites
    ]
    branches = [
        (tag("code", s.module or s.id), s.kind, _codes(s.applied))
        for s in result.sublayers
        if s.applied
    ]
    found = sum(site.raised for site in result.sites)
    steps = say.plan_lines(result.plan) or ["nothing: the model is unchanged"]
    return _section(
        "What was rewritten",
        f"{found} of {len(result.sites)} attentions understood. The plan, in order:",
        tag("pre", "\n".join(steps)),
        _folded("attentions", ("attention", "source", "facts", "applied"), rows),
        _folded("sublayers", ("sublayer", "kind", "applied"), branches) if branches else None,
    )


def _refused(result: Result) -> Markup | None:
    rows = [_refusal(outcome, where) for outcome, where in say.refusals(result.outcomes)]
    if not rows:
        return None
    head = ("rewrite", "not at", "because", "help")
    return _section("What was not, and why", "", _folded("reasons", head, rows))


def _refusal(outcome: Outcome, where: Sequence[str]) -> tuple[object, ...]:
    targets = say.targets(where).removeprefix("on ") or "the whole model"
    node = join([" at ", tag("code", outcome.at)]) if outcome.at else None
    return tag("code", outcome.rewrite), targets, join([outcome.reason, node]), outcome.help


def _ceiling(result: Result) -> Markup | None:
    listed = [*([result.ceiling] if result.ceiling else []), *result.ceilings]
    if not listed:
        return None
    rows = [(c.what, say.percent(c.share), say.times(c.speedup), c.note) for c in listed]
    lead = "However fast a part becomes, the rest stays: 1 / (1 − share) is the most it can gain."
    return _section("Ceiling", lead, table(("part", "share of the time", "at most", ""), rows))


def _decoding(result: Result) -> Markup | None:
    rows = say.decoding_rows(result)
    if not rows:
        return None
    lead = "Counted from shapes: what a prompt and one more token cost with a cache of the rest."
    sites = _folded("rows of attentions", say.PHASES, say.phase_rows(result))
    return _section("Decoding", lead, table(say.DECODING, rows), sites)


def _sensitivities(result: Result) -> Markup | None:
    cells: dict[str, dict[str, tuple[float, str]]] = {}
    columns: dict[str, None] = {}
    for item in result.sensitivities:
        column, kind = say.layer(item.target)
        if item.drop is None:
            continue
        row = item.rewrite + (f" · {kind}" if kind else "")
        tip = f"{item.rewrite} at {item.target}: drop {say.percent(item.drop)}"
        cells.setdefault(row, {})[column] = (item.drop.value, tip)
        columns[column] = None
    if not cells:
        return None
    ordered = sorted(
        columns, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0)
    )
    chart = charts.heatmap(cells, ordered, "Drop by rewrite and layer", say.share)
    rows = [
        (tag("code", s.rewrite), s.target, say.percent(s.drop), s.reason)
        for s in result.sensitivities
    ]
    lead = (
        "The drop that each rewrite costs at one place alone; columns are layers, darker is worse."
    )
    numbers = table(("rewrite", "alone at", "drop", ""), rows)
    shown = tag("details", tag("summary", f"all {len(rows)} numbers"), numbers)
    return _section("Sensitivities", lead, chart, shown)


def _plans(result: Result) -> Markup | None:
    points = [
        charts.Point(t.speed.value, t.drop.value, _tip(t), _mark(t))
        for t in result.trials
        if t.speed is not None and t.drop is not None
    ]
    if not points:
        return None
    chart = charts.scatter(
        points,
        "Speed and drop of every plan tried",
        ("speed over the fastest baseline →", "drop (lower is better)"),
        (lambda value: f"{value:.3g}×", say.share),
        (result.budget, result.max_drop),
    )
    kinds = (
        ("chosen", "chosen"),
        ("front", "Pareto front"),
        ("try", "beaten"),
        ("miss", "infeasible"),
    )
    key = tag("p", *(join([tag("span", class_=kind), name]) for kind, name in kinds), class_="key")
    rows = [
        (
            join([t.number, " (chosen)" if t.chosen else ""]),
            tag("code", t.plan),
            say.times(t.speed),
            say.percent(t.drop),
            t.tier,
        )
        for t in result.trials
        if t.front or t.chosen
    ]
    lead = f"{len(result.trials)} plans tried. No other plan is both faster and closer than these."
    listed = table(("trial", "plan", "speed", "drop", "tier"), rows)
    return _section("Plans: speed against accuracy", lead, chart, key, listed)


def _healing(result: Result) -> Markup | None:
    told = [part for part in (_trained(result), _refitted(result)) if part is not None]
    if not told:
        return None
    lead = "Kept only where the held-out error fell."
    return _section("Healing", lead, *told)


def _trained(result: Result) -> Markup | None:
    entry = result.healing
    if entry is None:
        return None
    words = tag("p", say.healing(entry))
    if not entry.accepted:
        return words
    head = ("figure", "original", "before healing", "after")
    return tag("div", words, table(head, say.healed(entry)))


def _refitted(result: Result) -> Markup | None:
    if not result.refits:
        return None
    rows = [
        (
            tag("code", fit.target),
            f"{fit.before:.3g}",
            f"{fit.after:.3g}",
            tag(
                "span",
                "kept" if fit.accepted else "reverted",
                class_="ok" if fit.accepted else "no",
            ),
        )
        for fit in result.refits
    ]
    head = ("output refitted", "relative error before", "after", "")
    return _folded("outputs", head, rows)


def _warnings(result: Result) -> Markup | None:
    if not result.warnings:
        return None
    return _section("Warnings", "", tag("ul", *(tag("li", text) for text in result.warnings)))


def _environment(result: Result) -> Markup:
    facts = {**result.environment, **result.data, "model sha256": result.model_sha256}
    rows = [
        (key, _flat(value)) for key, value in {**facts, "seed": str(result.seed)}.items() if value
    ]
    took = f"The run took {say.duration(result.seconds)}." if result.seconds else ""
    command = tag("pre", result.command) if result.command else None
    return _section(
        "Environment, and how to reproduce", took, command, table(("fact", "value"), rows)
    )


def _section(title: str, lead: str, *children: Markup | None) -> Markup:
    told = tag("p", lead, class_="muted") if lead.strip() else None
    return tag("section", tag("h2", title), told, *children)


def _card(name: str, figure: str, note: str) -> Markup:
    lines = (("name", name), ("figure", figure), ("note", note))
    return tag("div", *(tag("div", text, class_=kind) for kind, text in lines), class_="card")


def _bar(form: Timed, result: bool) -> charts.Bar:
    number = form.seconds
    assert number is not None
    low = number.value if number.low is None else number.low
    high = number.value if number.high is None else number.high
    said = say.seconds(number, interval=False)
    return charts.Bar(form.name, number.value, low, high, said, "result" if result else "")


def _folded(what: str, head: Sequence[object], rows: Sequence[Sequence[object]]) -> Markup | None:
    """A table; a long one is folded away behind its size. None without rows."""
    made = table(head, rows)
    if len(rows) <= _MANY:
        return made
    return tag("details", tag("summary", f"all {len(rows)} {what}"), made)


def _codes(names: Sequence[str]) -> object:
    if not names:
        return tag("span", "nothing", class_="no")
    return join([part for name in names for part in (tag("code", name), Markup("<br>"))][:-1])


def _mark(trial: Trial) -> str:
    if trial.chosen:
        return "chosen"
    if not trial.feasible:
        return "miss"
    return "front" if trial.front else "try"


def _tip(trial: Trial) -> str:
    figures = f"{say.times(trial.speed)}, drop {say.percent(trial.drop)}"
    why = f"; {trial.reason}" if trial.reason else ""
    return f"trial {trial.number}: {trial.plan}: {figures}{why}"


def _range(number: Number, form: str) -> str:
    if number.low is None or number.high is None:
        return "no interval"
    return form.format(number.low, number.high)


def _kind(number: Number) -> str:
    return number.kind + (f", {number.note}" if number.note else "")


def _flat(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
