"""Block lists hold what a dense mask of tokens says, and their order and density are right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnopt.codegen.block_lists import (
    UNBOUNDED,
    BlockGrid,
    BlockLists,
    from_mask,
    schedule,
    side_by_side,
)
from attnopt.codegen.block_sparse_spec import (
    PATTERNS,
    BlockSparseSpec,
    Dense,
    Given,
    Pattern,
    Scattered,
    Strided,
    Windowed,
    parse_block_sparse,
)
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import Mask

GRIDS = st.builds(
    BlockGrid,
    queries=st.integers(1, 150),
    keys=st.integers(1, 150),
    query_block=st.sampled_from([16, 32, 64]),
    key_block=st.sampled_from([16, 32, 64]),
    offset=st.integers(-40, 100),
    causal=st.booleans(),
)


def _tokens(grid: BlockGrid, left: int, sink: int) -> Tensor:
    """Which token reads which, by the rule itself, padded to whole blocks; rows behind the last
    query repeat it."""
    i = torch.arange(grid.rows * grid.query_block).clamp(max=grid.queries - 1)[:, None]
    i = i + grid.offset
    j = torch.arange(grid.columns * grid.key_block)[None, :]
    near = (i - j < left) & ((j - i < left) | grid.causal)
    read = (near | (j < sink)) & (j < grid.keys)
    return read & (j <= i) if grid.causal else read


def _blocks(grid: BlockGrid, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks with some and with all pairs set."""
    cut = tokens.reshape(grid.rows, grid.query_block, grid.columns, grid.key_block)
    return cut.any(3).any(1), cut.all(3).all(1)


def _unpacked(lists: BlockLists) -> tuple[Tensor, Tensor]:
    """The listed blocks, whole and partial, as bool [patterns, rows, columns]; each once."""
    patterns, rows = lists.partial.shape
    found = torch.zeros(2, patterns, rows, lists.grid.columns, dtype=torch.int64)
    for p in range(patterns):
        for r in range(rows):
            first, middle, last = lists.starts[p, r], lists.partial[p, r], lists.starts[p, r + 1]
            for place, part in enumerate(
                (lists.columns[first:middle].long(), lists.columns[middle:last].long())
            ):
                assert (part.diff() > 0).all(), "ascending"
                found[place, p, r, part] += 1
    assert found.sum(0).max() <= 1, "listed once"
    return found[0].bool(), found[1].bool()


@settings(max_examples=150, deadline=None)
@given(grid=GRIDS, left=st.integers(1, 100), sink=st.integers(0, 70))
def test_read_is_what_the_tokens_say(grid: BlockGrid, left: int, sink: int) -> None:
    for size in (left, UNBOUNDED):
        some, every = grid.read(torch.tensor([[size, sink]]))
        wanted, whole = _blocks(grid, _tokens(grid, size, sink))
        assert torch.equal(some[0], wanted)
        # A block that the window and the sink only cover together may count as partial.
        assert not (every[0] & ~whole).any()
        if sink == 0 or size == UNBOUNDED:
            assert torch.equal(every[0], whole)
    assert torch.equal(grid.read()[0][0], _blocks(grid, _tokens(grid, UNBOUNDED, 0))[0])


@settings(max_examples=60, deadline=None)
@given(grid=GRIDS, seed=st.integers(0, 99))
def test_lists_hold_the_mask(grid: BlockGrid, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, grid.rows, grid.columns, generator=made) < 0.5
    cut = torch.rand(1, grid.rows, grid.columns, generator=made) < 0.2
    spans = torch.tensor([[20, 3], [UNBOUNDED, 0], [70, 0]])
    some, every = grid.read(spans)
    whole, partial = _unpacked(from_mask(mask, grid, spans=spans, partial=cut))
    assert torch.equal(whole, mask & every & ~cut)
    assert torch.equal(whole | partial, mask & some)


def test_lists_without_waiting_are_the_same() -> None:
    grid = BlockGrid(200, 200, 32, 32)
    mask = torch.rand(2, 7, 7) < 0.5
    exact, bound = from_mask(mask, grid), from_mask(mask, grid, capacity=98)
    entries = int(exact.starts[-1, -1])
    assert exact.columns.shape == (entries,) and bound.columns.shape == (98,)
    assert torch.equal(bound.columns[:entries], exact.columns)
    assert torch.equal(bound.starts, exact.starts) and torch.equal(bound.partial, exact.partial)
    short = from_mask(mask, grid, capacity=10)
    assert short.starts.max() == 10 and short.partial.max() <= 10
    assert torch.equal(short.columns, exact.columns[:10])


