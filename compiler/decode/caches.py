"""Where keys and values of past tokens lie: all of them, or those of a window and its sinks.

A cache of one attention is a pair of tensors `[batch, kv_heads, slots, dim]`; one of latents is in
`attnopt.compiler.decode.latents`. `start` is how many tokens are in it; new tokens stand at
positions `start` to `start + S - 1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.compiler import attend_step
from attnopt.compiler.attend_routed import calls, to_active
from attnopt.compiler.attend_step import positions, to_newest, to_positions, to_ring
from attnopt.compiler.spec import FULL, AttentionSpec

Widths = tuple[tuple[int, int], ...]


def _widths(spec: AttentionSpec) -> Widths:
    return (spec.kv_heads, spec.head_dim), (spec.kv_heads, spec.v_dim)


@dataclass(frozen=True)
class Contiguous:
    """Every key and value: token p lies in slot p.

    One slot stays free, so that a compiled step meets no special case when the cache is full: a
    slice of all of it would be contiguous, and compiled anew.
    """

    spec: AttentionSpec
    line: str = field(init=False, repr=False, compare=False)
    reads_all: ClassVar[bool] = False  # also what was not written, which has to be zeros

    def __post_init__(self) -> None:
        object.__setattr__(self, "line", self.spec.text)

    @property
    def widths(self) -> Widths:
        """(heads, dim) of keys and of values."""
        return _widths(self.spec)

    def slots(self, capacity: int) -> int:
        """Slots for a sequence of at most `capacity` tokens."""
        return capacity + 1

    def least(self, reached: int) -> int:
        """The fewest tokens that can be left of `reached` that were read."""
        return 0

    def store(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: Any) -> None:
        """Write new keys and values `[batch, kv_heads, S, dim]` into the cache."""
        end = start + k.shape[2]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, start: Any, extras: Sequence[Tensor],
        on: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend to all keys and values that are there, those of the new tokens among them.

        The extras are those of the new rows, `[..., S, start + S]`. Where `on` is given, bool
        `[batch, heads, S, 1]`, nobody reads the result of other heads, and it may be anything.
        """
        new = q.shape[2]
        end = start + new
        k, v = keys[:, :, :end], values[:, :, :end]
        if new == 1:
            at = None if on is None else calls(on, k, v, self.spec)
            if at is not None:
                return to_active(q, k, v, extras, self.spec, at)
        return to_newest(q, k, v, extras, self.spec, self.line)


