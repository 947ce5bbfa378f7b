"""Random specs and sizes of every kernel, by a seed: what the examples of a kernel leave out.

Head widths that are no power of two, odd groups, values of another width than keys, fewer queries
than keys, every mask and option, hooks, caches that are not full, empty sets. What makes no sense,
or is not computed by any kernel, is not drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
import triton
import triton.language as tl

from attnopt.codegen.block_sparse_spec import (
    BlockSparseSpec,
    Dense,
    Pattern,
    Scattered,
    Strided,
    Windowed,
)
from attnopt.codegen.decode_spec import DecodeSpec
from attnopt.codegen.kernel import Inputs, Load
from attnopt.codegen.kernels.merge_partials import MergeSpec
from attnopt.codegen.latent_spec import LatentSpec
from attnopt.codegen.rope_spec import RopeSpec
from attnopt.compiler.linear_spec import LinearSpec
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec, Mask

WIDTHS = (32, 33, 40, 64, 72, 80, 96, 128, 160, 192, 256)


@triton.jit
def near_or_even(b, h, i, j, data):
    """A mask as a hook: the nearest keys, more of them for later heads, and every second one."""
    return (i - j < data[0] + h) | (j % 2 == b % 2)


@triton.jit
def by_thirds(logits, b, h, i, j, data):
    """Logits as a hook: one off where position and head are not alike."""
    return tl.where((i + j + h) % data[0] != 0, logits - 1.0, logits)


def _plain_near_or_even(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i - j < 3 + h) | (j % 2 == b % 2)


def _plain_by_thirds(logits: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return logits - ((i + j + h) % 3 != 0).to(logits.dtype)


@dataclass(frozen=True)
class Draw:
    """A spec with sizes. `also` are further arguments of the launcher, and `plain` those of the
    reference in their place; `change` makes the inputs less regular than the kernel does."""

    spec: Any
    load: Load
    also: Inputs = field(default_factory=dict)
    plain: Inputs = field(default_factory=dict)
    change: Callable[[Inputs], Inputs] | None = None

    @property
    def text(self) -> str:
        """The spec as one line, and what hooks there are."""
        hooks = [name for name in self.plain if name.endswith("hook")]
        return " with ".join([getattr(self.spec, "text", str(self.spec)), *hooks])


@dataclass(frozen=True)
class Most:
    """The largest sizes that are drawn, and the dtypes."""

    tokens: int = 1200
    width: int = 256
    dtypes: tuple[str, ...] = ("bfloat16", "bfloat16", "float16", "float32")


HOOKS: dict[str, tuple[Inputs, Inputs]] = {
    "keep": ({"keep_hook": near_or_even, "data": (3,)}, {"keep_hook": _plain_near_or_even}),
    "score": ({"score_hook": by_thirds, "data": (3,)}, {"score_hook": _plain_by_thirds}),
}


def draw(kernel: str, dice: Random, most: Most = Most()) -> Draw | None:
    """One of the kernel's specs with sizes; None for a kernel that is not of this package."""
    made = _DRAWN.get(kernel)
    return None if made is None else made(dice, most)


def _width(dice: Random, most: Most) -> int:
    return dice.choice([width for width in WIDTHS if width <= most.width])


def _tokens(dice: Random, most: Most) -> int:
    return min(most.tokens, dice.choice((1, 17, 63, 100, 128, 257, dice.randint(1, most.tokens))))


def _heads(dice: Random) -> tuple[int, int]:
    kv_heads = dice.choice((1, 2, 3))
    return kv_heads * dice.choice((1, 2, 3, 4, 8)), kv_heads


def _mask(dice: Random, tokens: int) -> Mask:
    window = Mask("window", dice.randint(1, tokens), dice.choice((0, 0, 1, 5, 64)))
    both = Mask("window", dice.randint(1, tokens), dice.choice((0, 4)), causal=False)
    return dice.choice((FULL, CAUSAL, window, window, both))


def _attention(dice: Random, most: Most, extras: tuple[str, ...]) -> tuple[AttentionSpec, Load]:
    (heads, kv_heads), width, queries = _heads(dice), _width(dice, most), _tokens(dice, most)
    keys = dice.choice((queries, queries, _tokens(dice, most)))
    taken = tuple(sorted(dice.sample(extras, dice.choice((0, 0, 1, 2)))))
    spec = AttentionSpec(
        heads, kv_heads, width, dice.choice((width, width, _width(dice, most))), width**-0.5,
        _mask(dice, keys), dice.choice((0.0, 0.0, 15.0)), taken, dice.choice(("-inf", "min")),
    )  # fmt: skip
    return spec, Load(dice.choice((1, 2)), queries, keys, dice.choice(most.dtypes))


