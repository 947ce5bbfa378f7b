"""Which of torch's fused kernels runs an attention: the fastest that agrees with torch's choice."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.codegen.fused import Fused, _rivals
from attnopt.compiler import attend
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec
from tests.tolerance import assert_close

SPEC = AttentionSpec(4, 2, 32, 32, 32**-0.5, CAUSAL)


def _inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    heads = (SPEC.heads, SPEC.kv_heads, SPEC.kv_heads)
    return tuple(torch.randn(2, h, 40, 32, dtype=dtype) for h in heads)  # type: ignore[return-value]


def _wanted(inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    q, k, v = (x.double() for x in inputs)
    return attend.reference(q, k, v, (), SPEC)


class Stage:
    """Rivals whose calls take as long as they are told to."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.calls, self.last = seconds, list[str](), ""

    def rival(self, name: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.last = name
            self.calls.append(name)
            return change(attend.sdpa(q, k, v, (), SPEC))

        return run

    def clock(self, run: Callable[[], object]) -> float:
        self.last = "torch"
        run()
        return self.seconds[self.last]


def test_the_fastest_is_taken_and_later_calls_run_it_alone() -> None:
    stage = Stage(torch=1e-3, slow=2e-3, fast=0.5e-3)
    fused = Fused(SPEC, {"slow": stage.rival("slow"), "fast": stage.rival("fast")}, stage.clock)
    inputs = _inputs()
    first = fused(*inputs)
    assert fused.chosen == "fast"
    assert {*stage.calls} == {"slow", "fast"}
    stage.calls.clear()
    assert_close(fused(*inputs), first)
    assert stage.calls == ["fast"]


def test_the_choice_stays_torchs_where_another_is_hardly_faster() -> None:
    stage = Stage(torch=1e-3, other=0.98e-3)
    fused = Fused(SPEC, {"other": stage.rival("other")}, stage.clock)
    fused(*_inputs())
    assert fused.chosen == ""
    stage.calls.clear()
    fused(*_inputs())
    assert not stage.calls


def test_one_that_fails_or_computes_something_else_is_not_timed() -> None:
    def failing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("no kernel for these")

    stage = Stage(torch=1e-3, wrong=1e-4, shaped=1e-4, empty=1e-4)
    rivals = {
        "failing": failing,
        "wrong": stage.rival("wrong", lambda x: x * 1.1),
        "shaped": stage.rival("shaped", lambda x: x.transpose(1, 2)),
        "empty": stage.rival("empty", lambda x: x * float("nan")),
    }
    fused = Fused(SPEC, rivals, stage.clock)
    inputs = _inputs()
    for _ in range(2):
        assert_close(fused(*inputs), _wanted(inputs))
    assert fused.chosen == ""
    assert stage.calls == ["wrong", "shaped", "empty"]


def test_one_that_fails_later_is_given_up() -> None:
    """Operands of another layout, in the same bucket."""
    stage = Stage(torch=1e-3, other=1e-4)
    run = stage.rival("other")

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.stride(-1) != 1:
            raise RuntimeError("the last dimension is not dense")
        return run(q, k, v)  # type: ignore[no-any-return]

    fused = Fused(SPEC, {"other": dense}, stage.clock)
    q, k, v = _inputs()
    fused(q, k, v)
    assert fused.chosen == "other"
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert_close(fused(turned, k, v), _wanted((q, k, v)))
    assert fused.chosen == ""


@pytest.mark.parametrize("when", ["compared", "timed"])
def test_trials_that_run_out_of_memory_leave_torchs_choice(when: str) -> None:
    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if when == "compared" or stage.calls:
            raise torch.OutOfMemoryError("full")
        return stage.rival("other")(q, k, v)  # type: ignore[no-any-return]

    stage = Stage(torch=1e-3, other=1e-4)
    fused = Fused(SPEC, {"other": full}, stage.clock)
    inputs = _inputs()
    for _ in range(2):
        assert_close(fused(*inputs), _wanted(inputs))
    assert fused.chosen == ""


def test_nothing_is_timed_where_there_is_one_kernel() -> None:
    stage = Stage(torch=1e-3, other=1e-4)
    fused = Fused(SPEC, {"other": stage.rival("other")}, stage.clock)
    fused(*_inputs(torch.float32))
    assert not stage.calls


def test_time_may_choose_only_where_nothing_forbids_it() -> None:
    stage = Stage(torch=1e-3, other=1e-4)
    fused, inputs = Fused(SPEC, {"other": stage.rival("other")}, stage.clock), _inputs()
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        fused(*inputs)
        assert not stage.calls
        torch.use_deterministic_algorithms(False)
        fused(*inputs)
        assert fused.chosen == "other"
        stage.calls.clear()
        torch.use_deterministic_algorithms(True)
        fused(*inputs)
        assert not stage.calls
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_kernel_that_is_switched_off_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    for run in _rivals(SPEC).values():
        with pytest.raises(RuntimeError, match="switched off"):
            run(*_inputs())


def test_long_calls_are_timed_a_few_times_only() -> None:
    stage = Stage(torch=0.04, other=0.03)
    fused = Fused(SPEC, {"other": stage.rival("other")}, stage.clock)
    fused(*_inputs())
    assert fused.chosen == "other"
    assert len(stage.calls) == 2  # compared, and timed once


def test_operators_of_torch_compute_the_spec() -> None:
    """The CPU's own fused operator stands in for a GPU's, of which only the schemas are here."""

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        made: Tensor = operator(q, k, v, 0.0, True, scale=SPEC.scale)[0]
        return made

    def clock(run: Callable[[], object]) -> float:
        begun = perf_counter()
        run()
        return perf_counter() - begun

    inputs = _inputs()
    fused = Fused(SPEC, {"own": own}, clock)
    for _ in range(2):
        assert_close(fused(*inputs), _wanted(inputs))


@pytest.mark.parametrize("mask", [CAUSAL, FULL])
def test_a_gpus_operators_take_what_they_are_given(mask: Any) -> None:
    """By their schemas, on tensors without values."""
    spec = SPEC.with_(mask=mask)
    shapes = [(2, 4, 40, 32), (2, 2, 40, 32), (2, 2, 40, 32)]
    q, k, v = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes)
    for name, run in _rivals(spec).items():
        assert run(q, k, v).shape == q.shape, name
