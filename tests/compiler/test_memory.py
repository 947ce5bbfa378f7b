"""Memory that decoders use again: what is taken from it, by whom, and when it is given back."""

from __future__ import annotations

import mmap
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest
import torch

from attnopt.compiler import native
from attnopt.compiler.native import memory
from attnopt.compiler.native.memory import Memory

LARGE = 1 << 21
SIZES = [((3, 700, 100), torch.float32), ((0, 9), torch.float64), ((7, 300_001), torch.bfloat16)]


@pytest.fixture(autouse=True)
def _built() -> None:
    if why := native.ready():
        pytest.skip(f"the operators cannot be built here: {why}")


def test_several_tensors_are_one_piece_and_share_nothing_for_torch() -> None:
    made = Memory().tensors(SIZES)
    for x, (shape, dtype) in zip(made, SIZES, strict=True):
        assert x.shape == shape and x.dtype == dtype and x.is_contiguous()
        assert not x.data_ptr() % 256 and x._base is None and not x.storage_offset()
        x.fill_(3)
    assert all(bool((x == 3).all()) for x in made)
    assert made[2].data_ptr() - made[0].data_ptr() == -(-made[0].nbytes // 256) * 256
    (small,) = Memory().tensors([((9,), torch.float32)])
    assert small.untyped_storage().resizable() and not small.any()


@pytest.mark.parametrize("size", [10, 2_000_000])  # little, and of what is kept
def test_another_default_device_is_of_no_concern(size: int) -> None:
    with torch.device("meta"):
        (made,) = Memory().tensors([((size,), torch.float32)])
    assert made.device.type == "cpu"


def test_memory_is_used_again_once_nobody_has_a_part_of_it() -> None:
    kept, wanted = Memory(), [((1 << 20,), torch.float32), ((1 << 19,), torch.float32)]
    first = kept.tensors(wanted)
    place = first[0].data_ptr()
    second = kept.tensors(wanted)  # while the first is in use
    assert second[0].data_ptr() != place
    view = first[0][1:]
    del first
    third = kept.tensors(wanted)
    assert third[0].data_ptr() not in (place, second[0].data_ptr()), "a view is left"
    del view
    assert kept.tensors(wanted)[0].data_ptr() == place


def test_large_tensors_of_a_thread_that_keeps_memory_are_taken_from_it() -> None:
    def place(size: int) -> int:
        return torch.empty(size, dtype=torch.uint8).data_ptr()

    kept, size = Memory(), 37 << 20
    with kept.kept():
        x = torch.arange(size // 8)
        at = x.data_ptr()
        assert at % LARGE == 0
        del x
        assert place(size) == place(size - 100) == at, "it is there again, for as much or less"
        assert place(9 << 20) != at, "much less does not take it"
        with kept.kept():
            assert place(size) == at
        assert place(size) == at, "the outer scope goes on"
        others = list[int]()
        (other := Thread(target=lambda: others.append(place(size)))).start()
        other.join()
        assert others != [at]
    assert place(size) != at
    with kept.kept():
        assert place(size) == at


def test_tensors_of_it_are_as_others() -> None:
    with Memory().kept():
        x = torch.ones(5 << 20)
    storage = x.untyped_storage()
    assert storage.resizable()
    x.resize_(7 << 20)
    x[5 << 20 :] = 1
    assert bool((x == 1).all()) and x.data_ptr() == storage.data_ptr()
    assert torch.equal(x.clone(), x) and torch.equal(torch.ones(7 << 20).share_memory_(), x)


def test_threads_get_memory_of_their_own() -> None:
    kept = Memory()

    def work(which: int) -> bool:
        good = True
        for turn in range(12):
            with kept.kept():
                made = [
                    torch.full(((4 + i % 3) << 18,), which, dtype=torch.int64) for i in (0, turn)
                ]
            (more,) = kept.tensors([((1 << 21,), torch.int32)])
            more.fill_(which)
            good &= all(bool((x == which).all()) for x in (*made, more))
        return good

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(24)))


@pytest.mark.parametrize("there", [True, False])
def test_what_is_not_written_to_takes_no_memory(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "loaded", lambda: there)

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * mmap.PAGESIZE

    before = resident()
    (made,) = Memory().tensors([((1 << 28,), torch.float32)])
    made[:100] = 1
    assert resident() - before < 1 << 27


def test_without_the_operators_none_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "loaded", lambda: False)
    kept = Memory()
    for _ in range(2):
        with kept.kept():
            made = kept.tensors([((1 << 21,), torch.float32), ((3,), torch.int32)])
        assert not any(x.any() for x in made) and made[0]._base is None
        made[0].fill_(1)
    monkeypatch.setattr(memory, "mapped", lambda size: None)
    (made,) = kept.tensors([((1 << 21,), torch.float32)])
    assert not made.any()


FORK = """
import os, signal, threading, torch
from attnopt.compiler import native
from attnopt.compiler.native.memory import Memory

assert not native.ready()
kept, going = Memory(), True

def churn():
    while going:
        with kept.kept():
            torch.empty(64 << 20, dtype=torch.uint8)

with kept.kept():
    held = torch.ones(8 << 20, dtype=torch.uint8)
(thread := threading.Thread(target=churn)).start()
hung = 0
for _ in range(40):
    if not (child := os.fork()):
        signal.alarm(5)
        del held
        os._exit(0)
    hung += os.waitpid(child, 0)[1] != 0
going = False
thread.join()
raise SystemExit(hung)
"""


def test_a_process_that_is_forked_can_let_go() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-P", "-c", FORK], capture_output=True)
    assert done.returncode == 0, done.stderr


ALONE = """
import resource, torch
from pathlib import Path
from attnopt.compiler import native
from attnopt.compiler.native.memory import Memory

def mapped(address):
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines]
    return any(int(low, 16) <= address < int(high, 16) for low, high in spans)

def made(memory, size):
    with memory.kept():
        return torch.ones(size << 20, dtype=torch.uint8)

before = torch.ones(20 << 20, dtype=torch.uint8)
assert not native.ready()
one, other = Memory(), Memory()
small, large = made(one, 8), made(other, 40)
places = small.data_ptr(), large.data_ptr()
del small, large
assert all(map(mapped, places)), "as much lies idle as was in use"
third = made(one, 200)
where = third.data_ptr()
del third
assert all(map(mapped, (where, *places))), "and half of that more"
made(one, 90)
assert mapped(where) and not any(map(mapped, places)), "beyond, the oldest is given back"
del one
assert mapped(where), "the other may want it"
left = made(other, 120)
assert left.data_ptr() == where, "not much more than is wanted"
small = made(other, 30)
where = small.data_ptr()
del small
del other
assert not mapped(where) and bool((left == 1).all())
place = left.data_ptr()
del left, before
assert not mapped(place)

now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (400 << 20), resource.RLIM_INFINITY))
last = Memory()
try:
    made(last, 4000)
    raise SystemExit("there is as much?")
except RuntimeError as error:
    assert "allocate memory" in str(error), error
assert bool((made(last, 30) == 1).all())
"""


def test_what_lies_idle_is_given_back() -> None:
    """In a process of its own, where nobody else keeps memory."""
    done = subprocess.run([sys.executable, "-P", "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
