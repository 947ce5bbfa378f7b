"""Tuned tile sizes that are kept: when they are found again, and what is not believed."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attnopt.autotune import kernel_cache
from attnopt.autotune.kernel_cache import KernelCache, kernel_of
from attnopt.autotune.kernel_tuner import Tuned, tune
from attnopt.autotune.statistics import Interval
from attnopt.autotune.timing import Ratio
from attnopt.codegen import own_tiles
from attnopt.codegen.kernel import Load
from attnopt.codegen.kernels.flash_prefill import FlashPrefill
from attnopt.codegen.own_tiles import cache_folder, source_digest
from attnopt.codegen.target import target
from attnopt.compiler.errors import Problem
from tests.autotune.tiled import Compiler, FakeDevice, Tiled, TiledSpec, larger_is_better

H100 = target("h100")
SPEC, LOAD = TiledSpec(8), Load(1, 1024, 1024, "float32")
DEVICE = FakeDevice(lambda kernel, sample: 1.0)


@pytest.fixture
def cache(tmp_path: Path) -> KernelCache:
    return KernelCache(tmp_path)


def _made(**changes: Any) -> Tuned:
    made = tune(Tiled, SPEC, LOAD, H100, compile=Compiler(larger_is_better))
    ratio = Ratio("b", "a", Interval(1.5, 1.4, 1.6, 1.42, 1.58), 25)
    return replace(made, **{"tiles": {"tile": 64, "stages": 3}, "ratio": ratio, **changes})


def test_what_is_kept_is_found_again(cache: KernelCache) -> None:
    assert cache.get(Tiled, SPEC, LOAD, H100) is None
    made = _made()
    path = cache.put(made, Tiled, SPEC, H100)
    assert cache.get(Tiled, SPEC, LOAD, H100) == made
    assert path.parent == cache.folder and path.name.startswith("tiled-")
    assert kernel_of(made, Tiled, SPEC, H100) == Tiled(64, 3)


def test_sizes_of_one_bucket_share_a_file(cache: KernelCache) -> None:
    cache.put(_made(), Tiled, SPEC, H100)
    assert cache.get(Tiled, SPEC, Load(1, 2047, 1500, "float32"), H100) is not None
    for other in (replace(LOAD, queries=2048), replace(LOAD, batch=2), replace(LOAD, keys=1023)):
        assert cache.get(Tiled, SPEC, other, H100) is None
    assert cache.get(Tiled, SPEC, replace(LOAD, dtype="float16"), H100) is None


@pytest.mark.parametrize(
    "other",
    [
        {"spec": TiledSpec(16)},
        {"target": target("h200")},
        {"device": DEVICE},
        {"device": replace(DEVICE, driver="1.3")},
        {"device": replace(DEVICE, name="Another")},
    ],
)
def test_a_result_is_for_one_spec_target_device_and_driver(
    other: dict[str, Any], cache: KernelCache
) -> None:
    given = {"cls": Tiled, "spec": SPEC, "load": LOAD, "target": H100, "device": None}
    assert cache.path(**given) == cache.path(**given)
    assert cache.path(**{**given, **other}) != cache.path(**given)
    if "driver" in str(other) and other["device"].driver == "1.3":
        assert cache.path(**{**given, **other}) != cache.path(**{**given, "device": DEVICE})


def test_a_result_is_for_one_source_default_and_version(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cache.path(Tiled, SPEC, LOAD, H100, None)
    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache, "versions", lambda: {"triton": "9.9", "torch": "1"})
        assert cache.path(Tiled, SPEC, LOAD, H100, None) != before
    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache, "source_digest", lambda cls: "another")
        assert cache.path(Tiled, SPEC, LOAD, H100, None) != before
    with monkeypatch.context() as patch:
        patch.setattr(Tiled, "default", classmethod(lambda cls, *given: Tiled(128)))
        assert cache.path(Tiled, SPEC, LOAD, H100, None) != before
    assert cache.path(Tiled, SPEC, LOAD, H100, None) == before


def test_the_digest_is_of_the_linked_source(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = source_digest(FlashPrefill)
    assert whole == source_digest(FlashPrefill) != source_digest(Tiled)
    linked = SimpleNamespace(imports="import torch", definitions="def f(): ...")
    monkeypatch.setattr(own_tiles, "link", lambda functions: linked)
    assert source_digest(FlashPrefill) == source_digest(Tiled) != whole


_DAMAGED = {
    "empty": "",
    "torn": '{"format": 1, "kernel": "til',
    "not an object": "[1, 2]",
    "of another format": '{"format": 2}',
    "without fields": '{"format": 1, "kernel": "tiled"}',
    "not text": "\udcff",
}


@pytest.mark.parametrize("damage", _DAMAGED.values(), ids=list(_DAMAGED))
def test_a_damaged_file_is_told_and_written_anew(damage: str, cache: KernelCache) -> None:
    path = cache.put(_made(), Tiled, SPEC, H100)
    path.write_bytes(damage.encode("utf-8", "surrogateescape"))
    with pytest.warns(RuntimeWarning, match="A839") as told:
        assert cache.get(Tiled, SPEC, LOAD, H100) is None
    assert str(path) in str(told[0].message)
    with warnings.catch_warnings(), pytest.warns(RuntimeWarning, match="A839"):
        made = cache.tuned(Tiled, SPEC, LOAD, H100, compile=Compiler(larger_is_better))
    assert cache.get(Tiled, SPEC, LOAD, H100) == made


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tiles": {"tile": 48, "stages": 3}}, "tile cannot be 48"),
        ({"tiles": {"tile": 64}}, "its tile sizes are tile,"),
        ({"took": ({"shared": 232449, "spills": 0},)}, "232449 bytes of shared memory"),
        ({"took": ({"shared": 0, "spills": 0}, {"shared": 0, "spills": 500})}, "spills 500 bytes"),
        ({"spec": "tiled{width=9}"}, "about something else"),
    ],
)
def test_what_is_read_is_checked_again(
    changes: dict[str, Any], why: str, cache: KernelCache
) -> None:
    cache.put(_made(**changes), Tiled, SPEC, H100)
    with pytest.warns(RuntimeWarning, match=why):
        assert cache.get(Tiled, SPEC, LOAD, H100) is None


def test_what_the_kernel_no_longer_computes_is_not_read(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(_made(), Tiled, SPEC, H100)
    missed = SimpleNamespace(reason="not any more")
    monkeypatch.setattr(Tiled, "supports", classmethod(lambda cls, spec, target: missed))
    with pytest.warns(RuntimeWarning, match="not any more"):
        assert cache.get(Tiled, SPEC, LOAD, H100) is None


def test_what_is_kept_is_not_tuned_again(cache: KernelCache) -> None:
    compiler = Compiler(larger_is_better)
    first = cache.tuned(Tiled, SPEC, LOAD, H100, compile=compiler)
    count = len(compiler.jobs)
    assert cache.tuned(Tiled, SPEC, LOAD, H100, compile=compiler) == first
    assert len(compiler.jobs) == count == 1


def _write(folder: Path, turns: int) -> None:
    cache, made = KernelCache(folder), _made()
    for turn in range(turns):
        cache.put(replace(made, seed=turn), Tiled, SPEC, H100)
    os._exit(0)


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[list[Any]]:
    """Three processes that write one file over and over."""
    fork = multiprocessing.get_context("fork")
    made = [fork.Process(target=_write, args=(tmp_path, 60)) for _ in range(3)]
    for process in made:
        process.start()
    yield made
    for process in made:
        process.join()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_file_that_others_write_is_whole_whenever_it_is_read(
    writers: list[Any], tmp_path: Path
) -> None:
    cache, read = KernelCache(tmp_path), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        while any(process.is_alive() for process in writers):
            read += cache.get(Tiled, SPEC, LOAD, H100) is not None
    assert read > 0 and [process.exitcode for process in writers] == [0, 0, 0]
    assert len(list(cache.folder.iterdir())) == 1


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path / "own"))
    assert KernelCache().folder == tmp_path / "own" / "kernels"
    monkeypatch.delenv("ATTNOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "xdg" / "attnopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "attnopt"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == Path.home() / "Library/Caches/attnopt"


def test_a_folder_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(Problem, match="cannot make the folder") as caught:
        KernelCache(tmp_path / "file").put(_made(), Tiled, SPEC, H100)
    assert caught.value.code == "A502" and "ATTNOPT_CACHE" in caught.value.help


def test_a_file_is_json_that_a_reader_understands(cache: KernelCache) -> None:
    facts = json.loads(cache.put(_made(), Tiled, SPEC, H100).read_text(encoding="utf-8"))
    assert facts["tiles"] == {"tile": 64, "stages": 3} and facts["evidence"] == "estimated"
    assert facts["load"] == {"batch": 1, "queries": 1024, "keys": 1024, "dtype": "float32"}
    assert facts["ratio"]["interval"]["low"] == 1.4 and facts["versions"]["triton"]
