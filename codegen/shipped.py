"""Tile sizes that were found good for a target, as committed files: `codegen/tuned/<target>.json`.

Each entry says for which kernel, spec and sizes, and how it was obtained: timed on the device
("measured"), or without one ("estimated"). Without a device the default stays what is launched,
unless it does not fit the target: a static score is no speed. Then the best score of what fits is
taken; elsewhere the entry is a record of the default, with what it takes of the target, and is not
`taken`: a kernel's default follows the sizes at hand, and an entry would hold those of an example.
`python -m attnopt.autotune.kernels --target NAME --write` writes them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any

from attnopt.codegen.kernel import Kernel, Load
from attnopt.codegen.target import Target
from attnopt.compiler import text
from attnopt.compiler.errors import Problem

FORMAT = 1
SIZES = ("batch", "queries", "keys")
EVIDENCE = ("measured", "estimated")
_FAR = 3  # doublings of one size, beyond which an entry says nothing about other sizes
_FEW = 256  # queries, below which the rows of a tile follow their number
_ALIKE = ("scale", "backend", "heads", "kv_heads")  # fields of specs that tile sizes do not follow


@dataclass(frozen=True)
class Entry:
    """One entry: `tiles` of a kernel by field, for a spec (as text) at sizes.

    `why` says in words why they are taken, `obtained` with which versions and device, and when.
    What is not `taken` is a record: dispatch goes by the kernel's default.
    """

    kernel: str
    tiles: Mapping[str, Any]
    spec: str
    kind: str
    load: Load
    evidence: str
    why: str
    obtained: Mapping[str, Any] = field(default_factory=dict)
    taken: bool = True

    def as_json(self) -> dict[str, Any]:
        """The entry as a JSON object."""
        return dataclasses.asdict(self)


def chosen(
    cls: type[Kernel[Any]], spec: Any, target: Target, load: Load, device: str = ""
) -> Kernel[Any]:
    """The tile sizes to take: those of the entry for this bucket of sizes, else of the nearest that
    is not far, else the kernel's default. What was tuned on this very `device`, where its name is
    given, goes before what ships (`attnopt.codegen.own_tiles`).

    An entry holds for all specs that differ from its own in scale and number of heads alone (heads
    per key/value head being equal), in one dtype.
    """
    default = cls.default(spec, target, load)
    found = None
    if device:
        from attnopt.codegen.own_tiles import own_entries  # it builds on this module

        found = nearest(own_entries(cls, target, device), cls.name, kind(spec), load)
    if found is None:
        found = nearest(entries(target.name), cls.name, kind(spec), load)
    return default if found is None else dataclasses.replace(default, **found.tiles)


def nearest(known: tuple[Entry, ...], name: str, spec_kind: str, load: Load) -> Entry | None:
    """The entry to take for a kernel and a kind of spec whose sizes are nearest; of two as near,
    the one that was measured."""
    ranked = [
        (far, EVIDENCE.index(entry.evidence), at)
        for at, entry in enumerate(known)
        if entry.taken
        and (entry.kernel, entry.kind, entry.load.dtype) == (name, spec_kind, load.dtype)
        and (far := _distance(entry.load, load)) is not None
    ]
    return known[min(ranked)[2]] if ranked else None


def bucket(load: Load) -> Load:
    """The smallest sizes of the load's bucket: sizes between two powers of two share one."""
    batch, queries, keys = (1 << _power(getattr(load, key)) for key in SIZES)
    return Load(batch, queries, keys, load.dtype)


def kind(spec: Any) -> str:
    """What of a spec tile sizes follow, as text."""
    if not dataclasses.is_dataclass(spec) or isinstance(spec, type):
        return repr(spec)
    alike = _ALIKE if hasattr(spec, "kv_heads") else _ALIKE[:2]  # else heads are rows of a tile
    facts = {key: value for key, value in text.changed(spec).items() if key not in alike}
    if hasattr(spec, "heads") and hasattr(spec, "kv_heads"):
        facts["group"] = spec.heads // spec.kv_heads
    inner = " ".join(
        f"{key}={kind(value) if hasattr(value, 'kv_heads') else text.dump_value(value)}"
        for key, value in facts.items()
    )
    return f"{getattr(spec, 'name', type(spec).__name__)}{{{inner}}}"


@lru_cache(maxsize=64)
def entries(target: str) -> tuple[Entry, ...]:
    """The committed entries of a target, none where there is no file. Raises `Problem` A837 on a
    file that is not in order."""
    file = files("attnopt.codegen.tuned") / f"{target}.json"
    return read(file.read_text(encoding="utf-8"), file.name) if file.is_file() else ()


def read(content: str, where: str) -> tuple[Entry, ...]:
    """The entries of a file's text. Raises `Problem` A837 on one that is not in order."""
    try:
        facts = json.loads(content)
        if facts["format"] != FORMAT:
            raise ValueError(f"its format is {facts['format']}, not {FORMAT}")
        found = tuple(Entry(**{**e, "load": Load(**e["load"])}) for e in facts["entries"])
    except (ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
        raise Problem(
            "A837", "a file of tile sizes is not in order", where=where, why=why
        ) from error
    odd = [entry.evidence for entry in found if entry.evidence not in EVIDENCE]
    if odd:
        why = f"evidence is {' or '.join(EVIDENCE)}, not {odd[0]!r}"
        raise Problem("A837", "a file of tile sizes is not in order", where=where, why=why)
    return found


def written(target: str, kept: tuple[Entry, ...]) -> str:
    """The text of a target's file, an entry in a line."""
    ordered = sorted(kept, key=lambda e: (e.kernel, e.kind, dataclasses.astuple(e.load)))
    lines = ",\n".join(json.dumps(entry.as_json()) for entry in ordered)
    return f'{{"format": {FORMAT}, "target": {json.dumps(target)}, "entries": [\n{lines}\n]}}\n'


def _distance(a: Load, b: Load) -> int | None:
    """Doublings between two sizes, over all of them; None where one is too far."""
    apart = {key: abs(_power(getattr(a, key)) - _power(getattr(b, key))) for key in SIZES}
    if max(apart.values()) > _FAR or (apart["queries"] and min(a.queries, b.queries) < _FEW):
        return None
    return sum(apart.values())


def _power(size: int) -> int:
    return max(1, size).bit_length() - 1
