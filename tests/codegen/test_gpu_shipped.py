"""The checks of what is shipped, on a CPU: a driver that computes what the smallest kernel does
stands in for a GPU's, and has to be given the arguments that its binary takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnopt.codegen.build import build
from attnopt.codegen.kernel import Load
from attnopt.codegen.pick import Picked
from attnopt.codegen.target import target
from tests.codegen.bare import run_bare  # finds the benchmarks, too
from tests.codegen.compiling import compiling
from tests.codegen.doubling import Doubling

from benchmarks import gpu_shipped  # isort: skip

_CODE = """
import ctypes
from dataclasses import asdict
from types import SimpleNamespace
import numpy as np
from attnopt.codegen.target import target
from benchmarks import gpu_shipped
from benchmarks.gpu_check import Checked
from benchmarks.gpu_driver import Driver
from attnopt.codegen.kernel import Load
from tests.codegen.doubling import Doubling, shifted

class Shifting(Doubling):
    launcher = staticmethod(shifted)

class Untyped(Doubling):
    @classmethod
    def supports(cls, spec, target):
        raise ValueError("broken")

asked = []

def launch(function, x, y, z, threads, one, also, shared, stream, given, extra):
    # `_double(x, out, size, factor)` in float32, its stride compiled in, two null pointers behind
    assert (x, y, z, one, also) == (5, 1, 1, 1, 1) and threads == 32
    places = [ctypes.c_void_p(given[at]).value for at in range(6)]
    pointers = [ctypes.c_void_p.from_address(place).value for place in places]
    assert pointers[4] is None and pointers[5] is None
    size = ctypes.c_int32.from_address(places[2]).value
    factor = ctypes.c_float.from_address(places[3]).value
    floats = ctypes.c_float * size
    source, made = floats.from_address(pointers[0]), floats.from_address(pointers[1])
    asked.append((size, factor, bool(np.isnan(made[0]))))
    for at in range(size - LEFT_OUT):
        made[at] = factor * source[at]
    return STATUS

def ok(*given):
    return 0

library = SimpleNamespace(cuModuleLoadData=ok, cuModuleGetFunction=ok, cuLaunchKernel=launch)
Doubling.examples = classmethod(lambda cls: ((2.0, Load(1, 1000, 1000, "float32")),))
gpu_shipped.kernels = lambda: {"double": Doubling, "shifted": Shifting, "broken": Untyped}
gpu_shipped.check_package = lambda *given: Checked("package", "", Load(), 0.0)
gpu_shipped._modules = lambda made: iter(())

def tried(left_out=0, status=0, of=lambda vendor: Driver(library, vendor)):
    global LEFT_OUT, STATUS
    LEFT_OUT, STATUS = left_out, status
    gpu_shipped.Driver = SimpleNamespace(of=of)
    return [asdict(one) for one in gpu_shipped.check_shipped(target("h100"), device="cpu")]

def absent(vendor):
    raise OSError("libcuda.so.1: not there")

told = {"right": tried(), "unwritten": tried(1), "refused": tried(0, 700)}
told |= {"absent": tried(of=absent), "asked": asked}
"""


@pytest.fixture(scope="module")
def told() -> Any:
    return compiling(_CODE)


@pytest.mark.slow
def test_a_binary_is_launched_by_its_facts_and_compared(told: Any) -> None:
    broken, double, shifted, package = told["right"]
    assert double["error"] == 0 and not double["wrong"] and not double["skipped"]
    assert told["asked"][0] == [300, 2.0, True]  # the output is poisoned
    assert "asks torch for aten.zeros.default" in shifted["skipped"]
    assert "broken" in broken["wrong"]
    assert package["kernel"] == gpu_shipped.PACKAGE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [("unwritten", "an error of inf"), ("refused", "cuLaunchKernel gives error 700")],
)
def test_what_the_driver_does_not_do_is_red(told: Any, how: str, said: str) -> None:
    assert said in told[how][1]["wrong"]


@pytest.mark.slow
def test_without_a_driver_it_is_skipped_and_told(told: Any) -> None:
    assert "libcuda" in told["absent"][1]["skipped"] and not told["absent"][1]["wrong"]


@pytest.mark.slow
def test_a_package_is_made_loaded_and_compared() -> None:
    found = gpu_shipped.check_package(target("cpu"), "cpu")
    assert found.error < 1e-5 and not found.wrong
    assert found.load == Load(2, 100, 100, "float32")


def test_a_package_that_cannot_be_made_is_red() -> None:
    found = gpu_shipped.check_package(target("mi300x"), "cpu")
    assert "A809" in found.wrong or "no package" in found.wrong


@pytest.mark.slow
def test_modules_run_where_attnopt_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """In triton's interpreter instead of on a device."""
    spec, load = 2.0, Load(1, 300, 300, "float32")
    picked = Picked(Doubling(), spec, target("h100"), load, 0.0)
    inputs = Doubling.inputs(spec, load)
    made = build("double_0", picked, compile=False)
    one = gpu_shipped._Shipped(made, inputs, [2 * inputs["x"].double()])
    other = gpu_shipped._Shipped(made, inputs, [3 * inputs["x"].double()])
    monkeypatch.setattr(
        gpu_shipped, "run_bare", lambda folder, calls, interpret: run_bare(folder, calls)
    )
    (right,) = gpu_shipped._modules([one])
    assert right.error == 0 and not right.wrong
    (wrong,) = gpu_shipped._modules([other])
    assert "an error of" in wrong.wrong
    (failed,) = gpu_shipped._modules([gpu_shipped._Shipped(made, {"y": torch.ones(1)}, [])])
    assert "unexpected keyword" in failed.wrong
