"""The diagnostics of one model as a page of their own: no scripts, no network."""

from __future__ import annotations

from attnopt.autotune.diagnostics_html import section
from attnopt.autotune.markup import tag
from attnopt.autotune.report_html import document
from attnopt.compiler.diagnostics.diagnosis import Diagnosis


def page(model: str, found: Diagnosis) -> str:
    """The page that `attnopt inspect --html` writes."""
    head = [
        tag("h1", f"Diagnostics of {model}"),
        tag("p", f"{len(found.sites)} attentions, {len(found.sublayers)} sublayers", class_="lead"),
    ]
    return document(f"Diagnostics of {model}", [*head, section(found)])
