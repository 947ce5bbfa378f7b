"""A causal convolution along the sequence, as LFM2 or compressed attention (CCA, Figliolia et al.
2025, arXiv:2510.04476) have it, read token by token: a cache of its last inputs.

    y_t = b + sum_j W_j x_(t - reach + j dilation),   reach = (kernel - 1) dilation,   x_(t < 0) = 0

Two spellings say so: `reach` zeros are put before the input, or the convolution pads by `reach` on
both sides and what is made behind the end is cut off. A step has to know x of `reach` tokens before
its own; they are kept in turn, `slack` more of them so that tokens can be taken back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from attnopt.compiler.decode.split import Split
from attnopt.compiler.layout import is_symbol, same_size
from attnopt.compiler.packed_form import arguments
from attnopt.compiler.program import Program

aten = torch.ops.aten
_CONVOLUTIONS = (aten.conv1d.default, aten.convolution.default)
_PADS = (aten.pad.default, aten.constant_pad_nd.default)
_MOVES = (aten.transpose.int, aten.permute.default, aten.contiguous.default, aten.clone.default)
_ZEROS = (aten.zeros.default, aten.new_zeros.default)


@dataclass(frozen=True)
class Convolution:
    """The last inputs of the convolution `node`, whose value is `[batch, channels, seq]`.

    `pad` is the node that puts zeros before the input, `cuts` are those that cut off what is behind
    the end. `channels` are those of the input.
    """

    node: str
    channels: int
    reach: int
    dilation: int
    groups: int
    pad: str = ""
    cuts: tuple[str, ...] = ()
    slack: int = 0
    reads_all: ClassVar[bool] = True

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """(heads, dim) of what is stored of a token."""
        return ((1, self.channels),)

    @property
    def turn(self) -> int:
        """Slots that are written in turn: token p lies in slot p mod turn."""
        return self.reach + self.slack

    def slots(self, capacity: int) -> int:
        """Slots for a sequence of at most `capacity` tokens."""
        return min(capacity, self.turn)

    def least(self, reached: int) -> int:
        """The fewest tokens that can be left of `reached` that were read."""
        return 0 if reached <= self.turn else reached - self.slack

    def store(self, x: Tensor, kept: Tensor, start: Any) -> None:
        """Write inputs `[batch, channels, S]` into the cache `[batch, 1, slots, channels]`, less
        those that later ones of them replace."""
        new = x.shape[2]
        if new > self.turn:
            x, start, new = x[..., -self.turn :], start + new - self.turn, self.turn
        at = start + torch.arange(new, device=x.device)
        kept.index_copy_(2, at % self.turn, x.transpose(1, 2)[:, None])

    def before(self, kept: Tensor, start: Any) -> Tensor:
        """The inputs of the `reach` tokens before `start`, `[batch, reach, channels]`: zeros where
        there are none."""
        at = start - self.reach + torch.arange(self.reach, device=kept.device)
        there = at >= 0
        held = kept[:, 0][:, at % self.turn * there]  # a short state has fewer slots
        return torch.where(there[:, None], held, 0)

    def step(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, start: Any
    ) -> Tensor:
        """The convolution of new tokens `[batch, channels, S]`, whose inputs are stored.

        `weight` is `[outputs, channels / groups, kernel]`, `bias` `[outputs]`. One token of a
        depthwise convolution is a product and a sum: calls of convolutions take longer.
        """
        whole = torch.cat((self.before(kept, start), x.transpose(1, 2)), 1)
        self.store(x, kept, start)
        if x.shape[2] == 1 and self.groups == self.channels == weight.shape[0]:
            made = (whole[:, :: self.dilation] * weight[:, 0].T).sum(1)
            return (made if bias is None else made + bias)[..., None]
        return torch.conv1d(whole.transpose(1, 2), weight, bias, 1, 0, self.dilation, self.groups)

    def prefill(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, start: Any
    ) -> Tensor:
        """As `step`, of a prompt: there is nothing before it."""
        self.store(x, kept, start)
        padded = torch.nn.functional.pad(x, (self.reach, 0))
        return torch.conv1d(padded, weight, bias, 1, 0, self.dilation, self.groups)


def find(program: Program, parts: Split, slack: int = 0) -> tuple[Convolution, ...]:
    """The causal convolutions along the sequence of new tokens, in the order of the graph."""
    nodes = [n for n in program.graph.nodes if n.target in _CONVOLUTIONS and n.name in parts.moving]
    return tuple(made for node in nodes if (made := _read(node, parts, slack)) is not None)


def uncut(nodes: dict[str, fx.Node], found: Convolution) -> None:
    """Take away what makes a convolution causal in its graph, so that inputs and outputs are as
    many as tokens."""
    if found.pad:
        pad = nodes[found.pad]
        source = _padded(pad)
        assert source is not None
        pad.replace_all_uses_with(source)
    for name in found.cuts:
        cut = nodes[name]
        cut.args = (cut.args[0], cut.args[1], 0, torch.iinfo(torch.int64).max)


def _read(node: fx.Node, parts: Split, slack: int) -> Convolution | None:
    a = arguments(node)
    x, weight = cast(fx.Node, a["input"]), cast(fx.Node, a["weight"])
    stride, padding, dilation = (_one(a[key]) for key in ("stride", "padding", "dilation"))
    if x.meta["val"].dim() != 3 or weight.name in parts.moving or stride != 1:
        return None
    if a.get("transposed") or padding is None or dilation is None:
        return None
    channels, reach = x.meta["val"].shape[1], (int(weight.meta["val"].shape[2]) - 1) * dilation
    if not reach or is_symbol(channels) or not same_size(x.meta["val"].shape[0], parts.batch):
        return None
    made = Convolution(node.name, int(channels), reach, dilation, int(a["groups"]), slack=slack)
    if padding == reach and same_size(x.meta["val"].shape[2], parts.seq):
        cuts = tuple(_cuts(node, reach, parts))
        return replace(made, cuts=cuts) if cuts else None
    pad = _pad(x, reach, parts) if padding == 0 else None
    return replace(made, pad=pad.name) if pad is not None else None


def _one(value: Any) -> int | None:
    """The number for the one axis of a convolution."""
    found = value[0] if isinstance(value, (list, tuple)) else value
    return found if isinstance(found, int) else None


def _pad(node: fx.Node, reach: int, parts: Split) -> fx.Node | None:
    """The node above that puts `reach` zeros before the tokens, and nothing else; None where there
    is none."""
    axis = 2
    while node.target in _MOVES and len(node.users) == 1:
        axis = _moved(node, axis)
        node = cast(fx.Node, node.args[0])
    if len(node.users) != 1:
        return None
    source = _padded(node)
    if source is None or not same_size(source.meta["val"].shape[axis], parts.seq):
        return None
    if node.target is aten.cat.default:
        dim = int(arguments(node)["dim"]) % 3
        zeros = cast(Any, node.args[0])[0].meta["val"].shape[dim]
        return node if dim == axis and not is_symbol(zeros) and int(zeros) == reach else None
    amounts = list(cast(Any, node.args[1])) + [0] * 6
    wanted = [0] * len(amounts)
    wanted[2 * (2 - axis)] = reach
    a = arguments(node)
    zero = a.get("mode", "constant") == "constant" and not a["value"]
    return node if zero and amounts == wanted else None


def _padded(node: fx.Node) -> fx.Node | None:
    """What a node pads: a value of rank 3."""
    if node.target in _PADS:
        source = node.args[0]
    elif node.target is aten.cat.default:
        joined = cast(Any, node.args[0])
        if len(joined) != 2 or joined[0].target not in _ZEROS:
            return None
        source = joined[1]
    else:
        return None
    assert isinstance(source, fx.Node)
    return source if source.meta["val"].dim() == 3 else None


def _cuts(node: fx.Node, reach: int, parts: Split) -> Iterator[str]:
    """The names of the nodes below that cut the tokens behind the end off; none where anything else
    reads them."""
    axis = 2
    while len(node.users) == 1 and next(iter(node.users)).target in _MOVES:
        node = next(iter(node.users))
        axis = _place(node, axis)
    if all(_is_cut(user, axis, reach, parts) for user in node.users):
        yield from (user.name for user in node.users)


def _is_cut(node: fx.Node, axis: int, reach: int, parts: Split) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    a = arguments(node)
    end = a["end"]
    whole = end == -reach if isinstance(end, int) else (
        isinstance(end, fx.Node) and same_size(end.meta["val"], parts.seq)
    )  # fmt: skip
    return a["dim"] % 3 == axis and not a["start"] and a["step"] == 1 and whole


def _moved(node: fx.Node, axis: int) -> int:
    """The axis of a move's input that is this one of its result."""
    if node.target is aten.permute.default:
        return int(cast(Any, node.args[1])[axis]) % 3
    if node.target is not aten.transpose.int:
        return axis
    first, second = (int(cast(int, at)) % 3 for at in node.args[1:3])
    return {first: second, second: first}.get(axis, axis)


def _place(node: fx.Node, axis: int) -> int:
    """The axis of a move's result that is this one of its input."""
    return next(at for at in range(3) if _moved(node, at) == axis)
