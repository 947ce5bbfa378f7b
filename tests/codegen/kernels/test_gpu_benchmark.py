"""The GPU benchmark, as far as it goes without one: what it checks, how it judges, what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnopt.codegen.kernel import Load
from attnopt.codegen.kernels.flash_prefill import FlashPrefill
from attnopt.codegen.target import target
from attnopt.compiler.spec import CAUSAL, AttentionSpec
from tests.tree import benchmarks

benchmarks()

from benchmarks import gpu, gpu_check  # noqa: E402
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