@dataclass(frozen=True)
class Ring:
    """The sinks, and the latest `left + slack` tokens in turn: a window reads no other.

    Token p lies in slot p while p < sink, else in slot sink + (p - sink) mod (left + slack), so
    that `slack` tokens can be taken back.
    """

    spec: AttentionSpec
    slack: int = 0
    line: str = field(init=False, repr=False, compare=False)
    unmasked: AttentionSpec = field(init=False, repr=False, compare=False)
    unmasked_line: str = field(init=False, repr=False, compare=False)
    reads_all: ClassVar[bool] = True

    def __post_init__(self) -> None:
        unmasked = self.spec.with_(mask=FULL)
        made = {"line": self.spec.text, "unmasked": unmasked, "unmasked_line": unmasked.text}
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @property
    def widths(self) -> Widths:
        """(heads, dim) of keys and of values."""
        return _widths(self.spec)

    @property
    def turn(self) -> int:
        """Slots that are written in turn."""
        return self.spec.mask.left + self.slack

    def slots(self, capacity: int) -> int:
        """Slots for a sequence of at most `capacity` tokens."""
        return min(capacity, self.spec.mask.sink + self.turn)

    def least(self, reached: int) -> int:
        """The fewest tokens that can be left of `reached` that were read."""
        return 0 if reached <= self.spec.mask.sink + self.turn else reached - self.slack

    def store(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: Any) -> None:
        """Write new keys and values `[batch, kv_heads, S, dim]` into the cache, less those that
        later ones of them replace."""
        new, sink = k.shape[2], self.spec.mask.sink
        if new > self.turn:
            first = min(max(sink - start, 0), new - self.turn)
            if first:
                self.store(k[:, :, :first], v[:, :, :first], keys, values, start)
            k, v, start = k[:, :, -self.turn :], v[:, :, -self.turn :], start + new - self.turn
        at = start + torch.arange(k.shape[2], device=k.device)
        slot = torch.where(at < sink, at, sink + (at - sink) % self.turn)
        keys.index_copy_(2, slot, k.to(keys.dtype))  # under autocast they differ
        values.index_copy_(2, slot, v.to(values.dtype))

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: Any,
        extras: Sequence[Tensor],
    ) -> Tensor:  # fmt: skip
        """Store new keys and values, and attend as `Contiguous.attend` does.

        As many tokens as can be taken back, and one more, read the ring that they were stored in;
        several read the ring as it was, and themselves.
        """
        new = q.shape[2]
        end = start + new
        if new <= self.slack + 1:
            self.store(k, v, keys, values, start)
            extras = self._columns(extras, positions(keys, self.spec.mask.sink, end))
            if new == 1 and not self.slack and attend_step.on_gpu(self.spec, q):
                return self._all(q, keys, values, end, extras)
            return to_ring(q, keys, values, extras, self.spec, self.line, end)
        if attend_step.on_gpu(self.spec, q):
            out = self._in_order(q, k, v, keys, values, start, extras)
        else:
            fresh = start + torch.arange(new, device=q.device)
            held = torch.cat((positions(keys, self.spec.mask.sink, start), fresh))
            k_all, v_all = torch.cat((keys, k), 2), torch.cat((values, v), 2)
            extras = self._columns(extras, held)
            out = to_positions(q, k_all, v_all, extras, self.spec, fresh, held)
        self.store(k, v, keys, values, start)
        return out

    def _all(
        self, q: Tensor, keys: Tensor, values: Tensor, end: Any, extras: Sequence[Tensor]
    ) -> Tensor:
        """Attention to every slot that is taken, in no order: the ring holds no other keys than
        those that the newest token reads."""
        taken = min(end, keys.shape[2])
        k, v = keys[:, :, :taken], values[:, :, :taken]
        extras = [
            x if name == "sinks" or x.shape[-1] == 1 else x[..., :taken]
            for name, x in zip(self.spec.extras, extras, strict=True)
        ]
        return to_newest(q, k, v, extras, self.unmasked, self.unmasked_line)

    def _in_order(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: Any,
        extras: Sequence[Tensor],
    ) -> Tensor:  # fmt: skip
        """Attention to the sinks, what of the ring is in the first new token's window, and the new
        tokens, as if there were no others: a window looks back equally far."""
        sinks = min(start, self.spec.mask.sink)
        first = max(sinks, start - self.spec.mask.left + 1)
        near = torch.arange(first, start, device=q.device)
        slot = torch.where(
            near < self.spec.mask.sink, near,
            self.spec.mask.sink + (near - self.spec.mask.sink) % self.turn,
        )  # fmt: skip
        k, v = (
            torch.cat((old[:, :, :sinks], old.index_select(2, slot), new), 2)
            for old, new in ((keys, k), (values, v))
        )
        fresh = torch.arange(first, start + q.shape[2], device=q.device)
        held = torch.cat((torch.arange(sinks, device=q.device), fresh))
        return to_newest(q, k, v, self._columns(extras, held), self.spec, self.line)

    def _columns(self, extras: Sequence[Tensor], held: Tensor) -> list[Tensor]:
        """The extras at positions."""
        return [
            x if name == "sinks" or x.shape[-1] == 1 else x[..., held.clamp(min=0)]
            for name, x in zip(self.spec.extras, extras, strict=True)
        ]


def cache_of(spec: AttentionSpec, slack: int = 0) -> Contiguous | Ring:
    """The smallest cache of keys and values that an attention can be decoded with."""
    return Ring(spec, slack) if spec.mask.kind == "window" else Contiguous(spec)
