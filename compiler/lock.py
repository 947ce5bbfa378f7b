"""`attnopt.lock`: what was understood of a model's attentions, to be held against a later reading.

A lock names every attention by its module's path, with the facts that rewrites go by and a hash of
them. It holds no node names that decide anything, no line numbers, no paths and no weights, so the
same model gives the same lock on another machine and after more training. What an upgrade of torch
or of a model library loses is then told by name: the pattern matchers of others have gone blind on
a rename, and nobody noticed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import attnopt
from attnopt.compiler.errors import Problem
from attnopt.compiler.inspect import Inspection
from attnopt.compiler.program import Program

FORMAT = 1
OPTIONS = ("attention", "dtype", "batch", "length")  # of reading a model; they decide what is read
FACTS = (
    "heads", "kv_heads", "head_dim", "v_dim", "scale", "mask", "mask_certainty", "position",
    "qk_norm", "spelling", "exactness",
)  # fmt: skip
_ALWAYS = ("torch",)
_DIGITS = 5  # of a scale: probing it adds noise behind the seventh


@dataclass(frozen=True)
class Locked:
    """One attention of a lock. `facts` are empty for one that was not understood; `missing` says
    why, per fact that was not found, and `reason` why it was left alone."""

    module: str
    raised: bool
    facts: Mapping[str, Any] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def fingerprint(self) -> str:
        """A hash of what decides which rewrites there are: the facts, and which are missing."""
        decides = [self.raised, dict(self.facts), sorted(self.missing)]
        text = json.dumps(decides, sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def as_json(self) -> dict[str, Any]:
        """The attention as a JSON object."""
        told = {"module": self.module, "raised": self.raised, "fingerprint": self.fingerprint}
        if not self.raised:
            return {**told, "reason": self.reason}
        return {**told, "facts": dict(self.facts), "missing": dict(self.missing)}


@dataclass(frozen=True)
class Lock:
    """What was understood of a model: its attentions in order, the options it was read with, and
    the versions of what it ran on."""

    model: Mapping[str, Any]
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    sites: tuple[Locked, ...]

    @property
    def text(self) -> str:
        """The lock as the text of its file; `read_lock` reads it back."""
        document = {
            "format": FORMAT, "model": dict(self.model), "options": dict(self.options),
            "versions": dict(self.versions), "sites": [site.as_json() for site in self.sites],
        }  # fmt: skip
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def lock(found: Inspection, options: Mapping[str, Any]) -> Lock:
    """The lock of an inspection that was made with these options."""
    model = {"name": found.program.name, "inputs": found.inputs, "parameters": found.parameters}
    read = {name: options.get(name) for name in OPTIONS}
    return Lock(model, read, dict(_versions(found.program)), tuple(map(_locked, found.sites)))


def _locked(row: Mapping[str, Any]) -> Locked:
    if not row["raised"]:
        return Locked(row["module"], False, reason=row["reason"])
    facts = {name: row[name] for name in FACTS}
    facts["scale"] = float(f"{row['scale']:.{_DIGITS}g}")
    return Locked(row["module"], True, facts, dict(row["missing"]))


def _versions(program: Program) -> Iterator[tuple[str, str]]:
    """The libraries that the model's modules come from, with torch, Python and attnopt."""
    yield "attnopt", attnopt.__version__
    yield "python", platform.python_version()
    used = set(_ALWAYS)
    for node in program.graph.nodes:
        for _, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = kind if isinstance(kind, str) else kind.__module__
            used.add(name.partition(".")[0])
    for name in sorted(used):
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # the user's own module, or one that goes under another name


def read_lock(path: Path) -> Lock:
    """A lock from its file. Raises `Problem` A516 for one that is not there or damaged."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise _damaged(path, "its brackets nest too deeply") from error
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise _damaged(path, said) from error
    if not isinstance(told, dict) or "format" not in told:
        raise _damaged(path, "it is no lock of attnopt")
    if told["format"] != FORMAT:
        raise _damaged(path, f"its format {told['format']!r} is not known, {FORMAT} is")
    try:
        sites = tuple(_read(site) for site in told["sites"])
        read = Lock(dict(told["model"]), _options(told["options"]), dict(told["versions"]), sites)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
        raise _damaged(path, said) from error
    for site, as_told in zip(read.sites, told["sites"], strict=True):
        if as_told["fingerprint"] != site.fingerprint:
            raise _damaged(path, f"the fingerprint of {site.module} is not that of its facts")
    return read


def _options(told: Mapping[str, Any]) -> dict[str, Any]:
    for name in OPTIONS:
        kind = str if name in ("attention", "dtype") else int
        if told[name] is not None and not isinstance(told[name], kind):
            raise ValueError(f"the option `{name}` is of another kind")
    return {name: told[name] for name in OPTIONS}


def _read(told: Mapping[str, Any]) -> Locked:
    module, raised, _ = told["module"], told["raised"], told["fingerprint"]
    if not isinstance(module, str) or not isinstance(raised, bool):
        raise ValueError("a site's `module` or `raised` is of another kind")
    if not raised:
        return Locked(module, False, reason=str(told["reason"]))
    facts, missing = dict(told["facts"]), dict(told["missing"])
    lacking = [name for name in FACTS if name not in facts]
    if lacking:
        raise ValueError(f"{module} has no `{lacking[0]}`")
    return Locked(module, True, facts, missing)


def _damaged(path: Path, why: str) -> Problem:
    return Problem(
        "A516", "cannot read the lock", where=str(path), why=why,
        help=f"write it again: attnopt inspect MODEL --lock {path}",
    )  # fmt: skip
