"""Memory in large pages: what lies in it, and that it is let go."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from attnopt.compiler.native import pages
from attnopt.compiler.native.pages import Pages, Room

LARGE = 1 << 21


def _mapped(address: int) -> bool:
    spans = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()
    ]
    return any(int(low, 16) <= address < int(high, 16) for low, high in spans)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("rows", [0, 1, 700, 9000])
def test_zeros(dtype: torch.dtype, rows: int) -> None:
    made = Pages().zeros((rows, 3, 1000), dtype)
    assert torch.equal(made, torch.zeros(rows, 3, 1000, dtype=dtype))
    assert made.dtype == dtype and made.is_contiguous()


def test_tensors_lie_apart_from_each_other() -> None:
    several = Pages()
    made = [several.zeros((100_000 + 777 * i,), torch.float32).fill_(i) for i in range(300)]
    assert all(bool((x == i).all()) for i, x in enumerate(made))
    assert all(x.data_ptr() % 256 == 0 for x in made)


def test_copies_do_not_share_what_was_copied() -> None:
    x = torch.randn(400, 500).t()
    made = Pages().copied(x)
    assert torch.equal(made, x) and made.is_contiguous()
    made[0] = 0
    assert bool(x[0].all())


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="large pages are asked for on Linux")
def test_it_begins_with_a_large_page_and_ends_with_the_last_tensor() -> None:
    several = Pages()
    first, second = (several.zeros((1 << 20,), torch.float32) for _ in range(2))
    at, behind = first.data_ptr(), second.data_ptr()
    assert at % LARGE == 0 and behind == at + first.nbytes
    del several, first
    second += 1
    assert _mapped(behind)
    del second
    assert not _mapped(behind)


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), OverflowError()])
def test_where_the_system_maps_no_more(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert torch.equal(Pages().zeros((70_000,), torch.float32), torch.zeros(70_000))
    (made,) = Room().tensors([((700_000,), torch.float32)])
    assert torch.equal(made, torch.zeros(700_000))


@pytest.mark.parametrize("size", [10, 100_000])
def test_another_default_device_is_of_no_concern(size: int) -> None:
    with torch.device("meta"):
        made = [Pages().zeros((size,), torch.float32)]
        made += Room().tensors([((10 * size,), torch.float32)])
    assert {x.device.type for x in made} == {"cpu"}


def test_threads_get_memory_of_their_own() -> None:
    several, size = Pages(), 50_000
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: several.zeros((size,), torch.float32), range(400)))
    places = sorted(x.data_ptr() for x in made)
    assert all(b - a >= 4 * size for a, b in pairwise(places))


def test_where_a_kernel_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert torch.equal(Pages().zeros((70_000,), torch.float32), torch.zeros(70_000))
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert torch.equal(Pages().zeros((70_000,), torch.float32), torch.zeros(70_000))


SIZES = [((3, 700, 100), torch.float32), ((0, 9), torch.float64), ((7, 300_001), torch.bfloat16)]


def test_a_room_gives_tensors_in_one_piece() -> None:
    made = Room().tensors(SIZES)
    for x, (shape, dtype) in zip(made, SIZES, strict=True):
        assert torch.equal(x, torch.zeros(shape, dtype=dtype)) and x.dtype == dtype
        assert x.is_contiguous() and not x.data_ptr() % 256 and x._base is None
        x.fill_(3)
    assert all(bool((x == 3).all()) for x in made)
    (small,) = Room().tensors([((9,), torch.float32)])
    assert small.untyped_storage().resizable(), "little lies in memory of torch's own"


@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="memory is kept on Linux")
def test_memory_is_used_again_once_nobody_has_a_part_of_it() -> None:
    room = Room()
    first = room.tensors(SIZES)
    place = first[0].data_ptr()
    second = room.tensors(SIZES)  # while the first is in use
    assert second[0].data_ptr() != place
    view = first[0][1]
    del first
    third = room.tensors(SIZES)
    assert third[0].data_ptr() not in (place, second[0].data_ptr()), "a view is left"
    del view
    assert room.tensors(SIZES)[0].data_ptr() == place


@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="memory is kept on Linux")
def test_what_is_not_written_to_takes_no_memory() -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * mmap.PAGESIZE

    room, before = Room(), resident()
    for _ in range(2):
        (made,) = room.tensors([((1 << 28,), torch.float32)])
        made[:100] = 1
        assert resident() - before < 1 << 27
        del made


@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="memory is kept on Linux")
def test_memory_that_is_taken_while_other_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, between any two steps of letting go."""
    room, wanted = Room(), [((1 << 20,), torch.float32)]
    (large,), (other,) = (room.tensors([((n << 20,), torch.float32)]) for n in (4, 2))
    taken = list[torch.Tensor]()

    def between(*given: memoryview, key: Callable[[memoryview], int]) -> memoryview:
        taken.extend(room.tensors(wanted))
        return max(*given, key=key)

    monkeypatch.setattr(pages, "max", between, raising=False)
    del large, other
    monkeypatch.undo()
    assert taken
    taken += [*room.tensors(wanted), *room.tensors(wanted)]
    assert len({x.data_ptr() for x in taken}) == len(taken)


@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="memory is kept on Linux")
def test_a_room_keeps_the_largest_and_ends_with_its_last_tensor() -> None:
    room = Room()
    (large,), (other,) = (room.tensors([((n << 20,), torch.float32)]) for n in (4, 2))
    place, less = large.data_ptr(), other.data_ptr()
    del large, other
    assert _mapped(place) and not _mapped(less)
    (again,) = room.tensors([((3 << 20,), torch.float32)])
    assert again.data_ptr() == place
    del room
    again += 1
    assert _mapped(place)
    del again
    assert not _mapped(place)
