"""The contract of a pass: what it is given, what it may answer, how it is found.

A pass is a frozen dataclass in one file of `passes/`. Its fields are its options and, through their
metadata, its search space. Its one method maps a target (an attention site, a residual sublayer, or
the whole program) to an `Edit`, or says why not with a `Miss`. The file is the registration; third
parties use the entry-point group `attnopt.passes`.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from attnopt.compiler import text
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Batch, Program, peek
from attnopt.compiler.regions import PARTS, Part
from attnopt.compiler.site import Site, Sublayer
from attnopt.compiler.spec import AttentionSpec


class Exactness(Enum):
    """EXACT: the same function.

    GUARDED: the same under an assumption checked at run time. APPROXIMATE: another one.
    """

    EXACT = "exact"
    GUARDED = "guarded"
    APPROXIMATE = "approximate"


@dataclass(frozen=True)
class Miss:
    """Falsy: "not here, because ...".

    `at` names the guilty node of the graph.
    """

    reason: str
    at: str = ""
    help: str = ""

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Edit:
    """What a pass wants changed.

    Applied to a copy of the program by `pipeline`, in the order spec, weights, graph. `spec`
    replaces the site's spec text. `weights` maps parameter names to new tensors (same shape, or the
    graph edit adapts). `graph` edits the copy's graph in place (use `Program.call` and
    `Program.parameter`; the pipeline calls `clean`). `sites` replaces the recorded facts of sites
    by id. `note` is said in the report, `evidence` holds its numbers.
    """

    spec: AttentionSpec | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    graph: Callable[[Program], None] | None = None
    sites: Mapping[str, Site] = field(default_factory=dict)
    note: str = ""
    evidence: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return True


Target = Site | Sublayer | Program
Scope = Literal["site", "sublayer", "program"]


@dataclass(frozen=True)
class Notes:
    """What a pass may know beyond the graph.

    `original` is the raised program before any rewrite (the teacher). `calibration` are batches to
    fit on; `heldout` are batches for accept-or-revert decisions inside a pass, apart from both the
    calibration and the evaluation data. `target` is what it will run on ("cpu", or the name of a
    known GPU). Empty calibration means there is no real data: passes that need it miss. `training`
    are more batches of the same kind, for what trains (empty: it trains on `calibration`). `work`
    is a folder where a long pass may keep what it needs to go on after an interruption; it tells
    `progress` what it does, and how far it is (0 to 1). `healed` says that a later step of the plan
    trains what is made now.
    """

    original: Program
    calibration: Sequence[Batch] = ()
    heldout: Sequence[Batch] = ()
    target: str = "cpu"
    seed: int = 0
    training: Sequence[Batch] = ()
    work: Path | None = None
    progress: Callable[[str, float], None] | None = None
    healed: bool = False

    def record(
        self, program: Program, names: Sequence[str], batches: Sequence[Batch] | None = None
    ) -> Iterator[tuple[dict[str, Any], Batch]]:
        """Stream the named nodes' values over the calibration batches (or others), one batch at a
        time."""
        for batch in self.calibration if batches is None else batches:
            yield peek(program, names, batch), batch


class Pass(ABC):
    """One rewrite.

    Subclasses are frozen dataclasses.
    """

    name: ClassVar[str]
    exactness: ClassVar[Exactness]
    scope: ClassVar[Scope] = "site"
    source: ClassVar[str] = ""
    after: ClassVar[tuple[str, ...]] = ()
    valid_only: ClassVar[bool] = False  # padded positions may change; compare at real tokens only
    greedy: ClassVar[bool] = (
        False  # the search orders its targets by removing them one after the other
    )
    heals: ClassVar[bool] = False  # repairs what approximate passes before it did; run after them
    trains: ClassVar[bool] = False  # moves weights along gradients, so that new ones may start idle
    asked: ClassVar[bool] = False  # takes minutes: made where the user asks for it, not searched
    removes: ClassVar[tuple[Part, ...]] = PARTS  # parts of a site it can make cheaper, its ceiling

    @abstractmethod
    def rewrite(self, target: Any, program: Program, notes: Notes) -> Edit | Miss:
        """Map one target to an edit, or say why not.

        Must not change `program`.
        """

    def targets(self, program: Program) -> list[Any]:
        """The targets of this pass in a program, by its scope."""
        if self.scope == "program":
            return [program]
        return list(program.sites if self.scope == "site" else program.sublayers)

    @property
    def text(self) -> str:
        """The pass with its options as `name{key=value ...}`."""
        return text.dump(self)

    @classmethod
    def sketch(cls) -> Pass:
        """The pass that stands for it where only the order of its targets is wanted: its defaults,
        unless other options tell the same much faster."""
        return cls()

    @classmethod
    def caching(cls, program: Program, share: float) -> tuple[Pass, ...]:
        """The forms that may leave at most this share of the bytes that a decoder of the program
        caches, those that promise to lose least first; none where the cache stays what it is."""
        return ()

    @classmethod
    def space(cls) -> dict[str, tuple[Any, ...]]:
        """The search space: for each option declared by `choice`, its values."""
        fields = getattr(cls, "__dataclass_fields__", {})
        return {k: f.metadata["choices"] for k, f in fields.items() if "choices" in f.metadata}

    @classmethod
    def known(cls) -> dict[str, tuple[Any, ...]]:
        """For each option declared by `choice` or `option`, values that it may have."""
        fields = getattr(cls, "__dataclass_fields__", {})
        found = {k: f.metadata["values"] for k, f in fields.items() if "values" in f.metadata}
        return {**cls.space(), **found}


class Refused(Exception):
    """Raised by a graph edit that finds out too late that it cannot be done; the program stays as
    it was."""

    def __init__(self, miss: Miss) -> None:
        super().__init__(miss.reason)
        self.miss = miss


def choice(*values: Any, default: Any, **facts: Any) -> Any:
    """A dataclass field whose search space is `values`; `facts` go into its metadata."""
    if default not in values:
        raise ValueError(f"default {default!r} is not among {values!r}")
    return field(default=default, metadata={"choices": values, **facts})


def option(*values: Any, default: Any) -> Any:
    """A dataclass field that takes one of `values` and is not searched."""
    if default not in values:
        raise ValueError(f"default {default!r} is not among {values!r}")
    return field(default=default, metadata={"values": values})


@lru_cache(maxsize=1)
def passes() -> dict[str, type[Pass]]:
    """All passes by name: every module of `passes/`, and the entry points `attnopt.passes`."""
    package = importlib.import_module("attnopt.passes")
    found: dict[str, type[Pass]] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda item: item.name):
        module = importlib.import_module(f"attnopt.passes.{info.name}")
        for item in vars(module).values():
            if _is_pass(item) and item.__module__ == module.__name__:
                found[item.name] = item
    for entry in entry_points(group="attnopt.passes"):
        loaded = entry.load()
        found[loaded.name] = loaded
    return found


def read_pass(line: str) -> Pass:
    """A pass from its text, e.g. `sliding_window{left=1024 sink=4}`.

    Unknown names and options are `Problem`s.
    """
    call = text.parse(line)
    known = passes()
    if call.name not in known:
        raise Problem(
            "A303", f"unknown pass `{call.name}`", help=f"known passes: {', '.join(sorted(known))}"
        )
    cls = known[call.name]
    made = text.build(cls, call.values, call.name)
    for key, values in cls.known().items():
        value = getattr(made, key)
        named = isinstance(value, str) and value not in values
        if named or type(value) not in {type(known) for known in values}:
            raise Problem(
                "A303",
                f"option `{key}` of `{call.name}` cannot be {value!r}",
                help=f"for example {', '.join(map(str, values))}",
            )
    return made


def _is_pass(item: Any) -> bool:
    return (
        isinstance(item, type)
        and issubclass(item, Pass)
        and item is not Pass
        and "name" in vars(item)
    )
