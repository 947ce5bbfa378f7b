"""The GPU benchmark, as far as it goes without one: what it checks, how it judges, what it says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
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
from benchmarks.gpu_cases import _with_forward, cases  # noqa: E402
from benchmarks.gpu_draws import Draw  # noqa: E402
from benchmarks.gpu_peers import sdpa_backward  # noqa: E402
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
    rounds = [order[at : at + 2] for at in range(6, 18, 2)]  # a round for each input went before
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
    found = gpu_check.check(FlashPrefill, Draw(SPEC, load), H100, "cpu")
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
        return gpu_check.check(FlashPrefill, Draw(SPEC, load), H100, "cpu").wrong

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


def test_a_figure_that_nothing_is_asked_of_is_told() -> None:
    bar = Bar(1.0, ("slow",), asked=False)
    case = Case("small", "flash_prefill", SPEC, SMALL, (bar,), {"slow": _peer("slow")})
    clock = _clock({"<lambda>": 2.0, "slow": 1.0})
    _, (outcome,), _ = measure(case, H100, 1.0, "cpu", 2, clock)
    assert outcome.value == 0.5 and outcome.met is None
    assert bar.words == "attnopt against slow"


def test_a_peer_of_other_numbers_or_of_another_shape_is_left_out() -> None:
    def off(change: Callable[[torch.Tensor], Any]) -> Callable[[], Any]:
        def make() -> Any:
            return lambda given: change(FlashPrefill.reference(SPEC, dict(given)))  # type: ignore[arg-type]

        return make

    peers = {
        "right": off(lambda out: out), "wrong": off(lambda out: out * 1.1),
        "narrow": off(lambda out: out[:, :1]), "two": off(lambda out: (out, out)),
    }  # fmt: skip
    case = Case(
        "small", "flash_prefill", SPEC, SMALL, (), peers, same=("right", "wrong", "narrow"),
        alike=(("two", "right"),),
    )  # fmt: skip
    taken, _, absent = measure(case, H100, 1.0, "cpu", 2, _clock({"<lambda>": 1.0}))
    assert set(taken.samples) == {OURS, "right"}
    assert absent["narrow"] == absent["two"] == "computes something else: another shape"
    assert absent["wrong"] == "computes something else: 1.0e-01 apart"


@pytest.mark.slow
def test_gradients_are_those_of_the_peer() -> None:
    (case,) = (c for c in cases() if "backward" in c.name)
    spec = case.spec.with_(heads=2, kv_heads=2, head_dim=32, v_dim=32, scale=32**-0.5)
    load = Load(1, 40, 40, "float32")
    small = replace(
        case, spec=spec, load=load, prepare=_with_forward(spec),
        peers={"math": lambda: sdpa_backward("MATH")}, same=("math",),
        bars=(Bar(1.0, ("math",), asked=False),),
    )  # fmt: skip
    _, (outcome,), absent = measure(small, H100, 1.0, "cpu", 2, lambda run: float(bool(run())))
    assert outcome.value == 1.0 and not absent
    wrong = replace(small, prepare=lambda given, load: {**given, "lse": given["lse"] + 1})
    _, (outcome,), absent = measure(wrong, H100, 1.0, "cpu", 2, lambda run: float(bool(run())))
    assert outcome.value is None and "apart" in absent["math"]


def test_peers_of_latent_decoding_say_why_they_are_not_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (case, _) = (c for c in cases() if c.kernel == "latent_decode")
    said = {name: make() for name, make in case.peers.items()}
    assert all("is not installed" in str(reason) for reason in said.values()) and len(said) == 2


class _Wrapper:
    """FlashInfer's interface for latents, in plain torch."""

    def __init__(self, space: torch.Tensor) -> None:
        self.given: tuple[Any, ...] = ()

    def plan(self, *given: Any) -> None:
        self.given = given

    def run(self, q: Any, q_rope: Any, latents: Any, k_rope: Any) -> torch.Tensor:
        queries, pages, order, lengths, heads, rank, rope, page, causal, scale, *_ = self.given
        assert queries.tolist() == list(range(len(q) + 1)) and not causal
        assert (heads, rank, rope) == (q.shape[1], q.shape[2], q_rope.shape[2])
        out = []
        for at in range(len(q)):
            mine = order[pages[at] : pages[at + 1]].long()
            values, rotary = latents[mine].flatten(0, 1), k_rope[mine].flatten(0, 1)
            assert len(values) == lengths[at] == len(mine) * page
            logits = (q[at] @ values.T + q_rope[at] @ rotary.T) * scale
            out.append(logits.softmax(-1) @ values)
        return torch.stack(out)


def _flash_mla(
    q: Any, cache: Any, table: Any, lengths: Any, wide: int, plan: str, splits: None, scale: float,
    causal: bool,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """FlashMLA's interface, in plain torch."""
    assert plan == "a plan" and splits is None and not causal
    keys = cache[table.long()].flatten(1, 2)[:, :, 0]
    assert (lengths == keys.shape[1]).all()
    weights = (torch.einsum("bshd,btd->bsht", q, keys) * scale).softmax(-1)
    return torch.einsum("bsht,btd->bshd", weights, keys[..., :wide]), None


@pytest.mark.slow
def test_peers_of_latent_decoding_are_called_as_they_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer, mla, flash = (ModuleType(n) for n in ("flashinfer", "flashinfer.mla", "flash_mla"))
    mla.BatchMLAPagedAttentionWrapper = _Wrapper  # type: ignore[attr-defined]
    flashinfer.mla = mla  # type: ignore[attr-defined]
    flash.flash_mla_with_kvcache = _flash_mla  # type: ignore[attr-defined]
    flash.get_mla_metadata = lambda lengths, rows, heads: ("a plan", None)  # type: ignore[attr-defined]
    for module in (flashinfer, mla, flash):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    (case, _) = (c for c in cases() if c.kernel == "latent_decode")
    small = replace(
        case, spec=replace(case.spec, heads=4, rank=64, rope=16), load=Load(2, 1, 128, "float32"),
        composed={},
    )  # fmt: skip
    taken, _, absent = measure(small, H100, 1.0, "cpu", 2, lambda run: float(run() is not None))
    assert set(taken.samples) == {OURS, "FlashInfer", "FlashMLA"} and not absent
    monkeypatch.setattr(_Wrapper, "run", lambda *given: torch.zeros(2, 4, 64))
    taken, _, absent = measure(small, H100, 1.0, "cpu", 2, lambda run: float(run() is not None))
    assert "FlashInfer" not in taken.samples and "apart" in absent["FlashInfer"]
