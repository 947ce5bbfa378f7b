"""The diagnostics on a terminal: one row per attention, then one per sublayer."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from attnopt.autotune.diagnostics_html import between
from attnopt.autotune.wording import duration
from attnopt.cli.draw import NONE, console
from attnopt.compiler.diagnostics.diagnosis import Diagnosis, SiteDiagnosis, SublayerDiagnosis

_WIDE = 130  # columns; below it an attention is told by its id alone


def diagnosis(found: Diagnosis) -> None:
    """Means over the heads of each attention; of copying the best head."""
    target = console()
    near = [f"moved {width}" for width in found.widths]
    head = ("diagnosed", "entropy", f"first {found.sink}", *near, "copies", "QK rank", "VO rank",
            "KV rank", "maps", "keys", "values")  # fmt: skip
    target.print()
    target.print(
        _table(head, [_site(site, found.widths, target.width >= _WIDE) for site in found.sites])
    )
    layers = [_layer(layer) for layer in found.sublayers]
    if layers:
        target.print(_table(("sublayer", "influence", ""), layers))
    seen = f"{found.tokens} tokens in {found.sequences} sequences, {duration(found.seconds)}"
    for line in (f"measured on {seen}", *found.notes, *_missing(found)):
        target.print(Text(f"  {line}", "dim"))


def _site(site: SiteDiagnosis, widths: tuple[int, ...], wide: bool) -> tuple[str, ...]:
    copies = site.per_head.get("retrieval")
    return (
        f"{site.id} {site.module}".strip() if wide else site.id,
        _share(site.mean("entropy_share")),
        _share(site.mean("sink")),
        *(_share(site.whole.get(f"moved_{width}")) for width in widths),
        _share(max(copies)) if copies else NONE,
        _rank(site.mean("qk_rank"), site.head_dim),
        _rank(site.mean("vo_rank"), site.head_dim),
        _rank(site.whole.get("kv_rank"), site.whole.get("kv_columns")),
        *(_share(between(site.similarity.get(name, ()))) for name in ("maps", "keys", "values")),
    )


def _layer(layer: SublayerDiagnosis) -> tuple[str, ...]:
    value = NONE if layer.influence is None else f"{layer.influence:.4f}"
    return layer.id, value, layer.reason


def _missing(found: Diagnosis) -> list[str]:
    """What could not be measured, once per reason."""
    told: dict[str, list[str]] = {}
    for site in found.sites:
        for name, why in site.missing.items():
            told.setdefault(f"{name} not measured: {why}", []).append(site.id)
    return [f"{why} ({', '.join(where)})" for why, where in told.items()]


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _rank(value: float | None, most: float | None) -> str:
    return NONE if value is None else f"{value:.1f}/{most or 0:.0f}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for at, name in enumerate(head):
        table.add_column(name, justify="left" if at == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
