"""Steps of one token under torch.compile, most of them without asking its guards again.

A guarded call looks at every weight, cache and size; on a CPU that takes a quarter of a small
model's step, and from one step of a sequence to the next nothing but the token and its position
changes. So the first two steps of a state run guarded, and show which arguments of the compiled
graph are the token, which are the position, and which stay; later ones call the graph itself, as
far as the graph's conditions on the position are known to hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import local
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.compiler.compiled import Compiled
from attnopt.compiler.decode.conditions import Conditions
from attnopt.compiler.decode.linear_maps import version
from attnopt.compiler.decode.state import State

HELP = "torch.compile needs a C++ compiler"


@dataclass(frozen=True)
class Call:
    """A call of a compiled graph."""

    graph: Callable[..., Any]
    args: tuple[Any, ...]
    conditions: Conditions


@dataclass(frozen=True)
class Bound:
    """The compiled graph with all arguments of a state but the token and the position."""

    graph: Callable[..., Any]
    args: Sequence[Any]
    tokens: Sequence[tuple[int, int]]  # where in the arguments, which of the tokens
    starts: Sequence[tuple[int, int]]  # where in the arguments, how far from the position
    like: Sequence[Tensor]
    positions: range  # that the graph is known to take

    def takes(self, state: State, tokens: Sequence[Tensor]) -> bool:
        """Whether these tokens can be read without asking the guards."""
        return state.length in self.positions and all(
            x.dtype == y.dtype and x.stride() == y.stride() and x.device == y.device
            for x, y in zip(tokens, self.like, strict=True)
        )

    def __call__(self, start: int, tokens: Sequence[Tensor]) -> Tensor:
        args = list(self.args)
        for at, which in self.tokens:
            args[at] = tokens[which]
        for at, ahead in self.starts:
            args[at] = start + ahead
        (logits,) = self.graph(*args)
        return logits  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Step:
    """A guarded call, and the tokens and the position that it was for."""

    call: Call
    tokens: Sequence[Tensor]
    start: int


@dataclass
class Known:
    """What the steps of a state, compiled by `single`, have shown so far, while its tables and
    caches stay. A copy of a state begins anew."""

    single: Single
    tables: list[Tensor]
    caches: list[tuple[Tensor, ...]]
    first: Step | None = None
    bound: Bound | None = None
    asked: bool = False

    def __deepcopy__(self, memo: object) -> None:
        return None

    def of(self, single: Single, state: State) -> bool:
        """Whether this is about what the state has now."""
        mine = self.single is single and self.caches is state.caches
        return mine and self.tables is state.tables

    def learn(self, step: Step, capacity: int) -> None:
        """Take note of a step; the second of a graph says whether others can do without guards."""
        if self.first is None or self.first.call.graph is not step.call.graph:
            self.first = step
        elif self.first.start != step.start:
            self.asked, self.bound, self.first = True, _bound(self.first, step, capacity), None


class Single:
    """The graph `(tokens..., tables, caches, start) -> logits` of `phases.phase`, compiled."""

    def __init__(self, module: fx.GraphModule, **options: Any) -> None:
        self.module, self._seen = module, local()
        self._weights = [(x, version(x)) for x in module.parameters()]
        self.compiled = Compiled(
            module, "the decoder's step", HELP,
            fullgraph=True, dynamic=True, backend=_backend(self._seen, options),
            options={"guard_filter_fn": _of_state},
        )  # fmt: skip

    @property
    def outdated(self) -> bool:
        """Whether a weight was written to since it was compiled, as far as torch counts that."""
        return any(version(x) != was for x, was in self._weights)

    def step(self, state: State, tokens: Sequence[Tensor]) -> Tensor:
        """The logits of one more token of each sequence of a state; its `length` is left alone."""
        known = state.compiled
        if known is None or not known.of(self, state):
            known = state.compiled = Known(self, state.tables, state.caches)
        works = self.compiled.form is not None
        if works and known.bound is not None and known.bound.takes(state, tokens):
            return known.bound(state.length, tokens)
        self._seen.call = None
        tokens = [x.detach() for x in tokens]  # views of nothing, whatever the caller's are
        logits: Tensor = self.compiled(*tokens, state.tables, state.caches, state.length)
        call, self._seen.call = self._seen.call, None
        if call is not None and not known.asked:
            known.learn(Step(call, tokens, state.length), state.capacity)
        return logits


def _backend(seen: local, options: dict[str, Any]) -> Callable[..., Callable[..., Any]]:
    """Inductor, whose graphs note their calls in `seen`. It must not hold the `Single`, which torch
    would keep with what it compiled."""

    def compiled(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        made = torch._inductor.compile(graph, inputs, options=options)
        conditions = Conditions(inputs)

        def run(*args: Any) -> Any:
            outputs = made(*args)
            seen.call = Call(made, args, conditions)
            return outputs

        return run

    return compiled


def _of_state(guards: Sequence[Any]) -> list[bool]:
    """Which guards of a compiled step are kept: those of its inputs and of torch's state. Where
    steps go on asking guards, those of the weights, whose places and shapes stay, would take a
    tenth of a step."""
    return [not guard.is_global and not guard.name.startswith("L['self']") for guard in guards]


def _bound(first: Step, second: Step, capacity: int) -> Bound | None:
    """What two steps of a state had in common; none where they do not tell it."""
    if len({id(x) for x in second.tokens}) < len(second.tokens):
        return None
    tokens, starts = list[tuple[int, int]](), list[tuple[int, int]]()
    moved = second.start - first.start
    for at, (was, now) in enumerate(zip(first.call.args, second.call.args, strict=True)):
        which = next((i for i, x in enumerate(second.tokens) if x is now), None)
        number = isinstance(now, int)
        if which is not None and was is first.tokens[which]:
            tokens.append((at, which))
        elif number and now - was == moved:
            starts.append((at, now - second.start))
        elif was is not now and not (number and was == now):
            return None
    if not starts:  # the conditions may be on a position that the graph is not given
        return None
    # Where a table has just as many columns as there are positions, the last step is another form.
    ends = (range(min(first.start, second.start), end) for end in (capacity, capacity - 1))
    given, moving = second.call.args, dict(starts)
    held = [at for at in ends if second.call.conditions.hold(given, moving, at)]
    if not held:
        return None
    args = list(given)
    for at, _ in tokens:
        args[at] = None
    return Bound(second.call.graph, args, tokens, starts, second.tokens, held[0])
