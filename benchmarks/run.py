"""`make bench`: measures what the README states, prints a table and writes it as JSON with device,
versions and date; `cpu.md` beside it is the report of all sections measured so far.

python benchmarks/run.py [--only SECTION,SECTION] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from attnopt.autotune.environment import environment

ROOT = Path(__file__).parent
SECTIONS = (
    "padded", "full", "pylm", "healing", "eager", "large", "backend", "onnx_export", "scale",
    "decode", "one_token", "one_token_avx2", "prompt", "speculate", "kv", "kv_steps",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One figure: what was measured, the value in words, and the numbers behind it."""

    case: str
    figure: str
    bar: str = ""
    met: bool | None = None
    numbers: dict[str, Any] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen sections; the exit code is 1 when a bar was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    chosen = parser.parse_args(arguments)
    names = chosen.only.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown sections {unknown}; known: {', '.join(SECTIONS)}")
    sys.path.insert(0, str(ROOT.parent))
    missed = False
    for name in names:
        rows: list[Row] = importlib.import_module(f"benchmarks.{name}").rows()
        _print(name, rows)
        _write(chosen.out, name, rows)
        (chosen.out / "cpu.md").write_text(report(chosen.out), encoding="utf-8")
        missed |= any(row.met is False for row in rows)
    return int(missed)


def _print(name: str, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "measured", "bar", "met", title=name)
    for row in rows:
        met = {True: "yes", False: "NO", None: ""}[row.met]
        table.add_row(row.case, row.figure, row.bar, met)
    Console().print(table)


def _write(folder: Path, name: str, rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = environment()
    document = {
        "section": name,
        "date": date.today().isoformat(),
        "environment": facts,
        "rows": [asdict(r) for r in rows],
    }
    path = folder / f"cpu-{name}.json"
    path.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")


def report(folder: Path) -> str:
    """All sections that were measured, as Markdown."""
    parts = ["# What was measured", "Written by `make bench`; the figures behind it lie beside it."]
    for name in SECTIONS:
        path = folder / f"cpu-{name}.json"
        if not path.is_file():
            continue
        section = json.loads(path.read_text(encoding="utf-8"))
        facts = section["environment"]
        parts.append(
            f"## {name}\n\n{section['date']}, {facts['cpu']}, {facts['threads']} threads, "
            f"Python {facts['python']}, torch {facts['torch']}"
        )
        lines = ["| case | measured | bar | met |", "|---|---|---|---|"]
        for row in section["rows"]:
            met = {True: "yes", False: "no", None: ""}[row["met"]]
            lines.append(f"| {row['case']} | {row['figure']} | {row['bar']} | {met} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
