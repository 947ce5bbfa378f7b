"""`diagnose`: run calibration data through a raised program once, and measure every attention and
sublayer on the way.

Nothing is kept of a map but sums: one attention, one sequence and a slice of queries are in memory
at a time. Sequences with many tokens have their queries sampled; which ones depends on the seed
alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnopt.compiler.diagnostics.copying import DRAWS, twice
from attnopt.compiler.diagnostics.diagnosis import Diagnosis
from attnopt.compiler.diagnostics.influence import Influence
from attnopt.compiler.diagnostics.map_figures import SINK
from attnopt.compiler.diagnostics.site_reader import QUERIES, SiteReader
from attnopt.compiler.diagnostics.walk import Watcher, walk
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising.evaluate import concrete, example_sizes

TOKENS = 8192  # of calibration data, in whole batches
WIDTHS = (64, 128, 256)

Progress = Callable[[str, float], None]


class OutOfTime(Exception):
    """The diagnostics took longer than they were given."""


def diagnose(
    program: Program,
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    queries: int = QUERIES,
    tokens: int = TOKENS,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Measure all sites and sublayers on the first batches that hold `tokens` positions.

    `queries` caps the positions of one sequence whose attention maps are read. Raises `OutOfTime`
    once more than `seconds` are used, and ValueError without batches.
    """
    if not batches:
        raise ValueError("diagnostics need calibration data")
    begun, say = time.monotonic(), progress or (lambda what, share: None)
    used = _first(batches, tokens)
    widths = _widths(program, used)
    sites = [SiteReader(program, site, widths, queries, seed) for site in program.sites]
    layers = [Influence(program, layer) for layer in program.sublayers]
    clock = partial(_check, begun, seconds)
    for at, batch in enumerate(used):
        say("diagnosing", at / (len(used) + 1))
        walk(program, _watchers(sites, layers, batch, clock), batch)
    _copy(program, sites, used, seed, clock)
    return Diagnosis(
        tuple(site.diagnosis() for site in sites),
        tuple(layer.result() for layer in layers),
        widths,
        SINK,
        sum(_rows(batch) for batch in used),
        sum(_positions(batch) for batch in used),
        seed,
        time.monotonic() - begun,
        (*_notes(len(batches), len(used), queries, program, used), *_hidden(sites)),
    )


def _watchers(
    sites: Sequence[SiteReader],
    layers: Sequence[Influence],
    batch: Batch,
    clock: Callable[[], None],
) -> dict[str, list[Watcher]]:
    """Who looks at which node during one batch."""
    made: dict[str, list[Watcher]] = {}

    def timed(see: Watcher, read: Mapping[fx.Node, Any], value: Any) -> None:
        clock()
        see(read, value)

    for site in sites:
        for name in site.kv.nodes:
            made.setdefault(name, []).append(partial(_project, site, name, batch))
        watch = partial(timed, partial(site.see, batch=batch))
        made.setdefault(site.site.node, []).append(watch)
    for layer in layers:
        if layer.node:
            made.setdefault(layer.node, []).append(partial(layer.see, batch=batch))
    return made


def _project(
    site: SiteReader, name: str, batch: Batch, read: Mapping[fx.Node, Any], value: Any
) -> None:
    site.kv.see(name, value, batch)


def _copy(
    program: Program,
    sites: Sequence[SiteReader],
    batches: Sequence[Batch],
    seed: int,
    clock: Callable[[], None],
) -> None:
    """Run the copying test at the sites that it has a meaning at."""
    able = [site for site in sites if not site.unfit]
    if not able:
        return
    for draw in range(DRAWS):
        made = twice(program, batches, seed + 1000 * draw)
        if isinstance(made, str):
            for site in able:
                site.no_copying = made
            return
        clock()
        watchers = {
            site.site.node: [partial(site.see_copy, half=made.half, given=made.given)]
            for site in able
        }
        walk(program, watchers, made.batch)


def _check(begun: float, seconds: float | None) -> None:
    if seconds is not None and time.monotonic() - begun > seconds:
        raise OutOfTime


def _first(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Whole batches up to `tokens` positions, one at least."""
    used, total = [batches[0]], _positions(batches[0])
    for batch in batches[1:]:
        total += _positions(batch)
        if total > tokens:
            break
        used.append(batch)
    return used


def _widths(program: Program, batches: Sequence[Batch]) -> tuple[int, ...]:
    """The windows to look at: 64, 128 and 256 keys, or parts of the longest sequence where it is
    not much longer than that."""
    longest = 2
    for batch in batches:
        sizes = example_sizes(replace(program, example=batch))
        for site in program.sites:
            shape = cast(fx.Node, program.node(site.node).args[0]).meta["val"].shape
            longest = max(longest, int(concrete(shape[2], sizes)))
    if longest >= 2 * WIDTHS[-1]:
        return WIDTHS
    return tuple(sorted({max(1, longest // part) for part in (8, 4, 2)}))


def _notes(
    given: int, used: int, queries: int, program: Program, batches: Sequence[Batch]
) -> tuple[str, ...]:
    notes = []
    if used < given:
        notes.append(f"{used} of {given} batches were read")
    if max(_positions(b) // max(1, _rows(b)) for b in batches) > queries:
        notes.append(f"maps were read at {queries} queries of each longer sequence, drawn by seed")
    unknown = len(program.unraised)
    if unknown:
        notes.append(f"{unknown} attentions were not understood and are not measured")
    return tuple(notes)


def _hidden(sites: Sequence[SiteReader]) -> list[str]:
    most = max((site.hidden for site in sites), default=0)
    if not most:
        return []
    return [f"retrieval and induction: {most} positions that a given mask hides were left out"]


def _tensor(batch: Batch) -> torch.Tensor:
    """The first input with a batch, however deep it lies."""
    leaves = pytree.tree_leaves((batch.args, dict(batch.kwargs)))
    found = (x for x in leaves if isinstance(x, torch.Tensor) and x.dim())
    return next(found, torch.empty(0))


def _rows(batch: Batch) -> int:
    return int(_tensor(batch).shape[0])


def _positions(batch: Batch) -> int:
    """Real tokens of a batch, or rows where it has no sequence."""
    if batch.valid is not None:
        return int(batch.valid.sum())
    shape = _tensor(batch).shape
    return int(shape[0] * (shape[1] if len(shape) in (2, 3) else 1))
