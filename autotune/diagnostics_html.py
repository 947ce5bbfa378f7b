"""The diagnostics as part of a page: heat maps, spectra, head similarity and sublayer influence,
each with a sentence on the rewrite that it speaks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attnopt.autotune import charts, curves
from attnopt.autotune import wording as say
from attnopt.autotune.diagnostic_figures import SHARE, Figure, figures
from attnopt.autotune.heat_grid import grid, matrix
from attnopt.autotune.markup import Markup, join, tag
from attnopt.compiler.diagnostics.diagnosis import Diagnosis, SiteDiagnosis

_MATRICES = {
    "maps": "attention maps of query heads (cosine)",
    "keys": "key heads, turned as the attention allows",
    "values": "value heads, turned as the attention allows",
}
_SPECTRA = {
    "qk": "Logits of a head (queries times keys of the data), mean over heads",
    "vo": "Output of a head (values of the data times the output projection), mean over heads",
    "kv": "[K, V] of all heads as a cache would hold them, keys before rotary",
}


def section(found: Diagnosis) -> Markup:
    """All of it as one section of a page."""
    title = tag("h2", "Diagnostics")
    if found.skipped:
        return tag("section", title, tag("p", f"Not measured: {found.skipped}.", class_="muted"))
    return tag(
        "section",
        title,
        tag("p", _lead(found), class_="muted"),
        join(_heat(figure, found) for figure in figures(found)),
        _similarity(found),
        _spectra(found),
        _influence(found),
        _missing(found),
    )


def outstanding(found: Diagnosis, name: str, said: Callable[[float], str]) -> str:
    """The sites with the least and the largest mean of a figure, in words."""
    means = [(mean, site.id) for site in found.sites if (mean := site.mean(name)) is not None]
    if len(means) < 2:
        return ""
    (low, first), (high, last) = min(means), max(means)
    return f"Least at {first} ({said(low)}), most at {last} ({said(high)}), means over heads."


def _lead(found: Diagnosis) -> str:
    seen = f"{found.sequences} sequences ({found.tokens} tokens) of calibration data"
    notes = "".join(f"; {note}" for note in found.notes)
    return (
        f"Measured on {seen} in {say.duration(found.seconds)}{notes}. Rows are attentions, columns "
        "heads; the darker, the larger. They say where a rewrite is worth a try, not what it costs."
    )


def _heat(figure: Figure, found: Diagnosis) -> Markup | None:
    rows = [(s.id, s.per_head[figure.name]) for s in found.sites if figure.name in s.per_head]
    if not rows:
        return None
    words = f"{figure.speaks} {outstanding(found, figure.name, figure.shade.said)}"
    return join([
        tag("h3", figure.heading),
        tag("p", words.strip(), class_="muted"),
        grid(rows, figure.heading, figure.shade),
    ])  # fmt: skip


def _similarity(found: Diagnosis) -> Markup | None:
    shown = [site for site in found.sites if site.similarity]
    if not shown:
        return None
    parts = [
        tag(
            "details",
            tag("summary", f"{site.id} {site.module}: {_alike(site)}"),
            *(
                join([tag("p", _MATRICES[name], class_="muted"),
                      matrix(values, f"{site.id}, {name}", SHARE)])
                for name, values in site.similarity.items()
            ),
            name_="similarity",
            open_="" if site is shown[0] else None,
        )
        for site in shown
    ]  # fmt: skip
    speaks = (
        "Open an attention to see which of its heads are alike. Of key and value heads near 1, "
        "merge_kv_heads keeps most (it joins neighbours); what the rest costs differs between "
        "attentions."
    )
    return join([tag("h3", "Similarity of heads"), tag("p", speaks, class_="muted"), *parts])


def _alike(site: SiteDiagnosis) -> str:
    return ", ".join(
        f"{name} {mean:.2f}"
        for name, values in site.similarity.items()
        if (mean := between(values)) is not None
    )


def between(values: Sequence[Sequence[float]]) -> float | None:
    """The mean similarity of two different heads; None for a single head."""
    count = len(values)
    if count < 2:
        return None
    total = sum(value for i, row in enumerate(values) for j, value in enumerate(row) if i != j)
    return total / (count * (count - 1))


def _spectra(found: Diagnosis) -> Markup | None:
    parts: list[Markup] = []
    for name, heading in _SPECTRA.items():
        lines = [(s.id, _mean_energy(s, name)) for s in found.sites if name in s.spectra]
        if lines:
            parts.append(tag("p", heading, class_="muted"))
            parts.append(curves.energy(lines, heading))
    if not parts:
        return None
    speaks = (
        "Energy held by the first singular values, one line per attention, later ones darker. A "
        "line that is steep at first speaks for fewer dims; a straight one has none to spare."
    )
    return join([tag("h3", "Spectra"), tag("p", speaks, class_="muted"), *parts])


def _mean_energy(site: SiteDiagnosis, name: str) -> list[float]:
    """Singular values whose energies are the means over the heads."""
    heads = site.spectra[name]
    told = [row for row in heads if any(row)] or list(heads)
    return [
        (sum(value * value for value in column) / len(told)) ** 0.5
        for column in zip(*told, strict=True)
    ]


def _influence(found: Diagnosis) -> Markup | None:
    bars = [
        charts.Bar(layer.id, value, value, value, f"{value:.4f}")
        for layer in found.sublayers
        if (value := layer.influence) is not None
    ]
    if not bars:
        return None
    speaks = (
        "1 − cos of the residual stream before and after. The shortest bars are what "
        "skip_sublayers may drop; the first and last sublayers are often long."
    )
    return join([
        tag("h3", "Influence of sublayers"),
        tag("p", speaks, class_="muted"),
        charts.bars(bars, "Block influence of each sublayer"),
    ])  # fmt: skip


def _missing(found: Diagnosis) -> Markup | None:
    told: dict[str, list[str]] = {}
    for site in found.sites:
        for name, why in site.missing.items():
            told.setdefault(f"{name}: {why}", []).append(site.id)
    for layer in found.sublayers:
        if layer.reason:
            told.setdefault(f"influence: {layer.reason}", []).append(layer.id)
    if not told:
        return None
    items = [tag("li", f"{why} ({say.targets(where)})") for why, where in told.items()]
    return join([tag("h3", "Not measured"), tag("ul", *items)])
