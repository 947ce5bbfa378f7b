"""What a prompt on a CPU is made of, float32: linear maps and causal attention by the operators in
C++ that compiled decoders call, against torch's own. Both are held against float64 first."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.autotune.timing import Contender, compare
from attnopt.compiler import native
from attnopt.compiler.native import layouts
from attnopt.compiler.program import Batch
from benchmarks.run import Row

MAPS = (  # rows, inputs, outputs
    (512, 256, 768), (4096, 256, 1280), (4096, 640, 256), (4096, 1408, 512), (512, 2048, 5632),
)  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that hold the weights' values
ATTENTIONS = (  # batch, heads, kv_heads, head_dim, tokens
    (1, 8, 8, 32, 512), (8, 8, 8, 32, 512), (8, 8, 8, 64, 512), (1, 16, 4, 128, 1024),
    (1, 8, 8, 64, 2048),
)  # fmt: skip
FAR = 1e-5  # the most that ours may differ from float64, relative to its largest output


def rows() -> list[Row]:
    """A row per shape, and per dtype that holds the weights."""
    if why := native.ready():
        return [Row("the operators in C++", f"not built: {why}", met=False)]
    found = list[Row]()
    cases = [lambda shape=shape: _attention(*shape) for shape in ATTENTIONS]
    if torch.ops.attnopt.matrix_units():
        cases += [lambda s=shape, d=dtype: _map(d, *s) for shape in MAPS for dtype in DTYPES]
    else:
        found.append(Row("linear maps", "the processor has no matrix units for bfloat16"))
    for case in cases:
        found.append(case())
        print(f"{found[-1].case}: {found[-1].figure}", file=sys.stderr, flush=True)
    return found


def _map(dtype: torch.dtype, count: int, ins: int, outs: int) -> Row:
    torch.manual_seed(0)
    weight = (torch.randn(outs, ins) / ins**0.5).to(dtype).float()
    packed = layouts.tiles([weight])

    def ours(x: Tensor) -> Tensor:
        made: Tensor = torch.ops.attnopt.many_rows(x, packed, None, [0, 0], [outs], 0)
        return made

    x = torch.randn(count, ins)
    case = f"linear map, {count} x {ins} to {outs}, weights of {str(dtype)[6:]}"
    exact = x.double() @ weight.double().T
    return _row(case, ours, lambda x: F.linear(x, weight), (x,), exact, 2 * count * ins * outs)


def _attention(batch: int, heads: int, kv_heads: int, dim: int, tokens: int) -> Row:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, tokens, n, dim).transpose(1, 2) for n in (heads, kv_heads, kv_heads)
    )

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads > kv_heads)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made: Tensor = torch.ops.attnopt.prompt(q, k, v, dim**-0.5)
        return made

    case = f"attention, {batch} x {tokens}, heads {heads}:{kv_heads} of {dim}"
    exact = theirs(q.double(), k.double(), v.double())
    return _row(case, ours, theirs, (q, k, v), exact, 2 * batch * heads * tokens**2 * dim)


def _row(
    case: str, ours: Callable[..., Tensor], theirs: Callable[..., Tensor],
    given: tuple[Tensor, ...], exact: Tensor, operations: int,
) -> Row:  # fmt: skip
    with torch.no_grad():
        wrong, torchs = (
            float((run(*given).double() - exact).abs().max() / exact.abs().max())
            for run in (ours, theirs)
        )
        if wrong > FAR:
            return Row(case, f"wrong by {wrong:.1e} of the largest output", met=False)
        timing = compare(
            [Contender("torch", theirs), Contender("attnopt", ours)], [Batch(given)], seconds=3.0
        )
    over = timing.ratio("attnopt", "torch")
    rate = operations / timing.median("attnopt") / 1e9
    figure = (
        f"{over.value:.2f}x torch ({over.interval.low:.2f} to {over.interval.high:.2f}), "
        f"{timing.median('attnopt') * 1e3:.2f} ms, {rate:.0f} GFLOP/s; off by {wrong:.1e}, "
        f"torch by {torchs:.1e}"
    )
    return Row(case, figure, "", None, {"over": over.as_json(), "error": wrong, "torch": torchs})
