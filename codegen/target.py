"""`Target`: a device to plan a program for, as one TOML file of figures with their source.

The files of `codegen/targets/` are the known names; `--target path.toml` reads one's own.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from attnopt.compiler.errors import Problem

CPU = "cpu"
_FORMS = ("sxm", "pcie", "nvl")  # of modules, which differ in power, clocks and memory
_MEMORY = 0.15  # how far a driver's figure may be off the datasheet's, which counts in other units
_HOW = (
    "to add a device, copy one of the files of attnopt/codegen/targets, fill in its datasheet's "
    "figures and pass it as --target path/to/device.toml"
)


@dataclass(frozen=True)
class Target:
    """A device. Sizes in bytes, `bandwidth` in bytes/s, `peak` in dense operations/s by dtype name.

    `units` are streaming multiprocessors or compute units; `capability` is the compute capability
    ("9.0") or the architecture ("gfx942"). `achievable` holds shares of the peaks that good kernels
    reach, by "matmul", "attention" and "bandwidth", where its file gives any. The CPU has no
    figures: it is measured.
    """

    name: str
    title: str
    vendor: str
    architecture: str
    capability: str
    source: str
    note: str = ""
    units: int = 0
    shared_per_block: int = 0
    shared_per_unit: int = 0
    registers_per_unit: int = 0
    l2: int = 0
    memory: int = 0
    bandwidth: float = 0.0
    peak: Mapping[str, float] = field(default_factory=dict)
    achievable: Mapping[str, float] = field(default_factory=dict)
    achievable_source: str = ""

    @property
    def measured(self) -> bool:
        """Whether this device is the one at hand, timed rather than estimated."""
        return self.architecture == CPU


@lru_cache(maxsize=1)
def known() -> tuple[str, ...]:
    """The names of all known targets, sorted."""
    folder = files("attnopt.codegen.targets")
    return tuple(
        sorted(e.name.removesuffix(".toml") for e in folder.iterdir() if e.name.endswith(".toml"))
    )


def target(name: str) -> Target:
    """The target of a known name, or of a TOML file. Raises `Problem` A401 when there is none."""
    if name.endswith(".toml"):
        return _from_file(Path(name))
    plain = name.strip().lower()
    if plain not in known():
        near = get_close_matches(plain, known(), n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise Problem(
            "A401",
            f"unknown target `{name}`",
            why=f"known targets: {', '.join(known())}",
            help=meant + _HOW,
        )
    text = (files("attnopt.codegen.targets") / f"{plain}.toml").read_text(encoding="utf-8")
    return _read(plain, text, f"{plain}.toml")


def at_hand(device: int = 0) -> Target:
    """The GPU of this number: the known target whose title its name holds, with figures of its own
    where it is another form of it; else one with the figures that its driver tells, and no peaks.
    Raises `Problem` A401 without a GPU."""
    import torch  # reading a file of figures does not need it

    if not torch.cuda.is_available():
        raise Problem("A401", "there is no GPU here that torch can use", help=_HOW)
    facts = torch.cuda.get_device_properties(device)
    plain = facts.name.lower().replace("rtx ", "rtx")
    for name in known():
        if re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", plain):
            return _as_it_is(target(name), facts)
    amd = torch.version.hip is not None
    return Target(
        name=plain, title=facts.name, vendor="amd" if amd else "nvidia", architecture="unknown",
        capability=facts.gcnArchName.split(":")[0] if amd else f"{facts.major}.{facts.minor}",
        source="its driver", units=facts.multi_processor_count,
        shared_per_block=getattr(facts, "shared_memory_per_block_optin", 49152),
        shared_per_unit=getattr(facts, "shared_memory_per_multiprocessor", 65536),
        registers_per_unit=getattr(facts, "regs_per_multiprocessor", 65536),
        l2=getattr(facts, "L2_cache_size", 0), memory=facts.total_memory,
        bandwidth=_bandwidth(facts),
    )  # fmt: skip


def _as_it_is(like: Target, facts: Any) -> Target:
    """A known target as the driver has it: the same, with its L2 where the file tells none, where
    processors and memory are the same and the name tells of no other form (an H100 may be an SXM,
    PCIe or NVL module, or a slice of one); else with its own sizes, and peaks in proportion to its
    processors. The target's name stays, because tile sizes follow what all forms have alike."""
    units, memory = int(facts.multi_processor_count), int(facts.total_memory)
    forms = [
        form for form in _FORMS if re.search(rf"(?<![a-z]){form}(?![a-z])", facts.name.lower())
    ]
    other = any(form not in like.title.lower() for form in forms)
    same_memory = abs(memory / like.memory - 1) <= _MEMORY
    told_l2 = int(getattr(facts, "L2_cache_size", 0))
    if units == like.units and same_memory and not other:
        return like if like.l2 else replace(like, l2=told_l2)
    share = units / like.units
    told = _bandwidth(facts)
    return replace(
        like, title=facts.name, units=units, memory=memory,
        bandwidth=told or like.bandwidth * min(1.0, share),
        peak={name: value * share for name, value in like.peak.items()},
        l2=told_l2 or like.l2,
        source=f"its driver, and {like.source}",
        note=f"its peaks are those of {like.title} times {units} of {like.units} processors, "
        "whatever its clock; its bandwidth is "
        + ("its driver's" if told else f"no more than that of {like.title}"),
    )  # fmt: skip


