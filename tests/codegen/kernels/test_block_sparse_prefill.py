"""`block_sparse_prefill` against its reference in float64, run by triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from attnopt.codegen.block_lists import BlockGrid, BlockLists, from_mask
from attnopt.codegen.block_sparse_spec import (
    BlockSparseSpec,
    Dense,
    Pattern,
    Scattered,
    Strided,
    Windowed,
)
from attnopt.codegen.kernel import Load
from attnopt.codegen.kernels.block_sparse_prefill import BlockSparsePrefill, block_sparse_prefill
from attnopt.codegen.kernels.references import block_sparse_prefill as plain
from attnopt.codegen.target import target
from attnopt.compiler.spec import Mask
from tests.tolerance import assert_close

SMALL: dict[str, Any] = {"block_m": 32, "block_n": 32}
HALF = Scattered(0.5)


def _tensors(
    heads: int, kv_heads: int, queries: int, keys: int, depth: int, width: int = 0, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, heads, queries, depth),
        torch.randn(batch, kv_heads, keys, depth),
        torch.randn(batch, kv_heads, keys, width or depth),
    )


def _agree(
    tensors: tuple[Tensor, Tensor, Tensor], lists: BlockLists, hooks: Any = None, **options: Any
) -> None:
    """The kernel's output and log-sum-exps are the reference's on the same lists. `hooks` are those
    of the reference."""
    grid = lists.grid
    fixed = {
        "scale": tensors[0].shape[3] ** -0.5, "causal": grid.causal, "offset": grid.offset,
        "query_block": grid.query_block, "key_block": grid.key_block,
        "softcap": options.pop("softcap", 0.0),
    }  # fmt: skip
    out, lse = block_sparse_prefill(
        *tensors, **lists.inputs(), **fixed, with_lse=True, **{**SMALL, **options}
    )
    exact = [x.double() for x in tensors]
    expected, ended = plain.block_sparse_prefill(*exact, **lists.inputs(), **fixed, **(hooks or {}))
    assert out.dtype == tensors[0].dtype and lse.dtype == torch.float32
    assert_close(out, expected, "output")
    assert_close(lse, ended, "log-sum-exps")


@pytest.mark.parametrize("depth", [32, 33, 40, 57, 64, 80, 96, 128, 192, 256])
def test_head_sizes(depth: int) -> None:
    lists = HALF.lists(BlockGrid(100, 100, 32, 32), 1)
    _agree(_tensors(2, 1, 100, 100, depth), lists, pack=2)


@pytest.mark.parametrize(("depth", "width"), [(64, 32), (48, 80), (96, 64)])
def test_values_of_another_size(depth: int, width: int) -> None:
    lists = HALF.lists(BlockGrid(70, 70, 32, 32), 1)
    _agree(_tensors(1, 1, 70, 70, depth, width), lists)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 63, 100, 128, 257])
def test_lengths(length: int, causal: bool) -> None:
    lists = HALF.lists(BlockGrid(length, length, 64, 64, causal=causal), 1)
    _agree(_tensors(2, 1, length, length, 32, batch=2), lists, block_m=64, block_n=64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 100), (33, 129), (128, 257), (129, 64)])
def test_queries_that_end_where_the_keys_end(queries: int, keys: int, causal: bool) -> None:
    grid = BlockGrid(queries, keys, 32, 64, keys - queries, causal)
    for pattern in (HALF, Windowed(40, 5), Dense()):
        _agree(_tensors(2, 1, queries, keys, 32), pattern.lists(grid, 1), pack=2)


@pytest.mark.parametrize("causal", [True, False])
def test_queries_behind_all_keys(causal: bool) -> None:
    grid = BlockGrid(40, 70, 32, 32, offset=90, causal=causal)
    for pattern in (Dense(), Windowed(40, 5)):
        _agree(_tensors(2, 1, 40, 70, 32), pattern.lists(grid, 1))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("pack", [1, 2, 8])
def test_grouped_heads(group: int, pack: int) -> None:
    grid = BlockGrid(40, 40, 16, 32)
    tensors = _tensors(2 * group, 2, 40, 40, 32)
    _agree(tensors, HALF.lists(grid, 2), pack=pack, block_m=64)
    if pack == 8:  # where each query head has a pattern, none share a tile
        _agree(tensors, HALF.lists(grid, 2 * group), pack=pack)


PATTERNS: tuple[Pattern, ...] = (
    Dense(), Windowed(40, 5), Windowed(33, 0), Windowed(40, 5, full=2), Strided(2, 4),
    Strided(1, 8, dense=1), Scattered(0.3), Scattered(0.3, patterns=2),
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("blocks", [(64, 32), (32, 64), (128, 32)])
def test_patterns(pattern: Pattern, blocks: tuple[int, int]) -> None:
    grid = BlockGrid(200, 200, *blocks)
    lists = pattern.lists(grid, 3)
    _agree(_tensors(3, 3, 200, 200, 32), lists, block_m=64, block_n=64)


@pytest.mark.parametrize("causal", [True, False])
def test_windows_are_exact_to_the_token(causal: bool) -> None:
    """The kernel is held against a dense mask that knows nothing of blocks."""
    q, k, v = _tensors(2, 2, 150, 150, 32)
    lists = Windowed(40, 5, full=1).lists(BlockGrid(150, 150, 32, 64, causal=causal), 2)
    out = block_sparse_prefill(
        q, k, v, **lists.inputs(), scale=0.2, causal=causal, query_block=32, key_block=64, **SMALL
    )
    read = torch.stack((
        Mask("causal" if causal else "full").dense(150, 150),
        Mask("window", left=40, sink=5, causal=causal).dense(150, 150),
    ))  # fmt: skip
    logits = (0.2 * q.double() @ k.double().mT).masked_fill(~read, float("-inf"))
    assert_close(out, logits.softmax(3) @ v.double())


@pytest.mark.parametrize("block_n", [16, 32, 64, 128])
@pytest.mark.parametrize("block_m", [16, 64, 256])
@pytest.mark.parametrize("pack", [1, 4])
def test_tiles_change_nothing(block_m: int, block_n: int, pack: int) -> None:
    """Tiles larger than the pattern's blocks are lowered to them."""
    tiles = {"block_m": block_m, "block_n": block_n, "pack": pack}
    lists = Windowed(20, 3).lists(BlockGrid(70, 70, 64, 64), 1)
    _agree(_tensors(4, 1, 70, 70, 32), lists, **tiles)


