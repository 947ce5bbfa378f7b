"""A picked kernel as files: its module, and its launches compiled ahead of time.

What is compiled is the module that was written, called on tensors without values: the binary and
the module cannot say different things.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.codegen.emit import emit, public_name, summary
from attnopt.codegen.launch_facts import Buffer, LaunchFacts, buffers, facts, grid_formulas
from attnopt.codegen.pick import Picked
from attnopt.compiler.errors import Problem

_MEMORY = ("aten.empty", "aten.new_empty")


@dataclass(frozen=True)
class Built:
    """One emitted module: `text` is its source, `launches` what it launches at the sizes of the
    load, with `buffers` their tensors and `operators` what it asks of torch besides (nothing but
    memory and views in most). They are empty where nothing was compiled."""

    name: str
    picked: Picked
    text: str
    launches: tuple[LaunchFacts, ...] = ()
    buffers: tuple[Buffer, ...] = ()
    operators: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """What the kernel computes, in one line."""
        return summary(type(self.picked.kernel).launcher)

    @property
    def misfits(self) -> list[str]:
        """What is wrong with the compiled launches on the target."""
        found = [(one.symbol, one.resources.misfit(self.picked.target)) for one in self.launches]
        return [f"{symbol} {why}" for symbol, why in found if why]

    def facts(self) -> dict[str, Any]:
        """The module as a JSON object."""
        picked = self.picked
        return {
            "format": 1, "module": self.name, "function": public_name(picked.spec),
            "computes": self.said, "kernel": picked.kernel.name,
            "spec": str(getattr(picked.spec, "text", picked.spec)), "tiles": picked.kernel.text,
            "target": {
                "name": picked.target.name, "vendor": picked.target.vendor,
                "capability": picked.target.capability,
            },
            "sizes": asdict(picked.load),
            "estimated_s": picked.seconds,
            "buffers": [asdict(buffer) for buffer in self.buffers],
            "torch_operators": list(self.operators),
            "launches": [one.as_json() for one in self.launches],
        }  # fmt: skip

    def files(self) -> dict[str, bytes]:
        """The module's files by name."""
        made = {f"{self.name}.py": self.text.encode()}
        if self.launches:
            made[f"{self.name}.json"] = json.dumps(self.facts(), indent=1).encode() + b"\n"
        return made | {one.file: one.binary for one in self.launches}


def build(name: str, picked: Picked, compile: bool = True) -> Built:
    """Write a kernel as the module `name`, and compile it for its target.

    Raises `Problem` A804 in triton's interpreter, A805 where triton cannot compile it, and A831
    where it needs more shared memory than the target has.
    """
    text = emit(picked.kernel, picked.spec, picked.target, picked.load)
    if not compile:
        return Built(name, picked, text)
    from attnopt.codegen.aot import compiled, require_compiler
    from attnopt.codegen.record import recording

    require_compiler()
    target = picked.target
    suffix = "hsaco" if target.vendor == "amd" else "cubin"
    inputs = type(picked.kernel).inputs(picked.spec, picked.load, "meta")
    others = _Operators()
    with _imported(name, text) as module, recording() as noted, others:
        outputs = getattr(module, public_name(picked.spec))(**inputs)
        known, formulas = buffers(inputs, outputs, noted), grid_formulas(text)
        launches = tuple(
            facts(
                f"{name}.{at}.{suffix}", one, compiled(one, target), target, known,
                formulas.get(one.kernel.fn.__name__, ""),
            )
            for at, one in enumerate(noted)
        )  # fmt: skip
    asked = tuple(others.found)
    made = Built(name, picked, text, launches, tuple(known.values()), asked)
    over = [one.resources for one in launches if one.shared > target.shared_per_block]
    if over:
        raise Problem(
            "A831", f"{picked.kernel.text} does not fit {target.title}", where=name,
            why=over[0].misfit(target), help="emit without binaries: --no-aot",
        )  # fmt: skip
    return made


class _Operators(TorchDispatchMode):
    """Notes the operators of torch that compute something: neither memory nor views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not func.is_view and not str(func).startswith(_MEMORY):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def _imported(name: str, text: str) -> Iterator[ModuleType]:
    """The module of a text, from a file that stays while triton needs it."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        found = importlib.util.spec_from_file_location(f"emitted_{name}", path)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[module.__name__] = module  # dataclasses look their module up
        try:
            found.loader.exec_module(module)
            yield module
        finally:
            del sys.modules[module.__name__]
