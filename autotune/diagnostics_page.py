"""The diagnostics of one model as a page of their own: no scripts, no network."""

from __future__ import annotations

from pathlib import Path

from attnopt.autotune.diagnostics_html import section
from attnopt.autotune.markup import tag
from attnopt.autotune.report_html import document
from attnopt.compiler.diagnostics.diagnosis import Diagnosis
from attnopt.compiler.errors import Problem


def page(model: str, found: Diagnosis) -> str:
    """The page that `attnopt inspect --html` writes."""
    head = [
        tag("h1", f"Diagnostics of {model}"),
        tag("p", f"{len(found.sites)} attentions, {len(found.sublayers)} sublayers", class_="lead"),
    ]
    return document(f"Diagnostics of {model}", [*head, section(found)])


def write(path: Path, model: str, found: Diagnosis) -> None:
    """Write the page. Raises `Problem` A416 where the file cannot be written."""
    try:
        path.write_text(page(model, found), encoding="utf-8")
    except OSError as error:
        raise Problem(
            "A416", "the page cannot be written", where=str(path), why=error.strerror or str(error)
        ) from error
