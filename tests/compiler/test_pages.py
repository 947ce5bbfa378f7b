"""Memory in large pages: what lies in it, and that it is let go."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from attnopt.compiler.native.pages import Pages

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


def test_what_is_joined_is_copied() -> None:
    parts = [torch.randn(400, 500).t(), torch.randn(3, 400)]
    made = Pages().joined(parts)
    assert torch.equal(made, torch.cat(parts)) and made.is_contiguous()
    made[0] = 0
    assert bool(parts[0][0].all())


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


@pytest.mark.parametrize("size", [10, 100_000])
def test_another_default_device_is_of_no_concern(size: int) -> None:
    with torch.device("meta"):
        made = Pages().zeros((size,), torch.float32)
    assert made.device.type == "cpu"


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
