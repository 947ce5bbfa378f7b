"""Look through a `.pt2` archive before `torch.export.load` opens it.

That loader trusts its file in more ways than one: weights, constants and sample inputs may be
pickles, which it opens in full; size expressions are evaluated by sympy and guards by Python; names
of nodes and inputs become source text; targets are looked up from `torch` downwards; tree specs may
import modules; compiled libraries in the archive are loaded. Each of these is checked here against
the forms that torch itself writes.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake import allow
from attnopt.compiler.intake.archive import read_entry
from attnopt.compiler.intake.checkpoint import scan_bytes
from attnopt.compiler.intake.export_text import harmless, strings, target_trouble
from attnopt.compiler.intake.scan import Scan, scan_pickle

_PICKLED = re.compile(r"\.(pt|pkl|pickle)$|(^|/)opaque_obj_")
_NATIVE = re.compile(r"(^|/)(data/aotinductor/.|custom_obj_)")


def scan_export(archive: zipfile.ZipFile, where: str, allow_globals: Sequence[str]) -> None:
    """Refuse a `.pt2` archive that could run code while it is loaded or called.

    Raises `Problem` A102 (names that are refused), A103 (damaged) or A104 (text that torch does not
    write).
    """
    pickled = Scan()
    refused: list[allow.Refused] = []
    listed: set[str] = set()
    for entry in archive.namelist():
        if _NATIVE.search(entry):
            refused.append(allow.Refused(f"<{entry}>", "compiled code or an object of such code"))
        if _is_description(entry):
            document = _document(read_entry(archive, entry, where), f"{where}:{entry}")
            refused += _unsafe(document, allow_globals, f"{where}:{entry}")
            listed |= set(_pickled_payloads(document))
    for entry in archive.namelist():
        if _PICKLED.search(entry) or entry.rsplit("/", 1)[-1] in listed:
            data = read_entry(archive, entry, where)
            pickled.update(_scan_payload(data, f"{where}:{entry}"))
    refused += allow.check(pickled, allow_globals, tensors_only=True)[1]
    if refused:
        raise allow.refusal(refused, where)


def _is_description(entry: str) -> bool:
    """Whether torch reads the entry as JSON; under models/ it does so whatever the suffix."""
    inside = entry.partition("/")[2]
    if inside.startswith("extra/"):
        return False
    return entry.endswith(".json") or inside.startswith("models/")


def mentions(archive: zipfile.ZipFile, text: str, where: str) -> bool:
    """Whether a description in the archive holds the text."""
    entries = [name for name in archive.namelist() if _is_description(name)]
    return any(text.encode() in read_entry(archive, name, where) for name in entries)


def _document(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Problem(
            "A103", "the description in the archive is damaged", where=where, why=str(error)
        ) from error


def _pickled_payloads(document: Any) -> Iterator[str]:
    """Last parts of the names of entries that the description declares as pickles."""
    config = document.get("config") if isinstance(document, dict) else None
    for payload in config.values() if isinstance(config, dict) else ():
        path = str(payload.get("path_name")) if isinstance(payload, dict) else ""
        if path.startswith("opaque_obj_") or (path and payload.get("use_pickle")):
            yield path.rsplit("/", 1)[-1]


def _scan_payload(data: bytes, where: str) -> Scan:
    """Names in one pickled entry: a torch file inside, or a bare pickle."""
    if not data:
        return Scan()
    try:
        return scan_bytes(data, where)
    except Problem as problem:
        if problem.code != "A106":
            raise
        return scan_pickle(data, where)


def _unsafe(document: Any, allow_globals: Sequence[str], where: str) -> list[allow.Refused]:
    """Targets that are refused; raises `Problem` A104 at text that torch does not write."""
    refused: dict[str, allow.Refused] = {}
    for key, text in strings(document, ""):
        if key in ("target", "as_operator") and text not in allow_globals:
            why = target_trouble(text)
            if why:
                refused[text] = allow.Refused(text, why)
        elif not harmless(key, text):
            raise Problem(
                "A104",
                f"refused to load the archive: {key} is {text[:120]!r}",
                where=where,
                why="torch would evaluate it, and torch.export.save does not write such text",
                help="export the model again, or open it with --trust if you trust its maker",
            )
    return list(refused.values())
