"""What `attnopt codegen` ships, run on the device as its users run it: emitted modules in a process
where attnopt cannot be imported, their binaries by the driver, and a package of AOTInductor.

Every kernel is written for one of its examples, and held against its reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.autotune.kernel_race import poisoned
from attnopt.codegen.aoti import package
from attnopt.codegen.build import Built, build
from attnopt.codegen.emit import public_name
from attnopt.codegen.kernel import Inputs, Load, kernels
from attnopt.codegen.pick import Picked
from attnopt.codegen.shipped import chosen
from attnopt.codegen.table import load_on
from attnopt.codegen.target import Target
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.spec import CAUSAL, AttentionSpec
from benchmarks.bare import run_bare
from benchmarks.gpu_check import Checked, failure, flat, judged, wide
from benchmarks.gpu_driver import Driver, Memory

_LENGTH = 300  # of the sequences, at most
PACKAGE = "package"
_SPEC = AttentionSpec(4, 2, 64, 64, 0.125, CAUSAL, backend="sdpa")


@dataclass(frozen=True)
class _Shipped:
    """A module that was written, with inputs on the device and what they should give."""

    built: Built
    inputs: Inputs
    wanted: list[Tensor]

    def checked(self, how: str, outputs: Callable[[], list[Tensor]]) -> Checked:
        """The outputs of one way to run it, compared."""
        return judged(*self._about(how), outputs, self.wanted)

    def skipped(self, how: str, why: str) -> Checked:
        """One way that is not for it."""
        return Checked(*self._about(how), 0.0, skipped=why)

    def _about(self, how: str) -> tuple[str, str, Load]:
        picked = self.built.picked
        return picked.kernel.name, f"{how} {getattr(picked.spec, 'text', picked.spec)}", picked.load


def check_shipped(
    target: Target, names: tuple[str, ...] = (), device: str = "cuda"
) -> Iterator[Checked]:
    """All kernels (or the named ones), and a package of a model."""
    made = []
    for name in names or tuple(kernels()):
        try:
            one = _shipped(name, target, device)
        except Exception as error:  # noqa: BLE001 (a crash is a red check, and is told)
            yield Checked(name, "emitted", Load(), float("inf"), failure(error))
        else:
            if one is None:
                yield Checked(name, "emitted", Load(), 0.0, skipped="the target takes no example")
            else:
                made.append(one)
    yield from _modules(made)
    yield from _binaries(made, target, device)
    yield check_package(target, device)


def _shipped(name: str, target: Target, device: str) -> _Shipped | None:
    """The first example that the target takes, at a smaller size; None where it takes none."""
    cls = kernels()[name]
    for spec, example in cls.examples():
        if cls.supports(spec, target) is not None:
            continue
        queries, keys = (min(size, _LENGTH) for size in (example.queries, example.keys))
        load = load_on(replace(example, batch=2, queries=queries, keys=keys), target)
        picked = Picked(chosen(cls, spec, target, load), spec, target, load, 0.0)
        with poisoned():  # an output may be among the inputs
            inputs = cls.inputs(spec, load, device)
        wanted = flat(cls.reference(spec, wide(inputs)))
        return _Shipped(build(f"{name}_0", picked), inputs, wanted)
    return None


def _modules(made: list[_Shipped]) -> Iterator[Checked]:
    """All modules, in one process without attnopt."""
    calls = {one.built.name: (public_name(one.built.picked.spec), one.inputs) for one in made}
    with TemporaryDirectory() as folder:
        for one in made:
            (Path(folder) / f"{one.built.name}.py").write_text(one.built.text, encoding="utf-8")
        found = _run_all(Path(folder), calls)
    for one in made:
        yield one.checked("emitted module", partial(_given, found[one.built.name]))


def _run_all(folder: Path, calls: dict[str, Any]) -> dict[str, Any]:
    """What all modules give; each in a process of its own where one ends the process of all."""
    try:
        return run_bare(folder, calls, interpret=False)
    except Exception as error:  # noqa: BLE001 (whatever ends the process, or what it left)
        if len(calls) == 1:
            return dict.fromkeys(calls, str(error))
    return {key: _run_all(folder, {key: call})[key] for key, call in calls.items()}


def _given(found: Any) -> list[Tensor]:
    if isinstance(found, str):  # a traceback
        raise RuntimeError((found.strip() or "no message").splitlines()[-1])
    return flat(found)


def _binaries(made: list[_Shipped], target: Target, device: str) -> Iterator[Checked]:
    """The launches of each module by the driver."""
    try:
        driver: Driver | OSError = Driver.of(target.vendor)
    except OSError as error:
        driver = error
    for one in made:
        outputs = [buffer.name for buffer in one.built.buffers if buffer.role == "output"]
        if isinstance(driver, OSError):
            yield one.skipped("binary", str(driver))
        elif one.built.operators:
            asked = ", ".join(one.built.operators)
            yield one.skipped("binary", f"the module asks torch for {asked} besides")
        elif len(outputs) < len(one.wanted):
            yield one.skipped("binary", "an output is among the inputs, or two are one")
        else:
            yield one.checked("binary", partial(_launched, one, driver, outputs, device))


def _launched(one: _Shipped, driver: Driver, outputs: list[str], device: str) -> list[Tensor]:
    memory = Memory(one.built.buffers, deepcopy(dict(one.inputs)), device)
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    for launch in one.built.launches:
        driver.launch(launch, memory, stream)
    return [memory.tensors[name] for name in outputs]  # reading them waits for the stream


class _Attends(nn.Module):
    """One attention, as a rewritten model has it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k and v by `_SPEC`, in float32."""
        made: Tensor = ATTENTION(q, k, v, [], _SPEC.text)
        return made


def check_package(target: Target, device: str = "cuda") -> Checked:
    """A package of a model with one attention, loaded and run."""
    load = Load(2, 100, 100, "float32")
    heads = (_SPEC.heads, _SPEC.kv_heads, _SPEC.kv_heads)
    inputs = [torch.randn(2, count, load.keys, _SPEC.head_dim) for count in heads]
    wanted = _Attends()(*(x.double() for x in inputs))

    def outputs() -> list[Tensor]:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.pt2"
            package(torch.export.export(_Attends(), tuple(inputs)), path, target)
            run = torch._inductor.aoti_load_package(str(path))
            return [run(*(x.to(device) for x in inputs))]

    return judged(PACKAGE, f"AOTInductor {_SPEC.text}", load, outputs, [wanted])
