"""How good a compiled kernel looks before it has run: a heuristic, not an estimate of its speed.

It serves one end: of hundreds of tile sizes it names the dozen that are worth timing. The score is
the share of the target's roofline that would be left if nothing but the following counted, each of
them read off the launch and the compiled code:

- the share of the loop's time in which matrix units work, against all issue slots of its other
  instructions. Resident warps hide one warp's other work behind another's products, and what a
  pipeline of loads does not hide of the memory's latency is waited for;
- products that warps repeat, or that tiles compute in vain (`Kernel.waste`);
- bytes in flight against what bandwidth times latency asks for (Little's law);
- the last wave of programs, which leaves units idle; and spilled registers.

The cycles that matrix units take are worked out from the target's peaks at a nominal clock, latency
is a round figure, and caches, banks and barriers do not exist here. Two scores rank tile sizes of
one kernel at one size; a ratio of scores says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from attnopt.codegen.instructions import Loop, hot_loop
from attnopt.codegen.kernel import Kernel, Load
from attnopt.codegen.target import Target

if TYPE_CHECKING:  # it needs triton, which only compiling does
    from attnopt.codegen.aot import Resources

_CLOCK = 1.9e9  # nominal; the products per cycle that follow from it are rounded to a power of two
_LATENCY = 800e-9  # seconds from asking the memory to having the bytes
_L2_CYCLES = 500  # the same of a line in the second-level cache, where tiles are read again
_SCHEDULERS = 4  # of a unit: each issues one instruction of one warp per cycle
_GRANULE = 8  # registers of a thread are given out in steps of this
_WARPS = {"7.5": 32, "8.0": 64, "9.0": 64, "10.0": 64}  # at most on a unit; else 48, AMD 32
_BLOCKS = {"7.5": 16, "8.9": 24}  # at most on a unit; else 32
_LANES = {"nvidia": 32, "amd": 64}
_SPECIAL_CYCLES = {"nvidia": 8, "amd": 16}  # an exponential of all lanes
_VECTOR_CYCLES = {"nvidia": 1, "amd": 4}  # any other instruction of all lanes
_GRID = 65535  # blocks along the second and third axis


@dataclass(frozen=True)
class Static:
    """One compiled launch: its grid and pipeline stages, what it takes, and its loop."""

    grid: tuple[int, ...]
    stages: int
    resources: Resources
    loop: Loop = field(default_factory=Loop)

    @property
    def programs(self) -> int:
        """Blocks in all."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class Score:
    """The score, from 0 to 1, and the shares that it is made of."""

    value: float
    matrix: float
    in_flight: float
    tail: float
    occupancy: float
    evidence: str = "estimated"

    def as_json(self) -> dict[str, Any]:
        """The score as a JSON object."""
        return asdict(self)


def statics(kernel: Kernel[Any], spec: Any, load: Load, target: Target) -> list[Static]:
    """Compile what the kernel launches at these sizes, and read it. Takes seconds for each launch.

    Raises `Problem` A803 for the CPU, A804 in triton's interpreter and A805 where triton cannot
    compile; and what the launcher raises where it cannot be launched so.
    """
    from attnopt.codegen.aot import compiled, launches, resources

    found = []
    for launch in launches(kernel, spec, load):
        made = compiled(launch, target)
        took = resources(made, target)
        bad = took.shared > target.shared_per_block or took.spills
        loop = Loop() if bad else hot_loop(made)
        found.append(Static(launch.grid, made.metadata.num_stages, took, loop))
    return found


def misfit(found: Sequence[Static], target: Target) -> str:
    """Why the compiled launches are not worth timing on the target, empty where they are."""
    for static in found:
        took = static.resources
        if took.shared > target.shared_per_block:
            return "exceeds the target's shared memory"
        if took.spills:
            return "spills registers"
        if not resident(static, target):
            return "exceeds the target's registers"
        if target.vendor == "nvidia" and max(static.grid[1:], default=0) > _GRID:
            return "exceeds the target's grid"
    return ""


