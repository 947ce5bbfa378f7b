"""All that the commands draw: tables and verdicts on stdout, problems and progress on stderr.

User text is never read as markup. Nothing here imports torch before there is a result to draw.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnopt.compiler.errors import Notice, Problem

if TYPE_CHECKING:
    from attnopt.autotune.result import Result
    from attnopt.compiler.plan import Outcome

NONE = "–"
_PLAIN_WIDTH = 160  # into a file or a pipe: wide enough that no cell is cut
_NARROW = 110  # below it, a site's source stands under its module
_GREEN, _AMBER, _RED, _DIM = "green", "yellow", "bold red", "dim"

Column = tuple[str, Literal["left", "right"]]
_SITE: tuple[Column, ...] = (
    ("attention", "left"),
    ("source", "left"),
    ("q/kv × dim", "right"),
    ("scale", "right"),
    ("mask", "left"),
    ("position", "left"),
    ("params", "right"),
    ("FLOPs", "right"),
    ("time", "right"),
)
_SUBLAYERS: tuple[Column, ...] = (
    ("sublayers", "left"),
    ("params", "right"),
    ("FLOPs", "right"),
    ("time", "right"),
)
_DECODING: tuple[Column, ...] = (
    ("decoding, estimated", "left"),
    ("cache/token", "right"),
    ("prompt FLOPs", "right"),
    ("bytes", "right"),
    ("FLOP/B", "right"),
    ("step FLOPs", "right"),
    ("bytes", "right"),
    ("FLOP/B", "right"),
)
_OUTCOMES: tuple[Column, ...] = (
    ("rewrite", "left"),
    ("at", "left"),
    ("", "left"),
    ("because", "left"),
)


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr; without a terminal it writes wide plain text."""
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = _PLAIN_WIDTH
    return made


def document(data: Any) -> None:
    """The one JSON document that `--json` prints on stdout. Numbers that are not finite become
    null.
    """
    console().file.write(json.dumps(_finite(data), indent=1, ensure_ascii=False) + "\n")


def line(text: str, style: str = "") -> None:
    """One line of plain text on stdout."""
    console().print(Text(text, style))


def problem(said: Problem | Notice) -> None:
    """A problem or a warning on stderr, in the compiler's form: what, where, why, how to mend."""
    severe = isinstance(said, Problem)
    label = f"{'error' if severe else 'warning'}[{said.code}]"
    text = Text.assemble((label, _RED if severe else f"bold {_AMBER}"), (f": {said.what}", "bold"))
    arrows = (("  --> ", said.where), ("   = reason: ", said.why), ("   = help: ", said.help))
    for arrow, value in arrows:
        if value:
            text.append("\n")
            text.append(arrow, "blue")
            text.append(value)
    console(stderr=True).print(text, soft_wrap=True)


def sites(rows: Sequence[Mapping[str, Any]]) -> None:
    """One row per attention, as `inspect --json` lists them; what was not understood follows, with
    why.
    """
    target = console()
    narrow = target.width < _NARROW
    target.print(_table(_SITE, [_site(row, narrow=narrow) for row in rows], 1 if narrow else 2))
    missing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for fact, why in (row.get("missing") or {}).items():
            missing.setdefault((fact, str(why)), []).append(_module(row))
    for (fact, why), where in missing.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        target.print(_fact(fact, f"not found at {where[0]}{more}: {why}", _DIM))
    unknown = [row for row in rows if not row.get("raised", True)]
    for row in unknown:
        problem(_not_understood(row))
    line(f"{len(rows)} found, {len(rows) - len(unknown)} understood")