def test_tensors_are_int32_and_rows_meet() -> None:
    lists = Windowed(40, 5, full=1).lists(BlockGrid(200, 200, 32, 32), 3)
    assert all(x is not None and x.dtype == torch.int32 for x in lists.inputs().values())
    assert torch.equal(lists.starts[0, -1], lists.starts[1, 0])
    assert lists.starts.shape == (2, 8) and lists.partial.shape == (2, 7)
    assert lists.to("meta").columns.device.type == "meta"
    assert Dense().lists(BlockGrid(20, 20), 1).to("meta").spans is None


@pytest.mark.parametrize("pattern", [Dense(), Windowed(20, 3), Strided(1, 3), Scattered(0.3)])
@pytest.mark.parametrize("offset", [0, 55])
def test_density_counts_scores(pattern: Pattern, offset: int) -> None:
    grid = BlockGrid(250, 250 + offset, 32, 64, offset)
    lists = pattern.lists(grid, 4)
    whole, partial = _unpacked(lists)
    heads = (whole | partial)[lists.pattern_of.long()]
    full = heads.repeat_interleave(32, 1).repeat_interleave(64, 2)[:, :250, : 250 + offset]
    causal = _blocks(grid, _tokens(grid, UNBOUNDED, 0))[0]
    dense = causal.repeat_interleave(32, 0).repeat_interleave(64, 1)[:250, : 250 + offset].sum()
    assert lists.scores[lists.pattern_of.long()].tolist() == full.sum((1, 2)).tolist()
    assert lists.density() == pytest.approx(full.sum().item() / (4 * dense.item()), abs=1e-12)
    assert (lists.density() == 1.0) == isinstance(pattern, Dense)


def test_windows_are_masks_of_the_specs() -> None:
    for causal in (True, False):
        mask = Mask("window", left=40, sink=5, causal=causal)
        grid = BlockGrid(128, 128, 32, 16, causal=causal)
        lists = Windowed(40, 5).lists(grid, 2)
        whole, partial = _unpacked(lists)
        some, every = _blocks(grid, mask.dense(128, 128))
        assert torch.equal((whole | partial)[0], some) and not (whole[0] & ~every).any()
        assert lists.pattern_of.tolist() == [0, 0] and lists.spans is not None
        assert lists.spans.tolist() == [[40, 5]]


def test_retrieval_heads_stand_before_streaming_heads() -> None:
    lists = Windowed(256, 64, full=2).lists(BlockGrid(2048, 2048), 8)
    assert lists.pattern_of.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert lists.spans is not None and lists.spans.tolist() == [[256, 64], [UNBOUNDED, 0]]
    alone = Windowed(256, 64).lists(BlockGrid(2048, 2048), 8).density()
    assert lists.density() == pytest.approx((2 + 6 * alone) / 8)
    # Whoever reads everything starts first, its last rows before its first.
    assert lists.order[:2].tolist() == [15, 14]
    assert sorted(lists.order.tolist()) == list(range(8 * 16))


