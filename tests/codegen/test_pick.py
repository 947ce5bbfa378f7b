"""pick: the fastest by estimate of the kernels that compute a spec, or why there is none."""

from __future__ import annotations

from typing import ClassVar

import pytest

from attnopt.codegen import pick as picking
from attnopt.codegen.kernel import Load, Work, kernels
from attnopt.codegen.pick import Picked, pick
from attnopt.codegen.roofline import estimated
from attnopt.codegen.target import Target, target
from attnopt.compiler.contract import Miss
from attnopt.compiler.spec import CAUSAL, AttentionSpec
from tests.codegen.doubling import Doubling

H100 = target("h100")


class Lazy(Doubling):
    """Says that it has half the work, and refuses one factor."""

    name: ClassVar[str] = "lazy"

    @classmethod
    def supports(cls, spec: float, target: Target) -> Miss | None:
        return Miss("3 is not for me") if spec == 3.0 else None

    @classmethod
    def work(cls, spec: float, load: Load) -> Work:
        whole = super().work(spec, load)
        return Work(whole.flops / 2, whole.bytes / 2)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picking, "kernels", lambda: {"double": Doubling, "lazy": Lazy})


@pytest.mark.usefixtures("two")
def test_the_least_estimated_time_wins() -> None:
    load = Load(1, 1000, 1000)
    found = pick(2.0, H100, load)
    assert isinstance(found, Picked)
    assert found.kernel.name == "lazy" and found.others == ("double",)
    assert found.seconds == estimated(Lazy.work(2.0, load), "bfloat16", H100)


@pytest.mark.usefixtures("two")
def test_a_kernel_that_misses_is_passed_over() -> None:
    found = pick(3.0, H100, Load())
    assert isinstance(found, Picked)
    assert found.kernel.name == "double" and found.others == ()


@pytest.mark.usefixtures("two")
def test_where_none_fits_every_reason_is_told() -> None:
    class Negative(float):
        """A spec of the same kind as the examples' is needed."""

    missed = pick(-3.0, H100, Load())
    assert isinstance(missed, Picked)  # lazy takes it
    missed = pick(Negative(1.0), H100, Load())
    assert isinstance(missed, Miss) and missed.reason == "no kernel computes a Negative"


def test_reasons_are_those_of_the_kernels() -> None:
    missed = pick(AttentionSpec(4, 2, 512, 512, 1.0, CAUSAL), H100, Load())
    assert isinstance(missed, Miss)
    assert "flash_prefill: head_dim 512 is more than 256" in missed.reason


def test_every_kernel_is_picked_for_its_examples_or_loses_to_another() -> None:
    for name, kernel in kernels().items():
        for spec, load in kernel.examples():
            found = pick(spec, H100, load)
            assert isinstance(found, Picked)
            assert name in (found.kernel.name, *found.others)