def score(
    found: Sequence[Static], kernel: Kernel[Any], spec: Any, load: Load, target: Target
) -> Score:
    """The score of a kernel whose launches all fit the target (see the module's docstring). Where
    it launches several, the one with the most work in its loops stands for all."""
    main = max(found, key=lambda s: s.programs * s.resources.warps * (s.loop.multiply_adds + 1))
    work = type(kernel).work(spec, load)
    multiplies = main.loop.multiply_adds > 0
    peak = target.peak.get(load.dtype if multiplies else "float32") or max(target.peak.values())
    arithmetic, memory = work.flops / peak, work.bytes / target.bandwidth
    matrix, flight = max(matrix_share(main, target), 1e-3), max(in_flight(main, target), 1e-3)
    tail = _tail(main, target)
    lost = max(arithmetic * kernel.waste(spec, load) / matrix, memory / flight)
    value = max(arithmetic, memory) / lost * tail if lost else 0.0
    return Score(value, matrix, flight, tail, occupancy(main, target))


def resident(static: Static, target: Target) -> int:
    """How many blocks of the launch a unit holds at once; 0 where not one fits."""
    took = static.resources
    lanes = _LANES[target.vendor]
    registers = math.ceil(max(took.registers, 1) / _GRANULE) * _GRANULE * lanes * took.warps
    shared = took.shared + target.shared_per_unit - target.shared_per_block  # what the system takes
    return min(
        target.registers_per_unit // registers,
        target.shared_per_unit // shared if shared else _BLOCKS.get(target.capability, 32),
        _most_warps(target) // took.warps,
        _BLOCKS.get(target.capability, 32),
    )


def occupancy(static: Static, target: Target) -> float:
    """The share of a unit's places for warps that are taken, 0 to 1."""
    return resident(static, target) * static.resources.warps / _most_warps(target)


def matrix_share(static: Static, target: Target) -> float:
    """The share of the loop's time in which a scheduler's matrix unit does useful products, 0 to 1;
    without matrix products, the share of multiply-adds among its cycles; 1 without either."""
    loop, vendor = static.loop, target.vendor
    if not loop.matrix and not loop.fma:
        return 1.0
    warps = max(1.0, resident(static, target) * static.resources.warps / _SCHEDULERS)
    products = sum(done / _per_cycle(kind, target) for kind, done in loop.matrix.items())
    other = loop.plain + loop.vector * (_VECTOR_CYCLES[vendor] - 1)
    special = loop.special * _SPECIAL_CYCLES[vendor]
    if vendor == "amd":  # the same units run them
        other += special - loop.special * _VECTOR_CYCLES[vendor]
    other = max(other, special)
    useful = products * loop.useful if products else loop.fma * _VECTOR_CYCLES[vendor]
    longer, shorter = max(products, other), min(products, other)
    if static.resources.serialized:  # products are waited for
        longer, shorter = longer + shorter, 0.0
    waits = max(0.0, _L2_CYCLES - max(0, static.stages - 1) * warps * longer)
    time = warps * longer + shorter + waits
    return warps * useful / time if time else 0.0


def in_flight(static: Static, target: Target) -> float:
    """The bytes that a unit's resident blocks keep asking for, against what keeps the memory busy:
    1 where they are enough."""
    ahead = max(0.5, static.stages - 1)
    asked = static.loop.bytes * static.resources.warps * resident(static, target) * ahead
    return min(1.0, asked / (target.bandwidth * _LATENCY / target.units))


def _tail(static: Static, target: Target) -> float:
    """The share of units that are busy when programs are dealt out evenly, 0 to 1."""
    turns = math.ceil(static.programs / target.units)
    return static.programs / (turns * target.units) if turns else 0.0


def _most_warps(target: Target) -> int:
    return 32 if target.vendor == "amd" else _WARPS.get(target.capability, 48)


def _per_cycle(kind: str, target: Target) -> float:
    """Multiply-adds of a scheduler's matrix unit per cycle: a power of two."""
    peak = target.peak.get(kind) or target.peak.get("float16") or max(target.peak.values())
    return float(2 ** round(math.log2(peak / (2 * target.units * _SCHEDULERS * _CLOCK))))
