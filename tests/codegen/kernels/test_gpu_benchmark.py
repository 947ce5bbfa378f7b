"""The GPU benchmark, as far as it goes without one: what it checks, how it judges, what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from attnopt.codegen.kernel import Load
from attnopt.codegen.kernels.flash_prefill import FlashPrefill
from attnopt.codegen.target import target
from attnopt.compiler.spec import CAUSAL, AttentionSpec
from tests.tree import benchmarks

benchmarks()

from benchmarks import gpu, gpu_check, gpu_overhead  # noqa: E402
from benchmarks.gpu_case import OURS, Bar, Case, measure  # noqa: E402
from benchmarks.gpu_cases import cases  # noqa: E402
from benchmarks.gpu_timing import sets_beyond, times  # noqa: E402

H100 = target("h100")
SPEC = AttentionSpec(4, 2, 32, 32, 32**-0.5, CAUSAL)
SMALL = Load(1, 20, 20, "float32")


def _clock(seconds: dict[str, float]) -> Callable[[Any], float]:
    """A clock that knows how long each contender takes, by the name of its function."""

    def clock(run: Any) -> float:
        run()
        return seconds[run.func.__name__]

    return clock


def _peer(name: str) -> Callable[[], Any]:
    def make() -> Any:
        def run(given: dict[str, Any]) -> Any:
            return given["q"]

        run.__name__ = name
        return run

    return make


def test_every_round_times_all_contenders_in_turning_order() -> None:
    order: list[str] = []

    def one(given: int) -> None:
        order.append(f"one {given}")

    def two(given: int) -> None:
        order.append(f"two {given}")

    taken = times({"one": one, "two": two}, [0, 1, 2], 6, _clock({"one": 1.0, "two": 2.0}))
    assert taken.samples == {"one": (1.0,) * 6, "two": (2.0,) * 6}
    assert taken.ratio("one", "two") == (2.0, 2.0, 2.0)
    rounds = [order[at : at + 2] for at in range(4, 16, 2)]  # two rounds went before
    assert {first.split()[0] for first, _ in rounds} == {"one", "two"}
    assert [first.split()[1] for first, _ in rounds] == ["0", "1", "2"] * 2


def test_sets_of_inputs_exceed_the_cache_together() -> None:
    assert sets_beyond(50 << 20, 25 << 20) == 7
    assert sets_beyond(50 << 20, 1 << 30) == 2 and sets_beyond(50 << 20, 1.0) == 8


def test_a_case_is_judged_by_the_fastest_peer_that_is_there() -> None:
    case = Case(
        "small", "flash_prefill", SPEC, SMALL,
        (Bar(1.5, ("slow", "quick")), Bar(1.0, ("absent",)), Bar(0.5, of="bandwidth")),
        {"slow": _peer("slow"), "quick": _peer("quick"), "absent": lambda: "not installed"},
    )  # fmt: skip
    moved = case.work().bytes
    taken, outcomes, absent = measure(
        case, H100, bandwidth=moved / 0.25, device="cpu", rounds=4,
        clock=_clock({"<lambda>": 1.0, "slow": 9.0, "quick": 2.0}),
    )  # fmt: skip
    assert taken.median(OURS) == 1.0
    assert [outcome.value for outcome in outcomes] == [2.0, None, 0.25]
    assert [outcome.met for outcome in outcomes] == [True, None, False]
    assert absent == {"absent": "not installed"}


def test_a_peer_that_fails_is_left_out_with_its_error() -> None:
    def broken() -> Any:
        def run(given: dict[str, Any]) -> Any:
            raise RuntimeError("no kernel for this head dimension\nand more")

        return run

    case = Case("small", "flash_prefill", SPEC, SMALL, (Bar(1.0, ("bad",)),), {"bad": broken})
    _, (outcome,), absent = measure(case, H100, 1.0, "cpu", 2, _clock({"<lambda>": 1.0}))
    assert outcome.met is None
    assert absent == {"bad": "RuntimeError: no kernel for this head dimension"}


@pytest.mark.parametrize("length", [1, 63])
def test_kernels_are_checked_against_float64(length: int) -> None:
    load = Load(2, length, length, "float32")
    found = gpu_check.check(FlashPrefill, SPEC, load, H100, "cpu")
    assert not found.wrong and found.error < 1e-5
    assert length == 1 or found.error > 0


def test_gradients_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def checked(name: str) -> list[gpu_check.Checked]:
        return list(gpu_check.check_gradients(target(name), "cpu", (20,), "float32"))

    found = checked("h100")
    assert len(found) == 3 and all(0 < x.error < 1e-5 and not x.wrong for x in found)
    assert all("no matrix units" in x.skipped for x in checked("t4"))
    right = gpu_check.flash_attention
    monkeypatch.setattr(gpu_check, "flash_attention", lambda *given: right(*given) * 1.01)
    assert all("an error of" in x.wrong for x in checked("h100"))
    monkeypatch.setattr(gpu_check, "flash_attention", lambda *given: given[99])
    assert all(x.wrong.startswith("IndexError") for x in checked("h100"))


def test_the_check_finds_wrong_missing_and_moving_results(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FlashPrefill.run
    load = Load(1, 16, 16, "float32")

    def told(change: Callable[[torch.Tensor], torch.Tensor]) -> str:
        monkeypatch.setattr(FlashPrefill, "run", lambda *given: change(right(*given)))  # type: ignore[arg-type]
        return gpu_check.check(FlashPrefill, SPEC, load, H100, "cpu").wrong

    def unwritten(out: torch.Tensor) -> torch.Tensor:
        out[0, 0, 3] = float("nan")
        return out

    assert told(lambda out: out * 1.01).startswith("an error of")
    assert told(unwritten) == "an error of inf"
    assert told(lambda out: out * (1 + 1e-6 * torch.rand(()))) == "moves between runs"


def test_the_hosts_path_is_measured_against_the_same_launches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Graphs are stood for by calls that are made again, of which one is late by an input."""

    def again(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], object]]:
        out = call()
        return out, lambda: out.copy_(call())

    monkeypatch.setattr(gpu_overhead, "captured", again)
    monkeypatch.setattr(gpu_overhead, "BAR", 10.0)  # kernels are interpreted here
    spec = gpu_overhead._SPEC.with_(heads=2, kv_heads=1, head_dim=16, v_dim=16)
    monkeypatch.setattr(gpu_overhead, "_SPEC", spec)
    for name, value in {"_CALLS": 1, "_TOKENS": 16, "_KEYS": 300}.items():
        monkeypatch.setattr(gpu_overhead, name, value)
    few = replace(H100, units=4)
    told = gpu_overhead.host_path(few, "cpu", rounds=1)
    assert not told["wrong"] and told["a prompt"]["launches"] == 1
    assert told["a step"]["launches"] == 2  # the parts and their merge
    assert told["a step"]["seconds"] > 0 and told["a step"]["graph_error"] == 0.0
    assert capsys.readouterr().out.count("gives the same bits") == 2

    monkeypatch.setattr(gpu_overhead, "captured", lambda call: (call(), call))
    late = {"overhead_seconds": 11.0, "launches": 1.0}
    monkeypatch.setattr(gpu_overhead, "overhead", lambda *_: late)
    told = gpu_overhead.host_path(few, "cpu", rounds=1)
    said = capsys.readouterr().out
    assert told["wrong"] and said.count("MISSED") == 2 and said.count("WRONG") == 2

    monkeypatch.setattr(gpu_overhead, "overhead", lambda *_: 1 / 0)
    told = gpu_overhead.host_path(few, "cpu", rounds=1)
    assert told["wrong"] and "ZeroDivisionError" in told["a step"]["failed"]


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().out


def test_every_line_is_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--estimate", "h100"]) == 0
    said = capsys.readouterr().out
    assert "not measured" in said
    assert all(case.name in said for case in cases())
    rows = said.splitlines()[1:]
    assert len(rows) == len(cases()) and all(row.endswith("estimated") for row in rows)
