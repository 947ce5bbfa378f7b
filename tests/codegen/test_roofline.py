"""Estimates against the roofline by hand, and always labelled as estimates."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from attnopt.codegen.kernel import Work
from attnopt.codegen.roofline import ASSUMED, estimate, estimated
from attnopt.codegen.target import target
from attnopt.compiler.cost import Workload, cost
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Batch, Program
from tests.decoder import decoder


def _product(rows: int, inner: int, columns: int) -> Program:
    x = torch.randn(rows, inner)
    module = torch.export.export(nn.Linear(inner, columns, bias=False), (x,), strict=False).module()
    assert isinstance(module, torch.fx.GraphModule)
    return Program(module, Batch((x,)))


def test_a_large_product_is_bound_by_arithmetic() -> None:
    got = estimate(_product(2048, 2048, 2048), target("a100"), dtype="bfloat16")
    assert got.seconds == pytest.approx(2 * 2048**3 / (312e12 * ASSUMED["matmul"]))
    assert got.bound == "arithmetic" and got.dtype == "bfloat16"


def test_a_thin_product_is_bound_by_memory_in_the_dtype_it_runs_in() -> None:
    program, a100 = _product(1, 2048, 2048), target("a100")
    moved = 2048 + 2048 * 2048 + 2048
    full, half = estimate(program, a100), estimate(program, a100, dtype="bfloat16")
    assert full.seconds == pytest.approx(4 * moved / (2.039e12 * ASSUMED["bandwidth"]))
    assert half.seconds == pytest.approx(full.seconds / 2) and half.bound == "memory"


def test_attention_takes_the_share_that_the_target_states() -> None:
    program, a100, load = decoder(), target("a100"), Workload(64, 8192)
    got = estimate(program, a100, load, dtype="bfloat16")
    counted = cost(program, load)
    core = counted.site_core_flops["s0"] / (312e12 * a100.achievable["attention"])
    assert got.site_s["s0"] > core
    assert got.assumed == ("matmul", "bandwidth")
    assert 0 < got.share("s0") < 0.5 and got.load == load


def test_a_faster_device_is_estimated_faster() -> None:
    program, load = decoder(), Workload(8, 2048)
    slow, fast = (estimate(program, target(name), load, "float16") for name in ("t4", "h100"))
    assert fast.seconds < slow.seconds / 5


def test_every_result_says_that_it_is_an_estimate() -> None:
    said = json.loads(json.dumps(estimate(decoder(), target("l4")).as_json()))
    assert said["evidence"] == "estimated" and "datasheet" in said["source"]
    assert said["achievable"]["matmul"] == ASSUMED["matmul"] and said["model"]


def test_the_cpu_is_not_estimated() -> None:
    with pytest.raises(Problem, match="measured, not estimated") as caught:
        estimate(decoder(), target("cpu"))
    assert caught.value.code == "A405"


def test_a_dtype_that_the_target_lacks_is_said() -> None:
    with pytest.raises(Problem, match="no peak for bfloat16") as caught:
        estimate(decoder(), target("t4"), dtype="bfloat16")
    assert "float16" in caught.value.why


def test_one_kernel_takes_the_longer_of_its_arithmetic_and_its_traffic() -> None:
    on = target("a100")  # 312e12 at 0.6 of its own file, 2.039e12 at the 0.8 that is assumed
    assert estimated(Work(312e12 * 0.6, 1.0), "bfloat16", on) == pytest.approx(1.0)
    assert estimated(Work(1.0, 2.039e12 * 0.8 * 3), "bfloat16", on) == pytest.approx(3.0)
    with pytest.raises(Problem, match="no peak for bfloat16"):
        estimated(Work(1.0, 1.0), "bfloat16", target("t4"))


def test_a_kernel_without_matrix_instructions_takes_the_float32_peak() -> None:
    on = target("t4")
    assert estimated(Work(8.1e12 * 0.4, 1.0), "float16", on) == pytest.approx(1.0)
    assert estimated(Work(8.1e12 * 0.4, 1.0), "float32", on) == pytest.approx(1.0)
