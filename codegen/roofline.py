"""How long a program's prefill would take on a device that is not here, by its roofline.

Each matrix product and each attention takes the longer of its arithmetic and its memory traffic,
flops / (peak * share) and bytes / (bandwidth * share), and the sum over all of them is the estimate
(Williams, Waterman and Patterson, "Roofline", 2009). Operators in between are taken as fused;
launch times are left out. The shares are the target's own where its file gives them, else the
ones below, which are assumptions. Nothing here is measured, and every result says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from attnopt.codegen.kernel import Work
from attnopt.codegen.matrix_units import matrix_units
from attnopt.codegen.target import Target
from attnopt.compiler.cost import Cost, NodeCost, Workload, cost
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Program
from attnopt.compiler.regions import site_parts

Bound = Literal["arithmetic", "memory"]

ASSUMED = {"matmul": 0.7, "attention": 0.4, "bandwidth": 0.8}


@dataclass(frozen=True)
class Estimate:
    """Estimated seconds of one call, in all and by site; `bound` is what most of it waits for.

    `dtype` is the precision that the products run in, `achievable` the shares of the peaks used.
    """

    target: str
    seconds: float
    site_s: Mapping[str, float]
    arithmetic_s: float
    memory_s: float
    flops: float
    dtype: str
    achievable: Mapping[str, float]
    source: str
    load: Workload
    assumed: tuple[str, ...] = ()
    evidence: str = "estimated"
    model: str = field(default="roofline over matrix products and attention, the rest as fused")

    @property
    def bound(self) -> Bound:
        """Whether most of the time goes to operators that wait for arithmetic or for memory."""
        return "arithmetic" if self.arithmetic_s >= self.memory_s else "memory"

    def share(self, site: str) -> float:
        """The site's share of the estimated time, 0 to 1."""
        return self.site_s.get(site, 0.0) / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """The estimate as a JSON object."""
        return {**asdict(self), "bound": self.bound}


def estimate(
    program: Program,
    target: Target,
    load: Workload | None = None,
    dtype: str | None = None,
    counted: Cost | None = None,
) -> Estimate:
    """Estimate a program on a target at a size.

    `dtype` runs all products in another precision ("bfloat16"); None takes each as the graph has
    it. `counted` saves counting again. Raises `Problem` A405 for the CPU, which is measured, and
    for a dtype that the target has no peak for.
    """
    if target.measured:
        raise Problem(
            "A405",
            f"`{target.name}` is measured, not estimated",
            help="run without an estimate: the CPU at hand is timed",
        )
    counted = counted or cost(program, load)
    shares = {**ASSUMED, **target.achievable}
    seconds: dict[str, float] = {}
    waits = {"arithmetic": 0.0, "memory": 0.0}
    widest, used = 0.0, dtype or "float32"
    for name, node in counted.nodes.items():
        if not node.flops:
            continue
        runs_in = dtype or _name(node.dtype)
        arithmetic = node.flops / (_peak(target, runs_in) * shares[_kind(node)])
        memory = _bytes(node, runs_in) / (target.bandwidth * shares["bandwidth"])
        seconds[name] = max(arithmetic, memory)
        waits["arithmetic" if arithmetic >= memory else "memory"] += seconds[name]
        if node.flops > widest:
            widest, used = node.flops, runs_in
    site_s = {
        site.id: sum(seconds.get(name, 0.0) for name in site_parts(program, site))
        for site in program.sites
    }
    return Estimate(
        target.name, sum(seconds.values()), site_s, waits["arithmetic"], waits["memory"],
        counted.flops, used, shares, target.source, counted.load,
        tuple(key for key in ASSUMED if key not in target.achievable),
    )  # fmt: skip


def estimated(work: Work, dtype: str, target: Target) -> float:
    """Estimated seconds of one attention kernel in Triton: the longer of its arithmetic, at the
    float32 peak where Triton has no matrix instructions for the dtype, and its traffic.

    Raises `Problem` A405 for a dtype that the target has no peak for.
    """
    shares = {**ASSUMED, **target.achievable}
    peak = _peak(target, dtype)
    if not matrix_units(target, dtype):
        peak = min(peak, target.peak.get("float32", peak))
    arithmetic = work.flops / (peak * shares["attention"])
    return max(arithmetic, work.bytes / (target.bandwidth * shares["bandwidth"]))


def _kind(node: NodeCost) -> str:
    return "attention" if node.attention else "matmul"


def _peak(target: Target, dtype: str) -> float:
    if dtype not in target.peak:
        raise Problem(
            "A405",
            f"{target.title} has no peak for {dtype}",
            why=f"its datasheet has {', '.join(sorted(target.peak))}",
            help="estimate in one of these precisions",
        )
    return target.peak[dtype]


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(node: NodeCost, dtype: str) -> float:
    """The node's traffic when its tensors are held in another precision."""
    if node.dtype is None or _name(node.dtype) == dtype:
        return node.bytes
    held: torch.dtype | None = getattr(torch, dtype, None)
    width = 1 if held is None else held.itemsize  # float8 and int8 have several torch names
    return node.bytes * (4 if dtype == "tf32" else width) / node.dtype.itemsize
