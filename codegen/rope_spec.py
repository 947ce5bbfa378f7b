"""`RopeSpec`: rotary embedding of queries and keys and the write into a cache, as a frozen value
that prints as one line.

    rope_qk{heads=32 kv_heads=8 head_dim=128 v_dim=128 rotary=128 cache=paged size=64 norm=true}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from attnopt.compiler import text
from attnopt.compiler.errors import Problem

CacheLayout = Literal["none", "contiguous", "ring", "paged"]
CACHES = ("none", "contiguous", "ring", "paged")


@dataclass(frozen=True)
class RopeSpec:
    """What is done to the new tokens of an attention before it reads them.

    `rotary` channels of each head, from channel `first` on, are rotated in pairs: channel c with
    c + rotary / 2, or neighbours where `interleaved`. `norm` divides each head by its root mean
    square first and multiplies by a weight, plus one where `unit_offset` (Gemma), with `eps` added
    to the mean square. `cache` says where keys and values go: a slot per position, a ring of `size`
    slots of which the first `sink` are kept, pages of `size` slots, or nowhere. `keep_keys` gives
    the rotated keys as they came, too. `in_place` overwrites the queries (and keys that are kept).
    Raises `Problem` A818 on what makes no sense.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    rotary: int
    interleaved: bool = False
    first: int = 0
    cache: CacheLayout = "contiguous"
    size: int = 0
    sink: int = 0
    norm: bool = False
    eps: float = 1e-6
    unit_offset: bool = False
    keep_keys: bool = False
    in_place: bool = False
    name: str = field(default="rope_qk", init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim, self.v_dim) < 1:
            raise Problem("A818", f"a rotary spec needs positive sizes, got {self}")
        if self.rotary < 2 or self.rotary % 2 or self.first + self.rotary > self.head_dim:
            raise Problem(
                "A818", f"{self.rotary} rotated channels from {self.first} of {self.head_dim}",
                help="an even number, at least 2, that ends inside the head",
            )  # fmt: skip
        if self.cache not in CACHES:
            raise Problem("A818", f"unknown cache `{self.cache}`", help=f"one of {CACHES}")
        if (self.cache in ("ring", "paged")) != (self.size > 0):
            raise Problem("A818", f"a {self.cache} cache of size {self.size}")
        if self.sink and (self.cache != "ring" or self.sink >= self.size):
            raise Problem("A818", f"{self.sink} kept slots in a {self.cache} cache of {self.size}")

    @property
    def text(self) -> str:
        """The spec as one line; `parse_rope` reads it back."""
        return text.dump(self)


def parse_rope(line: str) -> RopeSpec:
    """Read a spec from its text. Raises `Problem` A601 on text that is not one."""
    call = text.parse(line)
    if call.name != "rope_qk":
        raise Problem("A601", f"expected rope_qk{{...}}, got `{line}`")
    return text.build(RopeSpec, call.values, "rope_qk")
