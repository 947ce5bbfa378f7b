"""Drawing of `inspect --why`: diagnostics in the manner of rustc, at the lines of the user's
source, then the facts and what each rewrite says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.text import Text

from attnopt.cli.draw import console

if TYPE_CHECKING:
    from attnopt.compiler.excerpt import Excerpt
    from attnopt.compiler.plan import Outcome
    from attnopt.compiler.why import Diagnostic, Explanation

_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold green"}
_FRAME, _DIM = "bold blue", "dim"
_TAB = 4


def explanation(told: Explanation) -> None:
    """All of it on stdout."""
    target = console()
    for diagnostic in told.diagnostics:
        target.print(_diagnostic(diagnostic), soft_wrap=True)
        target.print()
    if told.row.get("raised"):
        target.print(_facts(told.row), soft_wrap=True)
        target.print(_passes(told.passes), soft_wrap=True)


def _diagnostic(told: Diagnostic) -> Text:
    style = _STYLES[told.severity]
    label = f"{told.severity}[{told.code}]" if told.code else told.severity
    text = Text.assemble((label, style), (f": {told.what}", "bold"))
    width = 3
    if told.excerpt is not None:
        width = max(width, len(str(told.excerpt.numbered[-1][0])) + 1)
        _excerpt(text, told.excerpt, width, style)
    elif told.node:
        text.append("\n" + " " * (width - 1) + "--> ", _FRAME)
        text.append(f"node `{told.node}`; the trace does not say which line made it")
    for kind, lines in (("note", told.notes), ("help", (told.help,) if told.help else ())):
        for line in lines:
            text.append("\n" + " " * width + "= ", _FRAME)
            text.append(f"{kind}: ", "bold")
            text.append(line)
    return text


def _excerpt(text: Text, shown: Excerpt, width: int, style: str) -> None:
    """The arrow, the lines with their numbers, and the carets under what is meant."""
    bar = "\n" + " " * width + "|"
    text.append("\n" + " " * (width - 1) + "--> ", _FRAME)
    text.append(shown.where)
    text.append(bar, _FRAME)
    for number, line in shown.numbered:
        text.append(f"\n{number:>{width - 1}} |", _FRAME)
        text.append(f" {line}".expandtabs(_TAB).rstrip())
        if number == shown.line:
            before = cell_len(f" {line[: shown.start]}".expandtabs(_TAB))
            meant = cell_len(f" {line[: shown.end]}".expandtabs(_TAB)) - before
            text.append(bar, _FRAME)
            text.append(" " * before + "^" * max(1, meant), style)
    text.append(bar, _FRAME)


def _facts(row: Mapping[str, Any]) -> Text:
    """What is known of a site, on one line per fact."""
    scale = row.get("scale")
    facts = (
        ("heads", f"{row['heads']} of queries, {row['kv_heads']} of keys and values"),
        ("head_dim", f"{row['head_dim']}, values {row['v_dim']}"),
        ("scale", f"{scale:.6g}" if isinstance(scale, (int, float)) else ""),
        ("mask", f"{row['mask']} ({row['mask_certainty']})"),
        ("position", str(row["position"])),
        ("spec", str(row["spec"])),
        ("spelling", f"{row['spelling']}{', norms on q and k' if row['qk_norm'] else ''}"),
    )
    lines = [Text.assemble((f"  {name:<10}", _DIM), said) for name, said in facts if said]
    return Text("\n").join(lines)


def _passes(done: Sequence[Outcome]) -> Text:
    """What each pass says, exact ones first."""
    names = [outcome.rewrite.partition("{")[0] for outcome in done]
    width = max(map(len, names), default=0)
    text = Text("\nrewrites, each with its defaults", "bold")
    rows = sorted(zip(names, done, strict=True), key=lambda row: row[1].exactness == "approximate")
    for name, outcome in rows:
        mark = ("applies", "green") if outcome.applied else ("does not apply", "yellow")
        text.append(f"\n  {name:<{width}}  {outcome.exactness:<11}  ")
        text.append(f"{mark[0]:<14}", mark[1])
        said = outcome.note if outcome.applied else outcome.reason
        helped = f"; {outcome.help}" if outcome.help and not outcome.applied else ""
        text.append(f"  {said}{helped}")
    return text
