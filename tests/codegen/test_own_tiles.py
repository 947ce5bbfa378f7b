"""Tile sizes that the user tuned on this device are taken there, before what ships."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnopt.autotune import kernel_cache
from attnopt.autotune import kernels as command
from attnopt.autotune.kernel_cache import KernelCache
from attnopt.autotune.kernel_tuner import Tuned, tiles_of
from attnopt.codegen import own_tiles, shipped, ways
from attnopt.codegen.decode_spec import DecodeSpec
from attnopt.codegen.dispatch import Dispatch
from attnopt.codegen.kernel import Kernel, Load
from attnopt.codegen.kernels.flash_prefill import FlashPrefill
from attnopt.codegen.kernels.split_decode import SplitDecode
from attnopt.codegen.own_tiles import own_entries, versions
from attnopt.codegen.shipped import Entry, chosen, kind
from attnopt.codegen.step_ways import StepDispatch
from attnopt.codegen.target import target
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import CAUSAL, AttentionSpec
from tests.autotune.tiled import FakeDevice

H100 = target("h100")
SPEC, LOAD = AttentionSpec(32, 8, 128, 128, 128**-0.5, CAUSAL), Load(1, 8192, 8192)
TILES = {
    "block_m": 64, "block_n": 32, "packed": True, "warps": 8, "stages": 3, "waves": 0, "maxnreg": 0,
    "waves_per_eu": 0, "matrix_instr_nonkdim": 0,
}  # fmt: skip
DEVICE = FakeDevice(lambda kernel, sample: 1.0)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KernelCache]:
    """The user's cache folder, empty."""
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(own_tiles, "driver", lambda: DEVICE.driver)
    own_tiles.forget()
    yield KernelCache()
    own_tiles.forget()


def _tuned(
    cls: type[Kernel[Any]] = FlashPrefill, spec: Any = SPEC, load: Load = LOAD, **changes: Any
) -> Tuned:
    default = tiles_of(cls.default(spec, H100, load))
    made = Tuned(
        cls.name, TILES, default, spec.text, load, "h100", "measured", "a test", 9, {},
        ({"registers": 90, "spills": 0, "shared": 1},), device=DEVICE.name, driver=DEVICE.driver,
        versions=versions(), date="2026-11-22",
    )  # fmt: skip
    return replace(made, **changes)


def _chosen(device: str = DEVICE.name, load: Load = LOAD) -> Kernel[Any]:
    return chosen(FlashPrefill, SPEC, H100, load, device)


DEFAULT = FlashPrefill.default(SPEC, H100, LOAD)


def test_what_was_tuned_here_is_taken_here(cache: KernelCache) -> None:
    assert _chosen() == DEFAULT
    cache.put(_tuned(), FlashPrefill, SPEC, H100, DEVICE)
    assert _chosen() == FlashPrefill(**TILES)
    assert _chosen("") == _chosen("NVIDIA H100 PCIe") == DEFAULT
    assert _chosen(load=Load(1, 16384, 9000)) == FlashPrefill(**TILES)  # not far
    assert _chosen(load=Load(1, 512, 512)) != FlashPrefill(**TILES)
    assert own_entries(SplitDecode, H100, DEVICE.name) == ()


def test_it_goes_before_what_ships(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**TILES, "block_m": 128}
    ships = Entry("flash_prefill", other, SPEC.text, kind(SPEC), LOAD, "measured", "a test")
    monkeypatch.setattr(shipped, "entries", lambda name: (ships,))
    assert _chosen() == FlashPrefill(**other)
    far = replace(LOAD, keys=16384)  # the user's goes before a nearer one that ships
    cache.put(_tuned(load=far), FlashPrefill, SPEC, H100, DEVICE)
    assert _chosen() == FlashPrefill(**TILES)
    assert _chosen("NVIDIA H100 PCIe") == FlashPrefill(**other)


@pytest.mark.parametrize(
    "changes",
    [
        {"versions": {"triton": "2.0", "torch": "2"}},
        {"device": "another"},
        {"driver": "0.9"},
        {"evidence": "estimated"},
    ],
)
def test_it_holds_for_one_device_and_version(changes: dict[str, Any], cache: KernelCache) -> None:
    cache.put(_tuned(**changes), FlashPrefill, SPEC, H100, DEVICE)
    assert _chosen() == DEFAULT