def sublayers(rows: Sequence[Mapping[str, Any]]) -> None:
    """The residual branches by kind: how many, and their share of parameters, FLOPs and time."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("kind", "other")), []).append(row)
    cells = [
        (
            f"{len(group)} {kind}",
            _count(_sum(group, "parameters")),
            _share(_sum(group, "flops_share")),
            _share(_sum(group, "time_share")),
        )
        for kind, group in kinds.items()
    ]
    if cells:
        console().print(_table(_SUBLAYERS, cells))


def decoding(told: Mapping[str, Any]) -> None:
    """What decoding with a cache costs, from `inspect --json`; attentions alike share a row. Says
    nothing of a model that cannot be decoded."""
    from attnopt.autotune import wording as say

    if "sites" not in told:
        return
    groups: dict[tuple[str, ...], list[str]] = {}
    for site in told["sites"]:
        cells = [say.bytes_of(site["cache_bytes_per_token"])]
        for phase in (site["prefill"], site["step"]):
            cells += [_count(phase["flops"]), say.bytes_of(phase["bytes"]),
                      f"{phase['intensity']:.3g}"]  # fmt: skip
        groups.setdefault(tuple(cells), []).append(str(site["site"]))
    rows = [(say.targets(ids).removeprefix("on "), *cells) for cells, ids in groups.items()]
    console().print(_table(_DECODING, rows))
    console().print(_fact("cache", f"{say.bytes_of(told['cache_bytes_per_token'])} per token"))
    console().print(_fact("step", say.decoding(told)))


def model(found: Mapping[str, Any]) -> None:
    """The model as a whole, from `inspect --json`: its size, inputs and time, and what to know."""
    from attnopt.autotune import wording as say

    target = console()
    seconds = _value(found.get("seconds"))
    facts = (
        ("model", str(found.get("model") or "")),
        ("inputs", str(found.get("inputs") or "")),
        ("params", _count(found.get("parameters"))),
        ("FLOPs", _count(_value(found.get("flops")))),
        ("time", f"{say.duration(seconds)} per call, measured" if seconds is not None else ""),
        *(("note", str(note)) for note in found.get("notes", ())),
    )
    for name, told in facts:
        if told:
            target.print(_fact(name, told))


def outcomes(done: Iterable[Outcome]) -> None:
    """What each rewrite did: applied where, or why not; equal answers share a row."""
    from attnopt.autotune import wording as say

    groups: dict[tuple[str, bool, str], list[Outcome]] = {}
    for outcome in done:
        told = outcome.note if outcome.applied else outcome.reason
        groups.setdefault((outcome.rewrite, outcome.applied, told), []).append(outcome)
    rows = []
    for (rewrite, applied, told), group in groups.items():
        mark = Text("applied", _GREEN) if applied else Text("left alone", _DIM)
        where = say.targets(outcome.target for outcome in group).removeprefix("on ")
        helped = f"{told}; {group[0].help}" if group[0].help else told
        rows.append((rewrite, where or "the model", mark, helped + _error(group)))
    if rows:
        console().print(_table(_OUTCOMES, rows))


def verdict(result: Result) -> None:
    """What a run found: met or not, speed with intervals, accuracy with bounds, and what would
    do.
    """
    from attnopt.autotune import cache_wording
    from attnopt.autotune import wording as say

    target = console()
    faster = result.speed is None or result.speed.verdict == "faster"
    good = result.met and (faster or result.cache is not None)
    mark, style = ("✓", _GREEN) if good else ("✗", _AMBER)
    target.print(Text(f"{mark} {say.headline(result)}", f"bold {style}"))
    for name, ratio in (result.speed.over if result.speed else {}).items():
        target.print(_fact("speed", f"{say.times(ratio)} over {name}"))
    if result.speed is not None and result.speed.verdict != "faster":
        told = f"{result.speed.verdict}: not offered as faster than {result.speed.best}"
        target.print(_fact("", told, _AMBER))
    for name, told in cache_wording.terminal(result.cache) if result.cache is not None else ():
        target.print(_fact(name, told))
    entry = result.accuracy
    if entry is not None:
        told = f"{say.percent(entry.drop)} drop of {entry.metric}, {say.share(entry.bound)} allowed"
        target.print(_fact("accuracy", f"{told}: {entry.verdict}, {entry.tier}"))
    if result.healing is not None and result.healing.accepted:
        before, after = (say.percent(d, interval=False) for d in (
            result.healing.drop_before, result.healing.drop_after))  # fmt: skip
        told = f"{before} drop before, {after} after {result.healing.tokens:,} tokens"
        target.print(_fact("healed", told))
    if result.ceiling is not None:
        part = say.percent(result.ceiling.share, interval=False)
        most = say.times(result.ceiling.speedup, interval=False)
        told = f"{result.ceiling.what} takes {part} of the time: without all of it at most {most}"
        target.print(_fact("ceiling", f"{told} more than the exact rewrites"))
    if result.relaxation is not None:
        target.print(_fact("would do", result.relaxation.words, _AMBER))
    for warning in result.warnings:
        target.print(_fact("warning", warning, _AMBER))
    if result.folder:
        target.print(_fact("saved", f"{result.folder} (report.html shows the details)"))


def _site(row: Mapping[str, Any], *, narrow: bool) -> tuple[str | Text, ...]:
    module, source = _module(row), str(row.get("source") or "")
    if narrow and source:
        module, source = f"{module}\n  {source}", ""
    if not row.get("raised", True):
        return (module, source, Text("left alone", _AMBER), *[""] * 6)
    heads = f"{row.get('heads', NONE)}/{row.get('kv_heads', NONE)} × {row.get('head_dim', NONE)}"
    scale = row.get("scale")
    return (
        module,
        source,
        heads,
        f"{scale:.4g}" if isinstance(scale, (int, float)) else "",
        str(row.get("mask") or ""),
        str(row.get("position") or ""),
        _count(row.get("parameters")),
        _share(row.get("flops_share")),
        _share(row.get("time_share")),
    )


def _module(row: Mapping[str, Any]) -> str:
    return str(row.get("module") or row.get("id") or NONE)


def _not_understood(row: Mapping[str, Any]) -> Notice:
    where = "   ".join(str(row[key]) for key in ("module", "source") if row.get(key))
    why = str(row.get("reason") or "no reason is known")
    node = f" (at node {row['node']})" if row.get("node") else ""
    return Notice("A210", "attention left alone", where, why + node, str(row.get("help") or ""))


def _error(group: Sequence[Outcome]) -> str:
    errors = [outcome.error for outcome in group if outcome.applied and outcome.error is not None]
    return f" (largest difference {max(errors):.1e})" if errors else ""


def _fact(name: str, told: str, style: str = "") -> Text:
    return Text.assemble((f"  {name:<10}", _DIM), (told, style))


def _table(head: Sequence[Column], rows: Sequence[Sequence[str | Text]], gap: int = 2) -> Table:
    """A table without lines; columns that say nothing in any row are left out."""
    said = [any(str(row[at]).strip() not in ("", NONE) for row in rows) for at in range(len(head))]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, gap, 0, 0))
    for (name, side), kept in zip(head, said, strict=True):
        if kept:
            table.add_column(name, justify=side, overflow="fold", no_wrap=side == "right")
    for row in rows:
        table.add_row(*(_text(cell) for cell, kept in zip(row, said, strict=True) if kept))
    return table


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _sum(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
    return sum(values) if len(values) == len(rows) else None


def _value(number: Any) -> Any:
    return number.get("value") if isinstance(number, Mapping) else number


def _count(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return ""
    for scale, unit in ((1e12, "T"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.1f}{unit}"
    return f"{value:.0f}"


def _share(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, (int, float)) else ""


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    if isinstance(data, float) and (data != data or abs(data) == float("inf")):
        return None
    return data