def test_rows_without_a_block_are_zero() -> None:
    grid = BlockGrid(100, 100, 32, 32, causal=False)
    mask = torch.rand(2, 4, 4) < 0.5
    mask[:, 1] = False
    lists = from_mask(mask, grid)
    tensors = _tensors(2, 2, 100, 100, 32)
    out, lse = block_sparse_prefill(
        *tensors, **lists.inputs(), scale=1.0, causal=False, query_block=32, key_block=32,
        with_lse=True, **SMALL,
    )  # fmt: skip
    assert (out[:, :, 32:64] == 0).all() and lse[:, :, 32:64].isneginf().all()
    _agree(tensors, lists)
    _agree(tensors, from_mask(mask & False, grid))


def test_parts_merge_to_the_whole() -> None:
    """The log-sum-exps of two disjoint sets of blocks are what joins their outputs."""
    grid = BlockGrid(128, 128, 32, 32)
    mask = torch.rand(1, 4, 4) < 0.5
    tensors = _tensors(2, 2, 128, 128, 32)
    shared = torch.zeros(2, dtype=torch.int32)
    fixed: dict[str, Any] = {"scale": 0.2, "query_block": 32, "key_block": 32, "with_lse": True}
    (a, la), (b, lb), (whole, lse) = (
        block_sparse_prefill(*tensors, **from_mask(m, grid, shared).inputs(), **fixed, **SMALL)
        for m in (mask, ~mask, mask | True)
    )
    joined = torch.logaddexp(la, lb)
    out = (la - joined).exp()[..., None] * a + (lb - joined).exp()[..., None] * b
    assert_close(joined, lse)
    assert_close(out, whole)


def test_patterns_of_each_sequence() -> None:
    grid = BlockGrid(100, 100, 32, 32)
    mask = torch.rand(3, 4, 4) < 0.5
    lists = from_mask(mask, grid, torch.tensor([[0, 1], [2, 0]]))
    assert lists.order.shape == (2, 8)
    tensors = _tensors(4, 2, 100, 100, 32, batch=2)
    _agree(tensors, lists)
    _agree(tensors, from_mask(mask, grid, torch.tensor([[2, 1]])))


def test_any_order_and_none() -> None:
    lists = Windowed(40, 5, full=1).lists(BlockGrid(200, 200, 32, 32), 2)
    tensors = _tensors(2, 2, 200, 200, 32)
    fixed: dict[str, Any] = {"scale": 0.2, "query_block": 32, "key_block": 32, **SMALL}
    given = lists.inputs()
    out = block_sparse_prefill(*tensors, **given, **fixed)
    for order in (None, lists.order.flip(0)):
        again = block_sparse_prefill(*tensors, **{**given, "order": order}, **fixed)
        assert torch.equal(again, out)


def test_lists_that_were_not_waited_for() -> None:
    grid = BlockGrid(100, 100, 32, 32)
    lists = from_mask(torch.rand(2, 4, 4) < 0.5, grid, capacity=2 * 4 * 4)
    assert lists.columns.shape == (32,)
    _agree(_tensors(2, 2, 100, 100, 32), lists)


@triton.jit
def _odd(b, h, i, j, data):  # type: ignore[no-untyped-def]
    return (i + j + h) % data[1] != tl.load(data[0] + b)


@triton.jit
def _slope(logits, b, h, i, j, data):  # type: ignore[no-untyped-def]
    return logits - (i - j) * 0.01 * (h + 1)