def test_it_holds_for_one_source(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(_tuned(), FlashPrefill, SPEC, H100, DEVICE)
    monkeypatch.setattr(own_tiles, "source_digest", lambda cls: "another")
    assert _chosen() == DEFAULT


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tiles": {**TILES, "block_m": 48}}, "block_m cannot be 48"),
        ({"tiles": {"block_m": 64}}, "its tile sizes are block_m,"),
        ({"took": ({"spills": 0, "shared": 232449},)}, "232449 bytes of shared memory"),
    ],
)
def test_what_is_not_possible_is_told_once(
    changes: dict[str, Any], why: str, cache: KernelCache
) -> None:
    cache.put(_tuned(**changes), FlashPrefill, SPEC, H100, DEVICE)
    with pytest.warns(RuntimeWarning, match=why):
        assert _chosen() == DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _chosen() == DEFAULT


@pytest.mark.parametrize("damage", ["", "[1, 2]", '{"format": 1}', '{"kernel": "til'])
def test_a_damaged_file_is_told_and_passed_over(damage: str, cache: KernelCache) -> None:
    path = cache.put(_tuned(), FlashPrefill, SPEC, H100, DEVICE)
    (path.parent / "flash_prefill-0.json").write_text(damage, encoding="utf-8")
    with pytest.warns(RuntimeWarning, match="A839"):
        assert _chosen() == FlashPrefill(**TILES)


def test_the_newest_of_two_is_taken(cache: KernelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(_tuned(date="2026-11-23"), FlashPrefill, SPEC, H100, DEVICE)
    monkeypatch.setattr(kernel_cache, "versions", lambda: {**versions(), "torch": "another"})
    cache.put(_tuned(tiles={**TILES, "warps": 4}), FlashPrefill, SPEC, H100, DEVICE)
    assert len(own_entries(FlashPrefill, H100, DEVICE.name)) == 2
    assert _chosen() == FlashPrefill(**TILES)


def test_dispatch_launches_with_them(cache: KernelCache) -> None:
    spec, load = DecodeSpec(SPEC), Load(8, 1, 32768)
    tiles = {**tiles_of(SplitDecode.default(spec, H100, load)), "block_n": 256}
    cache.put(_tuned(SplitDecode, spec, load, tiles=tiles), SplitDecode, spec, H100, DEVICE)
    cache.put(_tuned(), FlashPrefill, SPEC, H100, DEVICE)
    asked = SPEC.with_(heads=16, kv_heads=4, backend="triton")
    for device, wide in ((DEVICE.name, True), ("another", False)):
        run: Any = StepDispatch(asked, H100, device=device).kernel(
            "split_decode", DecodeSpec(asked.with_(backend="reference")), load
        )
        assert (run.keywords["block_n"] == 256) == wide


def test_prefill_asks_for_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(ways, "chosen", lambda *given: asked.append(given) or DEFAULT)
    Dispatch(SPEC, H100, device=DEVICE.name)._generated(LOAD, False)
    assert asked == [(FlashPrefill, SPEC, H100, LOAD, DEVICE.name)]


def test_the_command_keeps_what_it_timed(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Here(FakeDevice):
        def misfit(self, target: Any) -> str:
            return ""

    here = Here(lambda kernel, sample: 1.0)
    monkeypatch.setattr(command, "gpu_here", lambda: here)
    monkeypatch.setattr(command, "tune", lambda cls, spec, load, *_, **__: _tuned(cls, spec, load))
    arguments = ["--target", "h100", "--kernel", "flash_prefill"]
    assert command.main(arguments) == 0
    files = list(cache.folder.iterdir())
    assert len(files) == len(FlashPrefill.examples())
    assert {json.loads(file.read_text())["device"] for file in files} == {here.name}
    assert _chosen(here.name) == FlashPrefill(**TILES)

    def full(*_: Any) -> Path:
        raise Problem("A502", "cannot make the folder")

    monkeypatch.setattr(KernelCache, "put", full)
    assert command.main(arguments) == 0
    assert "cannot make the folder" in capsys.readouterr().out


def test_a_spec_in_a_spec_is_of_its_kind() -> None:
    spec = DecodeSpec(SPEC)
    assert kind(spec) == kind(DecodeSpec(SPEC.with_(heads=64, kv_heads=16, scale=1.0)))
    assert kind(spec) != kind(DecodeSpec(SPEC.with_(kv_heads=16)))
