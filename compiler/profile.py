"""Where the time of a program goes: measured node by node, added up by site and sublayer.

Running a graph one node at a time costs some microseconds per node; shares of the time are meant,
and `call_s` is the time of the whole call as it runs, measured beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.compiler.device import finish
from attnopt.compiler.program import Batch, Program, _ordered
from attnopt.compiler.regions import PARTS, Part, site_parts, sublayer_nodes

LEAST_CEILING = 1.05  # a rewrite that cannot gain 5% is not worth its risk


@dataclass(frozen=True)
class Profile:
    """Measured seconds: of all nodes (`total_s`), by site, sublayer and node; `call_s` of one call.

    `site_part_s` holds for each site its parts (see `regions.PARTS`). A node of several sites is
    split evenly among them.
    """

    total_s: float
    site_s: Mapping[str, float]
    sublayer_s: Mapping[str, float]
    node_s: Mapping[str, float]
    site_part_s: Mapping[str, Mapping[Part, float]] = field(default_factory=dict)
    call_s: float = 0.0
    repeats: int = 0
    evidence: str = "measured"

    def share(self, id: str, parts: Sequence[Part] = PARTS) -> float:
        """The share of the time of a site (all or some of its parts) or of a sublayer, 0 to 1."""
        if id in self.sublayer_s and id not in self.site_s:
            return self._of_total(self.sublayer_s[id])
        found = self.site_part_s.get(id, {})
        return self._of_total(sum(found.get(part, 0.0) for part in parts))

    @property
    def attention_share(self) -> float:
        """The share of all sites together, projections included."""
        return self._of_total(sum(self.site_s.values()))

    def as_json(self) -> dict[str, Any]:
        """The profile as a JSON object, without the single nodes."""
        return {
            "total_s": self.total_s,
            "call_s": self.call_s,
            "repeats": self.repeats,
            "sites": {id: {"seconds": s, "share": self.share(id)} for id, s in self.site_s.items()},
            "sublayers": {
                id: {"seconds": s, "share": self._of_total(s)} for id, s in self.sublayer_s.items()
            },
            "attention_share": self.attention_share,
            "evidence": self.evidence,
        }

    def _of_total(self, seconds: float) -> float:
        return min(1.0, seconds / self.total_s) if self.total_s else 0.0


def profile(
    program: Program,
    batch: Batch | None = None,
    *,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str, float], None] | None = None,
) -> Profile:
    """Measure each node on a batch (default: the example): the median of `repeats` runs."""
    batch = batch or program.example
    timed: dict[str, list[float]] = {}
    calls: list[float] = []
    for turn in range(repeats + 1):
        runner = _Timed(program.module, clock)
        flat, _ = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
        with torch.no_grad():
            runner.run(*_ordered(program, batch, flat), enable_io_processing=False)
        start = clock()
        _finish(program.run(batch))
        calls.append(clock() - start)
        if turn:
            for name, seconds in runner.seconds.items():
                timed.setdefault(name, []).append(seconds)
        if progress is not None:
            progress("profiling", (turn + 1) / (repeats + 1))
    node_s = {name: median(values) for name, values in timed.items()}
    parts = _shared_parts(program, node_s)
    return Profile(
        sum(node_s.values()),
        {id: sum(found.values()) for id, found in parts.items()},
        _sublayers(program, node_s),
        node_s,
        parts,
        median(calls[1:]),
        repeats,
    )  # fmt: skip


def ceiling(share: float) -> float:
    """The most that removing this share of the time can gain, as a factor (Amdahl's law)."""
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"a share of time lies between 0 and 1, not {share}")
    return math.inf if share == 1.0 else 1.0 / (1.0 - share)


class _Timed(fx.Interpreter):
    """Runs a graph and notes the seconds of each node."""

    def __init__(self, module: fx.GraphModule, clock: Callable[[], float]) -> None:
        super().__init__(module)
        self.clock, self.seconds = clock, dict[str, float]()

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            return super().run_node(n)
        start = self.clock()
        result = _finish(super().run_node(n))
        self.seconds[n.name] = self.clock() - start
        return result


def _finish(result: Any) -> Any:
    """Wait until a result on a GPU is there."""
    for tensor in pytree.tree_leaves(result):
        if isinstance(tensor, Tensor):
            finish(tensor.device)
            break
    return result


def _sublayers(program: Program, node_s: Mapping[str, float]) -> dict[str, float]:
    inner = {sub.id: sublayer_nodes(program, sub) for sub in program.sublayers}
    return {id: sum(node_s.get(name, 0.0) for name in names) for id, names in inner.items()}


def _shared_parts(program: Program, node_s: Mapping[str, float]) -> dict[str, dict[Part, float]]:
    """Seconds by site and part; a node of several sites is split evenly."""
    owned = {site.id: site_parts(program, site) for site in program.sites}
    owners: dict[str, int] = {}
    for found in owned.values():
        for name in found:
            owners[name] = owners.get(name, 0) + 1
    table: dict[str, dict[Part, float]] = {}
    for id, found in owned.items():
        table[id] = dict.fromkeys(PARTS, 0.0)
        for name, part in found.items():
            table[id][part] += node_s.get(name, 0.0) / owners[name]
    return table
