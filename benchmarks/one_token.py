"""Attention of one token to a cache on a CPU: ours against torch's fused attention, which repeats
keys and values for the query heads that share them (`enable_gqa`).

Ours is the operator in C++ that compiled steps call. It is held against the definition first.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from attnopt.autotune.timing import Contender, compare
from attnopt.compiler import attend, native
from attnopt.compiler.program import Batch
from attnopt.compiler.spec import FULL, AttentionSpec
from benchmarks.run import Row

SHAPES = (  # batch, heads, kv_heads, head_dim, keys
    (1, 32, 8, 64, 4096),
    (1, 32, 8, 128, 8192),
    (8, 32, 8, 64, 2048),
    (1, 32, 1, 64, 4096),
    (1, 8, 8, 64, 4096),
)
BARS = {torch.float32: 1.5, torch.bfloat16: 9.0}  # where query heads share keys
FAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""The most that ours may differ from the definition, relative to its largest output."""


def rows() -> list[Row]:
    """A row per shape and dtype."""
    if why := native.ready():
        return [Row("the operator in C++", f"not built: {why}", met=False)]
    found = list[Row]()
    for dtype in FAR:
        for shape in SHAPES:
            found.append(_row(dtype, *shape))
            print(f"{found[-1].case}: {found[-1].figure}", file=sys.stderr, flush=True)
    return found


def _row(dtype: torch.dtype, batch: int, heads: int, kv_heads: int, dim: int, keys: int) -> Row:
    torch.manual_seed(0)
    spec = AttentionSpec(heads, kv_heads, dim, dim, dim**-0.5, mask=FULL)
    q = torch.randn(batch, heads, 1, dim, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, keys, dim, dtype=dtype) for _ in range(2))

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
        made: torch.Tensor = torch.ops.attnopt.one_token(grouped, k, v, spec.scale)
        return made.reshape(q.shape)

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=spec.scale, enable_gqa=True)

    case = f"{str(dtype)[6:]}, batch {batch}, heads {heads}:{kv_heads} of {dim}, {keys} keys"
    with torch.no_grad():
        exact = attend.reference(q.double(), k.double(), v.double(), (), spec)
        wrong = float((ours(q, k, v).double() - exact).abs().max() / exact.abs().max())
        if wrong > FAR[dtype]:
            return Row(case, f"wrong by {wrong:.1e} of the largest output", met=False)
        forms = [Contender("enable_gqa", theirs), Contender("attnopt", ours)]
        timing = compare(forms, [Batch((q, k, v))], seconds=6.0)
    over = timing.ratio("attnopt", "enable_gqa")
    bar = BARS.get(dtype) if heads > kv_heads else None
    read = 2 * k.nbytes / timing.median("attnopt") / 1e9
    figure = (
        f"{over.value:.2f}x enable_gqa ({over.interval.low:.2f} to {over.interval.high:.2f}), "
        f"{timing.median('attnopt') * 1e6:.0f} us, {read:.0f} GB/s"
    )
    return Row(
        case, figure, f"at least {bar:g}x" if bar else "", over.value >= bar if bar else None,
        {"over": over.as_json(), "error": wrong, "bytes_per_second": read * 1e9},
    )  # fmt: skip