def _bandwidth(facts: Any) -> float:
    """Bytes per second that the driver tells: two words for each clock of the memory; 0 where it
    tells none."""
    clock, width = getattr(facts, "memory_clock_rate", 0), getattr(facts, "memory_bus_width", 0)
    return 2.0 * float(clock) * 1e3 * float(width) / 8 if clock and width else 0.0


def _from_file(path: Path) -> Target:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(
            "A401", f"cannot read the target file {path}", why=str(error), help=_HOW
        ) from error
    return _read(path.stem.lower(), text, str(path))


def _read(name: str, text: str, where: str) -> Target:
    try:
        facts = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Problem("A401", "the target file is not TOML", where=where, why=str(error)) from error
    wrong = _wrong(facts)
    if wrong:
        raise Problem("A401", "the target file is not complete", where=where, why=wrong, help=_HOW)
    achievable = dict(facts.pop("achievable", {}))
    source = str(achievable.pop("source", ""))
    return Target(name=name, **facts, achievable=achievable, achievable_source=source)


_TEXTS = ("title", "vendor", "architecture", "capability", "source")
_DTYPES = frozenset(
    ["float64", "float32", "tf32", "bfloat16", "float16", "float8", "float4", "int8", "int4"]
)  # of peaks
_SHARES = frozenset({"matmul", "attention", "bandwidth"})
_CAPABILITY = {  # of each vendor, and an example
    "nvidia": (r"[1-9]\d*\.\d", "9.0"),
    "amd": (r"gfx9[0-9a-f]+", "gfx942, with waves of 64"),
}
_WHOLES = ("units", "shared_per_block", "shared_per_unit", "registers_per_unit", "memory")


def _wrong(facts: Mapping[str, Any]) -> str:
    """What a target file lacks or has too much of, in words; empty when it is complete."""
    allowed = {*_TEXTS, *_WHOLES, "note", "l2", "bandwidth", "peak", "achievable"}
    unknown = sorted(set(facts) - allowed)
    if unknown:
        return f"unknown keys: {', '.join(unknown)}"
    for key in _TEXTS:
        if not isinstance(facts.get(key), str) or not facts[key]:
            return f"`{key}` must be text"
    if facts["architecture"] == CPU:
        return ""
    pattern, example = _CAPABILITY.get(facts["vendor"], ("", ""))
    if not pattern:
        return f"`vendor` must be {' or '.join(_CAPABILITY)}, not {facts['vendor']}"
    if not re.fullmatch(pattern, facts["capability"]):
        return f"`capability` must be one like {example}, not {facts['capability']}"
    wholes = {**{key: facts.get(key) for key in _WHOLES}, "l2": facts.get("l2", 1)}
    bad = [key for key, value in wholes.items() if type(value) is not int or value <= 0]
    if bad:
        return f"`{bad[0]}` must be a positive whole number"
    if not isinstance(facts.get("note", ""), str):
        return "`note` must be text"
    return _wrong_table(facts, "peak", _DTYPES) or _wrong_table(facts, "achievable", _SHARES)


def _wrong_table(facts: Mapping[str, Any], name: str, known: frozenset[str]) -> str:
    """The same of one of its tables of figures."""
    figures = facts.get(name, {})
    if not isinstance(figures, dict):
        return f"`{name}` must be a table"
    figures = dict(figures)
    if name == "achievable":
        figures.pop("source", None)
    unknown = sorted(set(figures) - known)
    if unknown:
        return f"`{name}` has no {unknown[0]}: it is one of {', '.join(sorted(known))}"
    if name == "peak":
        figures["bandwidth"] = facts.get("bandwidth")
    bad = [key for key, value in figures.items() if not _positive(value)]
    if bad or (name == "peak" and len(figures) < 2):
        return f"`{bad[0] if bad else name}` must be a positive number"
    outside = [key for key, value in figures.items() if name == "achievable" and value > 1]
    return f"achievable `{outside[0]}` must be a share up to 1" if outside else ""


def _positive(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
