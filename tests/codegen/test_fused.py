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


@pytest.mark.parametrize("why", ["float32", "deterministic"])
def test_nothing_is_timed_where_one_kernel_is_there_or_time_may_not_choose(why: str) -> None:
    stage = Stage(torch=1e-3, other=1e-4)
    fused = Fused(SPEC, {"other": stage.rival("other")}, stage.clock)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(why == "deterministic")
        fused(*_inputs(torch.float32 if why == "float32" else torch.bfloat16))
    finally:
        torch.use_deterministic_algorithms(before)
    assert not stage.calls


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