def test_strided_patterns_follow_the_paper() -> None:
    """Block (q, k) is kept where k is near or k + the head's shift is a multiple of the stride."""
    lists = Strided(local=2, stride=8, dense=1).lists(BlockGrid(640, 640, 64, 64), 5)
    whole, partial = _unpacked(lists)
    kept = (whole | partial)[lists.pattern_of.long()]
    for head in range(5):
        for q in range(10):
            for k in range(10):
                far = (k + head * max(1, 8 // 5)) % 8 == 0
                wanted = q >= k and (head == 4 or q - k < 2 or far)
                assert kept[head, q, k] == wanted, (head, q, k)
    assert partial.sum(2).eq(1).all(), "the diagonal alone is cut"


def test_strided_units_together_read_everything() -> None:
    grid = BlockGrid(1024, 1024, 64, 64)
    whole, partial = _unpacked(Strided(1, 8).lists(grid, 8))
    assert torch.equal((whole | partial).any(0), torch.ones(16, 16).tril().bool())


def test_strided_blocks_once_left_are_never_read_again() -> None:
    """Positions are those of the sequence, whatever part of it the queries are, and so a key block
    can leave the cache."""
    long, _ = Strided(2, 4).masks(BlockGrid(640, 640, 64, 64), 2)[:2]
    late, _ = Strided(2, 4).masks(BlockGrid(256, 640, 64, 64, offset=384), 2)[:2]
    assert torch.equal(long[:, 6:], late)
    behind = torch.ones(10, 10).tril(-1).bool()
    again = long[:, 1:].int() - long[:, :-1].int()
    assert (again[:, behind[:-1]] <= 0).all()


def test_large_query_blocks_keep_what_their_parts_keep() -> None:
    fine = Strided(2, 4).masks(BlockGrid(512, 512, 64, 64), 4)[0]
    coarse = Strided(2, 4).masks(BlockGrid(512, 512, 128, 64), 4)[0]
    assert torch.equal(coarse, fine.unflatten(1, (4, 2)).any(2))


def test_scattered_blocks_have_the_density() -> None:
    grid = BlockGrid(2048, 2048, 64, 64, causal=False)
    lists = Scattered(0.25).lists(grid, 3)
    assert lists.density() == 0.25
    assert (lists.starts.diff(dim=1) == 8).all()
    assert not torch.equal(lists.columns[: 8 * 32], lists.columns[8 * 32 : 2 * 8 * 32])
    causal = Scattered(0.25, patterns=2).lists(BlockGrid(2048, 2048, 64, 64), 3)
    assert causal.pattern_of.tolist() == [0, 1, 0]
    whole, partial = _unpacked(causal)
    assert (whole | partial).diagonal(dim1=1, dim2=2).all()
    assert causal.density() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(causal.columns, Scattered(0.25, 2).lists(causal.grid, 3).columns)


def test_heavy_lists_come_first_and_sections_stay_together() -> None:
    starts = torch.tensor([[0, 1, 3, 6], [6, 7, 7, 8]])  # lists of 1, 2, 3 and of 1, 0, 1 blocks
    pattern_of = torch.tensor([1, 0, 0])
    assert schedule(starts, pattern_of, 1).tolist() == [5, 4, 3, 8, 7, 6, 0, 2, 1]
    assert schedule(starts, pattern_of, 2).tolist() == [5, 8, 4, 7, 3, 6, 0, 2, 1]
    per_sequence = schedule(starts, torch.tensor([[1, 0], [0, 1]]), 1)
    assert per_sequence.tolist() == [[5, 4, 3, 0, 2, 1], [2, 1, 0, 3, 5, 4]]
    assert side_by_side(32768, 256, 2) == 1 and side_by_side(4096, 128, 2) == 24


def test_shapes_that_disagree_are_refused() -> None:
    grid = BlockGrid(100, 100, 32, 32)
    with pytest.raises(Problem) as shape:
        from_mask(torch.ones(4, 4, dtype=torch.bool), grid)
    assert shape.value.code == "A816" and "[patterns, 4, 4]" in shape.value.help
    with pytest.raises(Problem, match="spans of shape") as spans:
        from_mask(torch.ones(2, 4, 4, dtype=torch.bool), grid, spans=torch.ones(1, 2))
    assert spans.value.code == "A816"
    for wrong in ({"queries": 0, "keys": 1}, {"queries": 9, "keys": 9, "key_block": 48}):
        with pytest.raises(Problem) as sizes:
            BlockGrid(**wrong)
        assert sizes.value.code == "A815"


EXAMPLES: tuple[Pattern, ...] = (
    Dense(), Windowed(), Windowed(1024, 4, 2), Strided(4, 16, 1), Scattered(0.5, 4, 1), Given(0.1),
)  # fmt: skip


@pytest.mark.parametrize("pattern", EXAMPLES)
def test_specs_are_lines_of_text(pattern: Pattern) -> None:
    spec = BlockSparseSpec(
        8, 2, 64, 32, 0.125, pattern, causal=False, query_block=64, softcap=2.0, per_head=True
    )
    assert parse_block_sparse(spec.text) == spec
    assert type(pattern) in PATTERNS.values()
    assert hash(spec) == hash(parse_block_sparse(spec.text))


def test_specs_say_what_is_wrong() -> None:
    for line in ("attn{heads=1}", "block_sparse{pattern=checkered}", "block_sparse{hats=1}"):
        with pytest.raises(Problem) as unread:
            parse_block_sparse(line)
        assert unread.value.code == "A601"
    for heads, kv_heads in ((0, 1), (3, 2)):
        with pytest.raises(Problem) as sizes:
            BlockSparseSpec(heads, kv_heads, 64, 64, 1.0)
        assert sizes.value.code == "A817"
    with pytest.raises(Problem) as block:
        BlockSparseSpec(1, 1, 64, 64, 1.0, query_block=100)
    assert block.value.code == "A815"


def test_lists_of_a_spec_end_where_the_keys_end() -> None:
    spec = BlockSparseSpec(8, 2, 64, 64, 0.125, Windowed(40, 5), query_block=32)
    lists = spec.lists(50, 80)
    assert lists.grid.offset == 30 and lists.pattern_of.shape == (2,)
    assert spec.lists(50, 80) is lists
    own = BlockSparseSpec(8, 2, 64, 64, 0.125, Given(), per_head=True)
    assert own.lists(50, 80).pattern_of.shape == (8,) and own.group == 4