def _hooked(dice: Random, spec: Any, load: Load, names: tuple[str, ...]) -> Draw:
    name = dice.choice(("", "", *names))
    also, plain = HOOKS.get(name, ({}, {}))
    return Draw(spec, load, also, plain)


def _flash_prefill(dice: Random, most: Most) -> Draw:
    spec, load = _attention(dice, most, ("bias", "keep", "padding", "sinks"))
    return _hooked(dice, spec, load, ("keep", "score"))


def _flash_prefill_backward(dice: Random, most: Most) -> Draw:
    spec, load = _attention(dice, most, ("keep", "padding", "sinks"))
    return _hooked(dice, spec, load, ("keep", "score"))


def _block_sparse_prefill(dice: Random, most: Most) -> Draw:
    (heads, kv_heads), width, keys = _heads(dice), _width(dice, most), _tokens(dice, most)
    patterns: tuple[Pattern, ...] = (
        Dense(), Windowed(dice.randint(1, 300), dice.choice((0, 5, 64)), dice.choice((0, 1))),
        Strided(dice.randint(1, 4), dice.randint(2, 6)), Scattered(dice.random(), 0, 7),
    )  # fmt: skip
    spec = BlockSparseSpec(
        heads, kv_heads, width, dice.choice((width, _width(dice, most))), width**-0.5,
        dice.choice(patterns), dice.choice((True, False)), dice.choice((64, 128)),
        dice.choice((32, 64)), dice.choice((0.0, 15.0)), dice.choice((True, False)),
        dice.choice((True, False)),
    )  # fmt: skip
    queries = dice.choice((keys, max(1, keys // 2)))
    load = Load(dice.choice((1, 2)), queries, keys, dice.choice(most.dtypes))
    return _hooked(dice, spec, load, ("score",))


def _split_decode(dice: Random, most: Most) -> Draw:
    of, load = _attention(dice, most, ("bias", "keep", "sinks"))
    queries = dice.choice((1, 1, 2, 5))
    keys = max(load.keys, queries)
    cache = dice.choice(("contiguous", "contiguous", "ring", "paged"))
    of = of.with_(fill="-inf")
    if cache == "paged":  # a bias has a column for every slot
        keys = 64 * -(-keys // 64)
    if cache == "ring":
        left, sink = dice.randint(1, keys), dice.choice((0, 4))
        extras = tuple(extra for extra in of.extras if extra == "sinks")
        of = of.with_(mask=Mask("window", left, sink), extras=extras)
    selected = dice.choice((0, 0, 3)) if cache != "ring" and keys >= 48 else 0
    spec = DecodeSpec(
        of, cache, dice.choice((16, 64)) if cache == "paged" else 0, selected,
        16 if selected else 1,
        starts=cache != "ring" and dice.choice((False, True)), slopes=dice.choice((False, True)),
        cache_dtype=dice.choice(("", "", "", "float8_e5m2")),
    )  # fmt: skip
    at = Load(dice.choice((1, 3)), queries, keys, load.dtype)
    hooks = () if cache == "ring" or spec.slopes else ("keep", "score")
    return replace(_hooked(dice, spec, at, hooks), change=_uneven)


def _latent(dice: Random, most: Most, heads: tuple[int, ...]) -> LatentSpec:
    depth, page = dice.choice((32, 40, 64, 96, 128)), dice.choice((0, 0, 64))
    return LatentSpec(
        dice.choice(heads), min(2 * most.width, dice.choice((64, 100, 128, 192, 512))),
        dice.choice((16, 32, 64)), depth, dice.choice((depth, 48)), depth**-0.5,
        dice.choice((True, False)), "paged" if page else "contiguous", page,
    )  # fmt: skip


def _latent_prefill(dice: Random, most: Most) -> Draw:
    tokens = _tokens(dice, most)
    load = Load(dice.choice((1, 2)), tokens, tokens, dice.choice(most.dtypes))
    return Draw(_latent(dice, most, (1, 2, 5)), load)


def _latent_decode(dice: Random, most: Most) -> Draw:
    queries, keys = dice.choice((1, 1, 2, 4)), _tokens(dice, most)
    load = Load(dice.choice((1, 3)), queries, max(keys, queries), dice.choice(most.dtypes))
    return Draw(_latent(dice, most, (1, 5, 16, 40, 128)), load, change=_uneven)


def _linear(dice: Random, most: Most) -> LinearSpec:
    (heads, kv_heads), dim = _heads(dice), min(most.width, dice.choice((16, 32, 40, 64, 128)))
    feature = dice.choice(("identity", "elu", "relu", "softmax"))
    positive = feature in ("elu", "softmax")  # sums of others may vanish
    causal = dice.choice((True, True, False))
    return LinearSpec(
        heads, kv_heads, dim, dice.choice((dim, 24)), feature,
        feature in ("relu", "softmax") and dim <= 64 and dice.choice((True, False)), dim**-0.5,
        positive and dice.choice((True, False)),
        decay=dice.choice(("none", "head", "token")) if causal else "none",
        state_heads=dice.choice((0, heads)), causal=causal, initial=dice.choice((True, False)),
        final=dice.choice((True, False)),
    )  # fmt: skip


def _linear_chunk(dice: Random, most: Most) -> Draw:
    tokens = _tokens(dice, most)
    load = Load(dice.choice((1, 2)), tokens, tokens, dice.choice(most.dtypes))
    return Draw(_linear(dice, most), load)


def _linear_step(dice: Random, most: Most) -> Draw:
    spec = _linear(dice, most).with_(causal=True, initial=True, final=True)
    tokens = dice.choice((1, 1, 3))
    return Draw(spec, Load(dice.choice((1, 5)), tokens, tokens, dice.choice(most.dtypes)))


def _merge_partials(dice: Random, most: Most) -> Draw:
    spec = MergeSpec(
        dice.choice((1, 5, 32)), 2 * _width(dice, most) - dice.choice((0, 1)), dice.randint(1, 40)
    )
    load = Load(dice.choice((1, 3)), dice.choice((1, 4, 37)), 1, dice.choice(most.dtypes))
    return Draw(spec, load, change=_some_empty)


def _rope_qk(dice: Random, most: Most) -> Draw:
    (heads, kv_heads), width = _heads(dice), _width(dice, most)
    rotary = 2 * dice.randint(1, width // 2)
    cache = dice.choice(("none", "contiguous", "ring", "paged"))
    keys = max(8, _tokens(dice, most))
    spec = RopeSpec(
        heads, kv_heads, width, dice.choice((width, 24)), rotary, dice.choice((True, False)),
        dice.randint(0, width - rotary), cache, {"ring": 7, "paged": 16}.get(cache, 0),
        3 if cache == "ring" else 0, dice.choice((True, False)),
        unit_offset=dice.choice((True, False)), keep_keys=dice.choice((True, False)),
        in_place=dice.choice((True, False)),
    )  # fmt: skip
    queries = dice.choice((1, keys // 2, keys))
    return Draw(spec, Load(dice.choice((1, 2)), queries, keys, dice.choice(most.dtypes)))


def _uneven(given: Inputs) -> Inputs:
    """Sequences of various lengths, the first as long as the cache; and where they are padded on
    the left, the last of them begins later."""
    lengths = given["lengths"].clone()
    if "selected" not in given:
        shorter = torch.rand(lengths.shape, device=lengths.device) * lengths
        queries = given["q" if "q" in given else "q_latent"].shape[2]
        lengths[1:] = torch.maximum(shorter.int(), lengths.new_tensor(queries))[1:]
    changed = {"lengths": lengths}
    if "starts" in given and len(lengths) > 1:
        starts = given["starts"].clone()
        starts[-1] = lengths[-1] // 3
        changed["starts"] = starts
    return {**given, **changed}


def _some_empty(given: Inputs) -> Inputs:
    """Some sets are empty, and all those of one row."""
    lse = given["lse"].clone()
    lse[torch.rand(lse.shape, device=lse.device) < 0.3] = float("-inf")
    lse[:, 0, 0, 0] = float("-inf")
    return {**given, "lse": lse}


_DRAWN: dict[str, Callable[[Random, Most], Draw]] = {
    "flash_prefill": _flash_prefill, "flash_prefill_backward": _flash_prefill_backward,
    "block_sparse_prefill": _block_sparse_prefill, "split_decode": _split_decode,
    "latent_prefill": _latent_prefill, "latent_decode": _latent_decode,
    "linear_chunk": _linear_chunk, "linear_chunk_backward": _linear_chunk,
    "linear_step": _linear_step, "merge_partials": _merge_partials, "rope_qk": _rope_qk,
}  # fmt: skip
