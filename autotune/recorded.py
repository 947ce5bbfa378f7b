"""The defaults of kernels as entries of `codegen/tuned/`: what was compiled, and that nothing ran.

An entry of a default that fits its target is a record of what ships and how it was looked at, and
no choice: dispatch asks the kernel for its default as ever, at the sizes at hand. A static score is
no reason to take anything else, because it is no speed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from attnopt.autotune.environment import environment
from attnopt.autotune.kernel_tuner import spec_text, tiles_of
from attnopt.codegen.kernel import kernels
from attnopt.codegen.own_tiles import source_digest, versions
from attnopt.codegen.shipped import Entry, kind
from attnopt.codegen.table import Row, load_on
from attnopt.codegen.target import target

COMMAND = "python -m attnopt.autotune.kernels --target all --rows docs/kernels.json --write"
TABLE = "python -m attnopt.codegen.table --out docs/kernels.md"
WHY = "the default: compiled ahead of time, it fits the target and spills nothing; nothing timed"
_TAKEN = ("registers", "spills", "shared")


def recorded(rows: Iterable[Row]) -> list[Entry]:
    """An entry for each row whose kernel runs on its target and fits it."""
    made_with: dict[str, Any] = {"date": str(environment()["date"]), **versions()}
    found = []
    for row in rows:
        if row.why_not or row.bad:
            continue
        cls, on = kernels()[row.kernel], target(row.target)
        spec, load = cls.examples()[row.example]
        load = load_on(load, on)
        obtained = {
            "command": COMMAND, **made_with, "source": _source(row.kernel),
            "took": [{key: getattr(part, key) for key in _TAKEN} for part in row.parts],
        }  # fmt: skip
        tiles = tiles_of(cls.default(spec, on, load))
        entry = Entry(row.kernel, tiles, spec_text(spec), kind(spec), load, "estimated", WHY)
        found.append(replace(entry, obtained=obtained, taken=False))
    return found


def stale(entry: Entry, on: str) -> str:
    """Why the record of a default is not that of the kernel as it is, empty where it is."""
    cls = kernels().get(entry.kernel)
    if cls is None:
        return f"there is no kernel {entry.kernel}"
    specs = {spec_text(spec): spec for spec, _ in cls.examples()}
    if entry.spec not in specs:
        return "it is of none of the kernel's examples"
    if entry.obtained.get("source") != _source(entry.kernel):
        return "the kernel is another text"
    default = tiles_of(cls.default(specs[entry.spec], target(on), entry.load))
    return "" if dict(entry.tiles) == default else f"the default is {default}"


@lru_cache(maxsize=64)
def _source(kernel: str) -> str:
    """The digest of the kernel's text, which takes a moment to link."""
    return source_digest(kernels()[kernel])[:16]


def undated(entry: Entry) -> Entry:
    """The entry without its date: what a call on another day would write again."""
    return replace(entry, obtained={k: v for k, v in entry.obtained.items() if k != "date"})
