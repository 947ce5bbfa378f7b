"""`AttentionSpec`: what one attention computes, as a frozen value that prints as one line of text.

    attn{heads=8 kv_heads=2 head_dim=64 v_dim=64 scale=0.125 mask=window(left=1024,sink=4)
         extras=[padding]}

(on one line). The text is the last argument of the op `attnopt::attention`, so it survives
`torch.export.save` and `load`.

Meaning, with q `[batch, heads, S, head_dim]`, k `[batch, kv_heads, T, head_dim]`,
v `[batch, kv_heads, T, v_dim]`: query head h reads key/value head h // (heads // kv_heads);
logits = softcap(scale * q k^T) + bias; keys dropped by the mask, by `keep` or by `padding` get the
logit `fill`; the result is softmax(logits) v, `[batch, heads, S, v_dim]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from attnopt.compiler import text
from attnopt.compiler.errors import Problem

MaskKind = Literal["full", "causal", "window"]
Fill = Literal["-inf", "min"]
EXTRAS = ("bias", "keep", "padding", "sinks")


@dataclass(frozen=True)
class Mask:
    """Which keys j a query i may read, as a class (no tensor).

    full: all. causal: j <= i. window: i - left < j <= i (so `left` keys, itself included), or
    j < sink, never j > i.
    A two-sided window (`causal=False` and kind "window") keeps |i - j| < left.
    """

    kind: MaskKind = "full"
    left: int = 0
    sink: int = 0
    causal: bool = True

    def keep(self, i: Any, j: Any) -> Any:
        """The mask as an index expression over broadcastable index tensors; True means the key is
        read."""
        if self.kind == "full":
            return (i >= 0) | (j >= 0)
        if self.kind == "causal":
            return j <= i
        near = (i - j < self.left) & (j - i < self.left)
        if self.causal:
            return (j <= i) & (near | (j < self.sink))
        return near | (j < self.sink)

    def dense(self, queries: int, keys: int, device: Any = "cpu") -> torch.Tensor:
        """The mask as a bool tensor [queries, keys]."""
        i = torch.arange(queries, device=device)[:, None]
        j = torch.arange(keys, device=device)[None, :]
        return self.keep(i, j)  # type: ignore[no-any-return]

    def pairs(self, queries: int, keys: int) -> int:
        """How many (query, key) pairs are read, both counted from the same first position."""
        i = np.arange(queries)  # not torch: this runs under fake tensors too
        if self.kind == "full":
            return queries * keys
        later = 1 if self.kind == "causal" or self.causal else self.left
        end = np.minimum(i + later, keys)
        if self.kind == "causal":
            return int(np.sum(end))
        start = np.maximum(i - self.left + 1, 0)
        sink = min(self.sink, keys)
        apart = np.minimum(start, sink)
        if not self.causal:
            apart = apart + np.maximum(sink - np.maximum(end, start), 0)
        return int(np.sum(np.maximum(end - start, 0) + apart))

    def reads(self, length: int) -> int:
        """How many keys the last of `length` positions reads."""
        if self.kind != "window":
            return length
        return min(length, self.left + min(self.sink, max(0, length - self.left)))


FULL = Mask("full")
CAUSAL = Mask("causal")


@dataclass(frozen=True)
class AttentionSpec:
    """One attention as a value; see the module docstring for the meaning of each field.

    `extras` names the tensors of the op's list argument in order: `bias` (float, broadcastable to
    [batch, heads, S, T]), `keep` (bool, same), `padding` (bool [batch, T], True for a real key),
    `sinks` (float, broadcastable to [batch, heads, S, 1]: one more logit per row, of no key).
    `softcap` 0 means none. `fill` says what a dropped logit becomes: "-inf" (a query with no key
    gives zeros, as torch's SDPA does) or "min" (the dtype's lowest finite number: a query with no
    key gives the mean over all keys, as additive masks in eager spellings do).
    `softmax32` computes the softmax in float32. `backend` names how it runs (see codegen.backends).
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    scale: float
    mask: Mask = FULL
    softcap: float = 0.0
    extras: tuple[str, ...] = ()
    fill: Fill = "-inf"
    softmax32: bool = False
    backend: str = "reference"
    name: str = field(default="attn", init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim, self.v_dim) < 1:
            raise Problem("A301", f"an attention spec needs positive sizes, got {self}")
        if self.heads % self.kv_heads:
            raise Problem(
                "A301", f"{self.heads} query heads cannot share {self.kv_heads} key/value heads"
            )
        unknown = [extra for extra in self.extras if extra not in EXTRAS]
        if unknown:
            raise Problem("A301", f"unknown extras {unknown}", help=f"known: {', '.join(EXTRAS)}")
        if not -math.inf < self.scale < math.inf:  # as torch.compile can follow
            raise Problem("A301", f"the softmax scale must be finite, got {self.scale}")

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def text(self) -> str:
        """The spec as one line; `parse_spec` reads it back."""
        return text.dump(self)

    def with_(self, **changes: Any) -> AttentionSpec:
        """A copy with some fields changed."""
        return replace(self, **changes)


@lru_cache(maxsize=4096)
def parse_spec(line: str) -> AttentionSpec:
    """Read a spec from its text.

    Raises `Problem` A601 on text that is not a spec.
    """
    call = text.parse(line)
    if call.name != "attn":
        raise Problem("A601", f"expected attn{{...}}, got `{line}`")
    values = dict(call.values)
    mask = values.get("mask")
    if isinstance(mask, text.Call):
        values["mask"] = text.build(Mask, {"kind": mask.name, **mask.values}, "mask")
    elif isinstance(mask, str):
        values["mask"] = text.build(Mask, {"kind": mask}, "mask")
    return text.build(AttentionSpec, values, "attn")


KeepExpression = Callable[[Any, Any], Any]
