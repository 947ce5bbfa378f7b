"""Steps of one token under torch.compile, most of them without asking its guards again.

A guarded call looks at every weight, cache and size; on a CPU that takes a quarter of a small
model's step, and from one step of a sequence to the next nothing but the token and its position
changes. So the first two steps of a state run guarded, and show which arguments of the compiled
graph are the token, which are the position, and which stay; later ones call the graph itself, as
far as the graph's conditions on the position are known to hold.
"""

from __future__ import annotations

import operator
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

aten = torch.ops.aten
HELP = "torch.compile needs a C++ compiler"
INDUCTOR = {
    "cpp_wrapper": True,
    "size_asserts": False,  # the first steps' guards have looked at caches and tables
    "cpp.min_chunk_size": 8192,  # to wake another thread takes as long as to add so many numbers
}


Made = tuple[Tensor, Tensor | None]  # logits, and the most likely tokens where they are known


def own(x: Tensor) -> Tensor:
    """Tokens in memory of their own: a view of nothing, whose strides tell its shape alone. Those
    of a slice of what grows move as the position does, and guards look at both."""
    return x.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Call:
    """A call of a compiled graph, which takes a list."""

    graph: Callable[[list[Any]], Sequence[Any]]
    args: tuple[Any, ...]
    conditions: Conditions


@dataclass(frozen=True)
class Bound:
    """The compiled graph with all arguments of a state but the token and the position."""

    graph: Callable[[list[Any]], Sequence[Any]]
    args: Sequence[Any]
    tokens: Sequence[tuple[int, int]]  # where in the arguments, which of the tokens
    starts: Sequence[tuple[int, int]]  # where in the arguments, how far from the position
    like: Sequence[Tensor]
    positions: range  # that the graph is known to take

    def takes(self, state: State, tokens: Sequence[Tensor]) -> bool:
        """Whether these are tokens that can be read without asking the guards."""
        same = len(tokens) == len(self.like) and state.length in self.positions
        return same and all(
            x.shape == y.shape and x.dtype == y.dtype and x.device == y.device
            for x, y in zip(tokens, self.like, strict=False)
        )

    def __call__(self, start: int, tokens: Sequence[Tensor]) -> Made:
        args = list(self.args)
        for at, which in self.tokens:
            x = tokens[which]
            args[at] = x if x.stride() == self.like[which].stride() else own(x)
        for at, ahead in self.starts:
            args[at] = start + ahead
        logits, likely = self.graph(args)
        return logits, likely


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
    """The graph `(tokens..., tables, caches, start) -> logits` of `phases.phase`, which is changed
    to give the most likely tokens too, compiled."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self._seen = _with_most_likely(module), local()
        self._weights = [(x, version(x)) for x in module.parameters()]
        self.compiled = Compiled(
            module, "the decoder's step", HELP,
            fullgraph=True, dynamic=True, backend=_backend(self._seen),
            options={"guard_filter_fn": _of_state},
        )  # fmt: skip

    @property
    def outdated(self) -> bool:
        """Whether a weight was written to since it was compiled, as far as torch counts that."""
        return any(version(x) != was for x, was in self._weights)

    def again(self, state: State, tokens: Sequence[Tensor]) -> Made | None:
        """As `step`, without asking the guards; None where they have to be asked."""
        known = state.compiled
        if known is None or known.bound is None or not known.of(self, state):
            return None
        if self.compiled.form is None or not known.bound.takes(state, tokens):
            return None
        return known.bound(state.length, tokens)

    def step(self, state: State, tokens: Sequence[Tensor]) -> Made:
        """What is made of one more token of each sequence; the state's `length` is left alone."""
        known = state.compiled
        if known is None or not known.of(self, state):
            known = state.compiled = Known(self, state.tables, state.caches)
        self._seen.call = None
        tokens = [own(x) for x in tokens]
        made: Made = self.compiled(*tokens, state.tables, state.caches, state.length)
        seen, self._seen.call = self._seen.call, None
        if seen is not None and not known.asked:
            call, outputs = seen
            if len(outputs) == len(made) and all(map(operator.is_, outputs, made)):
                known.learn(Step(call, tokens, state.length), state.capacity)
        return made


def _with_most_likely(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with a second output: the first of the largest of each row of the logits."""
    (output,) = module.graph.find_nodes(op="output")
    (logits,) = output.args
    with module.graph.inserting_before(output):
        likely = module.graph.call_function(aten.argmax.default, (logits, -1))
    output.args = ((logits, likely),)
    module.recompile()
    return module


def _backend(seen: local) -> Callable[..., Callable[..., Any]]:
    """Inductor, whose graphs note their calls in `seen`: below what AOTAutograd puts around them,
    which takes a twentieth of a small model's step. It must not hold the `Single`, which torch
    would keep with what it compiled."""

    from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # takes long to import
    from torch._inductor.output_code import CompiledFxGraph

    def inner(form: fx.GraphModule, inputs: Sequence[Any], **how: Any) -> Any:
        made = compile_fx_inner(form, inputs, **how)
        if not isinstance(made, CompiledFxGraph):
            return made
        graph: Callable[[list[Any]], Sequence[Any]] = made.current_callable  # type: ignore[assignment]
        conditions = Conditions(inputs)

        def noted(args: list[Any]) -> Any:
            given = tuple(args)  # the list is emptied
            outputs = graph(args)
            seen.call = Call(graph, given, conditions), outputs
            return outputs

        made.current_callable = noted
        return made

    def compiled(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        # What AOTAutograd keeps on disk would be used without a call of `inner`.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return compile_fx(graph, inputs, inner_compile=inner, config_patches=INDUCTOR)

    return compiled


def _of_state(guards: Sequence[Any]) -> list[bool]:
    """Which guards of a compiled step are kept: those of its inputs and of torch's state. Where
    steps go on asking guards, those of the weights, whose places and shapes stay, would take a
    tenth of a step."""
    return [not guard.is_global and not guard.name.startswith("L['self']") for guard in guards]


def _bound(first: Step, second: Step, capacity: int) -> Bound | None:
    """What two steps of a state had in common; none where they do not tell it."""
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
