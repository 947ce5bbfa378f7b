"""Where keys and values of past tokens lie: all of them, or those of a window and its sinks.

A cache of one attention is a pair of tensors `[batch, kv_heads, slots, dim]`; one of latents is in
`attnopt.compiler.decode.latents`. `start` is how many tokens are in it; new tokens stand at
positions `start` to `start + S - 1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.attend_routed import calls, to_active
from attnopt.compiler.attend_step import to_all, to_positions
from attnopt.compiler.spec import AttentionSpec

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

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: Any,
        extras: Sequence[Tensor], on: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Store new keys and values, and attend to all that are there.

        The extras are those of the new rows, `[..., S, start + S]`. Where `on` is given, bool
        `[batch, heads, S, 1]`, nobody reads the result of other heads, and it may be anything.
        """
        new = q.shape[2]
        end = start + new
        self.store(k, v, keys, values, start)
        k, v = keys[:, :, :end], values[:, :, :end]
        if new == 1:
            at = None if on is None else calls(on, k, v, self.spec)
            if at is not None:
                return to_active(q, k, v, extras, self.spec, at)
            return to_all(q, k, v, extras, self.spec)
        j = torch.arange(end, device=q.device)
        return to_positions(q, k, v, extras, self.spec, start + j[:new], j)


@dataclass(frozen=True)
class Ring:
    """The sinks, and the latest `left + slack` tokens in turn: a window reads no other.

    Token p lies in slot p while p < sink, else in slot sink + (p - sink) mod (left + slack), so
    that `slack` tokens can be taken back.
    """

    spec: AttentionSpec
    slack: int = 0

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
        keys.index_copy_(2, slot, k)
        values.index_copy_(2, slot, v)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: Any,
        extras: Sequence[Tensor],
    ) -> Tensor:  # fmt: skip
        """As `Contiguous.step`. One token reads the ring that it was stored in; several read the
        ring as it was, and themselves."""
        new = q.shape[2]
        fresh = start + torch.arange(new, device=q.device)
        if new == 1:
            self.store(k, v, keys, values, start)
            k, v, held = keys, values, self._held(start + 1, keys)
        else:
            held = torch.cat((self._held(start, keys), fresh))
            k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)
        extras = [
            x if name == "sinks" or x.shape[-1] == 1 else x[..., held.clamp(min=0)]
            for name, x in zip(self.spec.extras, extras, strict=True)
        ]
        out = to_positions(q, k, v, extras, self.spec, fresh, held)
        if new > 1:
            self.store(k[:, :, -new:], v[:, :, -new:], keys, values, start)
        return out

    def _held(self, length: Any, keys: Tensor) -> Tensor:
        """The position that each slot holds after `length` tokens, -1 where none, `[slots]`."""
        sink, slot = self.spec.mask.sink, torch.arange(keys.shape[2], device=keys.device)
        last = length - 1
        turned = last - (last - slot) % self.turn
        held = torch.where(slot < sink, slot, torch.where(turned < sink, -1, turned))
        return torch.where(held < length, held, -1)


def cache_of(spec: AttentionSpec, slack: int = 0) -> Contiguous | Ring:
    """The smallest cache of keys and values that an attention can be decoded with."""
    return Ring(spec, slack) if spec.mask.kind == "window" else Contiguous(spec)
