"""Kernels compiled in other processes: what comes back, also where a compiler hangs or crashes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from attnopt.autotune import compile_pool
from attnopt.autotune.compile_pool import CompilePool, Failed, Job
from attnopt.autotune.kernel_tuner import tune
from attnopt.codegen.kernel import Inputs, Load
from attnopt.codegen.kernels.flash_prefill import FlashPrefill
from attnopt.codegen.target import target
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import CAUSAL, AttentionSpec
from tests.codegen.doubling import Doubling
from tests.tree import ROOT

A100, LOAD = target("a100"), Load(1, 1000, 1000)


@dataclass(frozen=True)
class Crashing(Doubling):
    """A kernel that ends the process that asks for its inputs."""

    name: ClassVar[str] = "crashing"

    @classmethod
    def inputs(cls, spec: float, load: Load, device: str = "cpu") -> Inputs:
        os._exit(3)


@dataclass(frozen=True)
class Refusing(Doubling):
    """A kernel whose launcher does not take its tile sizes."""

    name: ClassVar[str] = "refusing"

    def constants(self, spec: float) -> dict[str, Any]:
        raise ValueError("a block of 64 is not for this spec\nand more")


@pytest.fixture(scope="module")
def pool() -> Iterator[CompilePool]:
    """One process, as tests share the machine; it finds the kernels of these tests."""
    with pytest.MonkeyPatch.context() as patched, CompilePool(1, 300.0) as made:
        patched.syspath_prepend(str(ROOT))
        yield made


def test_kernels_compile_in_order_though_this_process_may_interpret(
    pool: CompilePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    jobs = [Job(Doubling(block), 2.0, LOAD, A100) for block in (32, 128)]
    small, large = pool(jobs)
    assert not isinstance(small, Failed) and not isinstance(large, Failed)
    assert [made[0].grid for made in (small, large)] == [(32,), (8,)]
    assert small[0].resources.registers > 0 and small[0].loop.bytes > 0


def test_what_a_launcher_refuses_is_told(pool: CompilePool) -> None:
    (made,) = pool([Job(Refusing(), 2.0, LOAD, A100)])
    assert made == Failed("does not compile", "ValueError: a block of 64 is not for this spec")


def test_a_kernel_that_no_other_process_can_import_is_told(
    pool: CompilePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nowhere", sys.modules[__name__])
    monkeypatch.setattr(Refusing, "__module__", "nowhere")
    (made,) = pool([Job(Refusing(), 2.0, LOAD, A100)])
    assert made == Failed("does not compile", "ModuleNotFoundError: No module named 'nowhere'")


def test_a_process_that_crashes_is_started_again(pool: CompilePool) -> None:
    crashed, made = pool([Job(Crashing(), 2.0, LOAD, A100), Job(Doubling(), 2.0, LOAD, A100)])
    assert crashed == Failed("crashes the compiler", "exit code 3")
    assert not isinstance(made, Failed)


def test_a_process_that_takes_too_long_is_ended(pool: CompilePool) -> None:
    (process,) = [worker.process for worker in pool._workers]
    pool.seconds = 1e-4
    late = pool([Job(Doubling(64, 2), 2.0, LOAD, A100)])
    pool.seconds = 300.0
    assert late == [Failed("takes more than 0.0001 s to compile")]
    assert process is not None and process.poll() is not None
    (made,) = pool([Job(Doubling(64, 2), 2.0, LOAD, A100)])
    assert not isinstance(made, Failed)


def test_no_process_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_pool, "_START", "{path}; raise SystemExit(1)")
    with CompilePool(1) as broken, pytest.raises(Problem, match="no process") as caught:
        broken([Job(Doubling(), 2.0, LOAD, A100)])
    assert caught.value.code == "A835"


def test_a_kernel_is_tuned_for_a_target_that_is_not_here(pool: CompilePool) -> None:
    spec, load = AttentionSpec(8, 2, 128, 128, 128**-0.5, CAUSAL), Load(1, 1024, 1024)
    made = tune(FlashPrefill, spec, load, A100, compile=pool, trials=4)
    default = FlashPrefill.default(spec, A100, load)
    assert made.evidence == "estimated"
    if not made.changed:
        assert made.tried == 1 and made.tiles["block_m"] == default.block_m
    assert made.took[0]["shared"] <= A100.shared_per_block and made.took[0]["spills"] <= 128
