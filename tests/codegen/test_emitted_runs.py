"""What was emitted runs in a process without attnopt, and computes what the kernel's reference
does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.codegen.emit import emit, public_name
from attnopt.codegen.kernel import Kernel, Load, kernels
from attnopt.codegen.target import target
from tests.codegen.bare import run_bare
from tests.codegen.doubling import Doubling, halved
from tests.tolerance import assert_close

H100 = target("h100")
_LONGEST = 40  # the interpreter is slow


def _small(load: Load) -> Load:
    """The sizes of an example cut down, prefill staying prefill."""
    keys = min(load.keys, _LONGEST)
    queries = keys if load.queries == load.keys else min(load.queries, keys)
    return replace(load, batch=1, queries=queries, keys=keys, dtype="float32")


def _tensors(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _ran(folder: Path) -> dict[str, tuple[Any, Any]]:
    """By kernel, what the emitted module gave and what its reference gives."""
    calls: dict[str, tuple[str, dict[str, Any]]] = {}
    wanted: dict[str, Any] = {}

    def add(name: str, kernel: Kernel[Any], spec: Any, load: Load, wide: Any) -> None:
        inputs = type(kernel).inputs(spec, load)
        text = emit(kernel, spec, H100, load, wide)
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        calls[name] = (public_name(spec), {**inputs, **({"data": None} if wide else {})})
        exact = {k: v.double() if _is_float(v) else v for k, v in inputs.items()}
        wanted[name] = type(kernel).reference(spec, exact)

    for kernel in kernels().values():
        spec, load = kernel.examples()[0]
        add(f"{kernel.name}_0", kernel.default(spec, H100, _small(load)), spec, _small(load), None)
    add("double_0", Doubling(), 2.5, Load(1, 100, 100, "float32"), None)
    add("double_1", Doubling(), 0.5, Load(1, 100, 100, "float32"), {"hook": halved})
    outputs = run_bare(folder, calls)
    return {name: (outputs[name], wanted[name]) for name in calls}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.slow
def test_they_agree_with_the_reference(tmp_path: Path) -> None:
    """All in one process, since it takes long to start."""
    ran = _ran(tmp_path)
    assert ran.keys() == {*(f"{name}_0" for name in kernels()), "double_0", "double_1"}
    for name, (found, wanted) in ran.items():
        assert not isinstance(found, str), f"{name}: {found}"
        pairs = list(zip(_tensors(found), _tensors(wanted), strict=True))
        assert pairs
        for at, (left, right) in enumerate(pairs):
            if isinstance(right, Tensor):
                size = right.abs().max().clamp_min(1.0)  # tolerances are for values of order one
                assert_close(left / size.to(left.dtype), right / size, f"{name}, output {at}")


def test_attnopt_is_out_of_reach_in_the_bare_process(tmp_path: Path) -> None:
    (tmp_path / "reaching.py").write_text("def run():\n    import attnopt.codegen\n")
    (tmp_path / "plain.py").write_text("def run(x):\n    return x + 1\n")
    found = run_bare(tmp_path, {"reaching": ("run", {}), "plain": ("run", {"x": torch.ones(2)})})
    assert "ModuleNotFoundError: no module named attnopt" in found["reaching"]
    assert found["plain"].tolist() == [2.0, 2.0]