@pytest.mark.parametrize("pack", [1, 2])
def test_hooks_and_soft_caps(pack: int) -> None:
    """A keep hook cuts the blocks that are marked as partial; a score hook sees all."""
    grid = BlockGrid(100, 100, 32, 32)
    mask = torch.rand(1, 4, 4) < 0.8
    cut = torch.rand(1, 4, 4) < 0.5
    lists = from_mask(mask, grid, partial=cut)
    tensors = _tensors(2, 1, 100, 100, 32, batch=2)
    rest = torch.tensor([0, 2])

    def odd(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i + j + h) % 3 != rest[b]

    def slope(logits: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return logits - (i - j) * 0.01 * (h + 1)

    kept = {"keep_hook": _odd, "data": (rest, 3), "pack": pack}
    _agree(tensors, lists, {"keep_hook": odd}, **kept)
    _agree(tensors, lists, {"score_hook": slope}, score_hook=_slope, pack=pack)
    _agree(tensors, lists, {"keep_hook": odd, "score_hook": slope}, score_hook=_slope, **kept)
    _agree(tensors, lists, softcap=0.7, pack=pack)


@pytest.fixture
def products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bfloat16 as whole numbers of its bits, and `dot` multiplies these:
    they are widened first."""
    plain_dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.usefixtures("products_of_bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    lists = Windowed(40, 5).lists(BlockGrid(100, 100, 32, 32), 1)
    q, k, v = _tensors(2, 1, 100, 100, 64)
    _agree((q.to(dtype), k.to(dtype), v.to(dtype)), lists, pack=2)


def test_strided_inputs() -> None:
    """Heads interleaved with tokens, keys and values in one tensor, a last dimension that is not
    dense."""
    lists = HALF.lists(BlockGrid(70, 70, 32, 32), 2)
    q = torch.randn(1, 70, 4, 32).transpose(1, 2)
    k, v = torch.randn(1, 70, 2, 2, 32).permute(2, 0, 3, 1, 4)
    _agree((q, k, v), lists)
    _agree((q.mT.contiguous().mT, k, v), lists)


def test_nothing_outside_is_read() -> None:
    """Memory around keys and values is NaN."""
    lists = Dense().lists(BlockGrid(70, 70, 32, 64), 1)
    q, k, v = _tensors(1, 1, 70, 70, 40)
    wide = torch.full((2, 1, 3, 90, 64), float("nan"))
    wide[0, :, 1:2, 10:80, :40], wide[1, :, 1:2, 10:80, :40] = k, v
    _agree((q, wide[0, :, 1:2, 10:80, :40], wide[1, :, 1:2, 10:80, :40]), lists)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("name", ["h100", "mi300x", "l4"])
def test_the_kernel_runs_at_its_default(name: str, lse: bool) -> None:
    load = Load(1, 100, 130, "float32")
    spec = BlockSparseSpec(
        4, 2, 64, 32, 0.125, Windowed(40, 5), query_block=32, softcap=2.0, lse=lse
    )
    assert BlockSparsePrefill.supports(spec, target(name)) is None
    kernel = BlockSparsePrefill.default(spec, target(name), load)
    inputs = BlockSparsePrefill.inputs(spec, load)
    found = kernel.run(spec, inputs)
    exact = {k: x.double() if k in ("q", "k", "v") else x for k, x in inputs.items()}
    expected = BlockSparsePrefill.reference(spec, exact)
    assert isinstance(found, tuple) == lse
    for one, other in zip(*(x if lse else (x,) for x in (found, expected)), strict=True):
        assert_close(one, other)


def test_what_is_not_supported_says_why() -> None:
    here = target("h100")
    wide = BlockSparsePrefill.supports(BlockSparseSpec(1, 1, 64, 512, 1.0), here)
    assert wide is not None and "512 is more than 256" in str(wide)
    sign = BlockSparsePrefill.supports(BlockSparseSpec(1, 1, 64, 64, -1.0), here)
    assert sign is not None and "not positive" in str(sign)


def test_lists_of_another_grid_are_refused() -> None:
    tensors = _tensors(2, 2, 100, 100, 32)
    lists = Dense().lists(BlockGrid(64, 64, 32, 32), 2)
    fixed: dict[str, Any] = {"scale": 1.0, "query_block": 32, "key_block": 32}
    with pytest.raises(ValueError, match="lists of 2 query blocks"):
        block_sparse_prefill(*tensors, **lists.inputs(), **fixed)
    right = Dense().lists(BlockGrid(100, 100, 32, 32), 2).inputs()
    with pytest.raises(ValueError, match="an order of 4 lists"):
        block_sparse_prefill(*tensors, **{**right, "order": lists.order}, **fixed)


def test_work_counts_listed_blocks() -> None:
    load = Load(2, 1024, 1024)
    dense = BlockSparseSpec(8, 2, 64, 64, 0.125, causal=False)
    assert BlockSparsePrefill.work(dense, load).flops == 2 * 2 * 8 * 1024 * 1024 * 128
    few = BlockSparseSpec(8, 2, 64, 64, 0.125, Scattered(0.25), causal=False)
    assert BlockSparsePrefill.work(few, load).flops == 2 * 2 * 8 * 1024 * 256 * 128
    tensors = 2 * 2 * (1024 * 8 + 1024 * 2) * 128
    assert BlockSparsePrefill.work(few, load).bytes > tensors
