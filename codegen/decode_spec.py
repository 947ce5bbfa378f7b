"""`DecodeSpec`: attention of a few new tokens over a cache, as a frozen value of one line of text.

    decode{attention=attn(heads=32,kv_heads=8,head_dim=128,v_dim=128,scale=0.0884,mask=causal)
           cache=paged page=64}

(on one line). Caches, with `slots` for the tokens that one sequence has room for:

* contiguous: `[batch, kv_heads, slots, dim]`, token p in slot p;
* ring: the same shape; the first `mask.sink` tokens stay in their slots, and every later one takes
  the place of the oldest. Positions were applied before, so the order of slots does not matter;
* paged: pages `[pages, page, kv_heads, dim]` of all sequences, and a table of each sequence's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from attnopt.codegen.kernel import Inputs, Load
from attnopt.compiler import text
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import AttentionSpec

Cache = Literal["contiguous", "ring", "paged"]
CACHES = ("contiguous", "ring", "paged")


@dataclass(frozen=True)
class DecodeSpec:
    """What is computed (`attention`) and where its keys and values lie (`cache`).

    `page` is the tokens in a page of a paged cache. Where `selected` is not 0, each key/value head
    reads only that many runs of `run` tokens, named by their index. `starts`: sequences are padded
    on the left. `slopes`: linear biases (ALiBi) are added. `cache_dtype` is the dtype of keys and
    values where it is not that of the queries ("float8_e5m2").
    """

    attention: AttentionSpec
    cache: Cache = "contiguous"
    page: int = 0
    selected: int = 0
    run: int = 1
    starts: bool = False
    slopes: bool = False
    cache_dtype: str = ""
    name: str = field(default="decode", init=False, repr=False)

    def __post_init__(self) -> None:
        wrong = self._wrong()
        if wrong:
            raise Problem("A820", f"no such cache: {wrong}", where=self.text)

    @property
    def text(self) -> str:
        """The spec as one line."""
        return text.dump(self)

    def _wrong(self) -> str:
        if self.cache not in CACHES:
            return f"`{self.cache}` is none of {', '.join(CACHES)}"
        if (self.cache == "paged") != (self.page > 0):
            return "`page` is given for a paged cache, and for no other"
        if self.selected < 0 or self.run < 1:
            return "`selected` cannot be negative, nor `run` less than 1"
        if self.cache == "ring" and (self.selected or self.starts):
            return "a ring cache holds all that is read: no `selected`, no `starts`"
        return ""


def decode_inputs(spec: DecodeSpec, load: Load, device: str = "cpu") -> Inputs:
    """Random tensors for the spec by the names of `split_decode`'s parameters: full caches, their
    pages in no order."""
    of, held = spec.attention, spec.cache_dtype
    made = partial(torch.randn, dtype=load.torch_dtype, device=device)
    whole = partial(torch.full, dtype=torch.int32, device=device)
    shape: tuple[int, ...] = (load.batch, of.kv_heads, load.keys)
    given: Inputs = {"lengths": whole((load.batch,), load.keys)}
    if spec.cache == "ring":
        shape = (*shape[:2], min(load.keys, of.mask.left + of.mask.sink + load.queries - 1))
    if spec.cache == "paged":
        pages = -(-load.keys // spec.page)
        order = torch.randperm(load.batch * pages, device=device).int()
        given["table"] = order.reshape(load.batch, pages)
        shape = (load.batch * pages, spec.page, of.kv_heads)
    if spec.selected:
        runs = torch.rand(load.batch, of.kv_heads, load.keys // spec.run, device=device)
        given["selected"] = runs.argsort(2)[..., : spec.selected].sort(2)[0].int()
    if spec.starts:
        given["starts"] = whole((load.batch,), 0)
    if spec.slopes:
        given["slopes"] = torch.rand(of.heads, device=device)
    queries = (load.batch, of.heads, load.queries)
    extras = {
        "bias": lambda: made(1, of.heads, load.queries, load.keys),
        "keep": lambda: torch.rand(load.batch, 1, 1, load.keys, device=device) < 0.8,
        "padding": lambda: torch.rand(load.batch, load.keys, device=device) < 0.8,
        "sinks": lambda: made(1, of.heads, 1, 1),
    }
    tensors = {"k": made(*shape, of.head_dim), "v": made(*shape, of.v_dim)}
    if held:
        tensors = {key: x.to(getattr(torch, held)) for key, x in tensors.items()}
    return {
        "q": made(*queries, of.head_dim), **tensors, **given,
        **{name: extras[name]() for name in of.extras},
    }  # fmt: skip


def held_bytes(spec: DecodeSpec, load: Load) -> int:
    """Bytes of one number in the cache."""
    held: torch.dtype = getattr(torch, spec.cache_dtype or load.dtype)
    return held.itemsize
