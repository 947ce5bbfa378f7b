"""Whether a decoder gives what the whole program gives, and where it first does not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.compiler.decode.causal import is_unset, running
from attnopt.compiler.decode.decoder import Decoder
from attnopt.compiler.decode.last import MIXES
from attnopt.compiler.decode.split import sample, token_axes, where_of
from attnopt.compiler.decode.state import State
from attnopt.compiler.errors import Problem
from attnopt.compiler.verify import BOUND, LIMITS, difference, own_dtype, widened

STEPS = 6  # tokens that are read one by one at the end


def require_equal(decoder: Decoder) -> None:
    """Read the example in a prompt, a chunk and single tokens, in float64 where that fits.

    Raises `Problem` A706 naming the first operator that gives something else than in the whole
    program.
    """
    wide = _widened(decoder)
    program, parts = wide.program, wide.split
    given = sample(program, parts, wide.dtype)
    tokens = [given[name] for name in parts.tokens]
    masks = {name: given[name] for name in parts.masks}
    batch, length = tokens[0].shape[:2]
    single = max(1, length - STEPS)
    ends = [max(1, single // 2), *range(single, length + 1)]
    expected = _values(wide, [parts.logits], given)
    state, other = (_state(wide, batch, length, masks) for _ in range(2))
    for end in sorted(set(ends)):
        start = state.length
        with running(program, end - start):
            actual = wide.step(state, *(x[:, start:end] for x in tokens))
            last = wide.step(other, *(x[:, start:end] for x in tokens), last=True)
        whole = expected[parts.logits][:, start:end]
        apart = max(difference(whole, actual), difference(whole[:, -1:], last))
        if apart <= _allowed(actual.dtype):
            continue
        node = _culprit(wide, given, start, end)
        raise Problem(
            "A706", f"{program.name} read token by token is not what it is as a whole",
            where=where_of(node) if node is not None else "",
            why=f"positions {start} to {end - 1} differ by {apart:.1e} of their rms"
            + (f", first at `{node.name}` ({node.target})" if node is not None else ""),
            help="this operator mixes tokens in a way that no cache is known for",
        )  # fmt: skip


def padding_leaks(decoder: Decoder) -> bool:
    """Whether the tokens at padded positions before the real ones change what the whole program
    gives at these, as a convolution lets them that reads padded positions."""
    parts = decoder.split
    given = sample(decoder.program, parts)
    at = given[parts.tokens[0]].shape[1] // 2
    for name in parts.masks:
        given[name][:, :at] = parts.padded
    found = []
    for shift in range(3):
        tried = {
            name: torch.cat((x[:, :at].roll(shift, 1), x[:, at:]), 1) if name in parts.tokens else x
            for name, x in given.items()
        }
        found.append(_values(decoder, [parts.logits], tried)[parts.logits][:, at:])
    bound = BOUND.get(found[0].dtype, 2e-5)
    return any(difference(found[0], other) > bound for other in found[1:])


def _state(decoder: Decoder, batch: int, length: int, masks: Mapping[str, Tensor]) -> State:
    """A state with room for more tokens than are read, where the model has positions for them:
    tables must not depend on that."""
    try:
        return decoder.state(batch, 2 * length + 3, masks)
    except Problem:
        return decoder.state(batch, length, masks)


def _culprit(decoder: Decoder, given: Mapping[str, Any], start: int, end: int) -> fx.Node | None:
    """The first operator of the whole program whose value at positions `start` to `end - 1` is
    another when they are read at once, after the others."""
    program, parts = decoder.program, decoder.split
    along = {
        node.name: axes[0]
        for node in program.graph.nodes
        if node.name in parts.moving and node.op == "call_function" and not is_unset(node)
        if len(axes := token_axes(node, parts.seq)) == 1
    }
    whole = _values(decoder, list(along), given)
    tokens = [given[name] for name in parts.tokens]
    batch, length = tokens[0].shape[:2]
    state = _state(decoder, batch, length, {name: given[name] for name in parts.masks})
    if start:
        decoder.step(state, *(x[:, :start] for x in tokens))
    module = decoder.phase("step" if start else "prefill", last=False)
    seen = _Seen(module, along)
    more = (start,) if start else ()
    with torch.no_grad():
        seen.run(*(x[:, start:end] for x in tokens), state.tables, state.caches, *more)
    for name, axis in along.items():
        expected = whole[name].narrow(axis, start, end - start)
        actual = seen.found.get(name)
        if actual is None or not expected.is_floating_point():
            continue
        if difference(expected, actual) > _allowed(expected.dtype):
            return program.node(name)
    return None


def _allowed(dtype: torch.dtype) -> float:
    """What another order of sums may do; a float64 program may have narrower parts."""
    return max(BOUND[torch.float32], BOUND.get(dtype, 0.0))


class _Seen(fx.Interpreter):
    """Keeps the wanted values under the names that they have in the whole program."""

    def __init__(self, module: fx.GraphModule, wanted: Collection[str]) -> None:
        super().__init__(module)
        self.wanted, self.found = wanted, dict[str, Any]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        name = n.meta.get(MIXES, n.name)
        if name in self.wanted:
            self.found[name] = value
        return value


def _widened(decoder: Decoder) -> Decoder:
    program = decoder.program
    count = sum(p.numel() for p in program.module.parameters())
    for dtype, most in LIMITS.items():
        if count <= most and dtype.itemsize >= own_dtype(program).itemsize:
            made = replace(widened(program, dtype), example=program.example)
            return Decoder(made, decoder.split, decoder.slack, dtype)
    return decoder


def _values(decoder: Decoder, names: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the named nodes of the whole program."""
    seen = _Seen(decoder.program.module, frozenset(names))
    length = given[decoder.split.tokens[0]].shape[1]
    with torch.no_grad(), running(decoder.program, length):
        seen.run(*given.values(), enable_io_processing=False)
    return seen.found
