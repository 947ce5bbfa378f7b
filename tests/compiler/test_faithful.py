"""The raised program is compared with the model once: wrong sites are taken back, wrong traces
refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from attnopt.compiler import faithful, pipeline
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.pipeline import read
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.spec import parse_spec
from tests.families import Nano, floats
from tests.tolerance import assert_close


class Straying(nn.Module):
    """Another function at lengths that the trace has not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Nano()

    def forward(self, x: torch.Tensor) -> Any:
        made = self.inner(x)
        return made * 2 if not torch.compiler.is_compiling() else made


def loaded(model: nn.Module, dtype: torch.dtype = torch.float32) -> Loaded:
    inputs = {name: value.to(dtype) for name, value in floats(2, 9).items()}
    return Loaded(model.to(dtype).eval(), None, (), inputs, "nano", "callable")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_faithful_program_is_left_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert len(read(loaded(Nano(), dtype)).sites) == 2


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 4.0), (torch.bfloat16, 4.0), (torch.bfloat16, 1.05)],  # the last is subtle
)
def test_a_site_that_computes_something_else_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, factor: float
) -> None:
    first: list[str] = []

    def wrong_at_first(program: Program, leave: Mapping[str, str] | None = None) -> Program:
        """Raises, and gets the scale of the model's first attention wrong."""
        made = raise_program(program, leave)
        first.extend([made.sites[0].q.projection] if not first and made.sites[0].q else [])
        for site in made.sites:
            if site.q is not None and site.q.projection == first[0]:
                node = made.node(site.node)
                spec = parse_spec(str(node.args[4]))
                node.update_arg(4, replace(spec, scale=spec.scale * factor).text)
        made.clean()
        return made

    torch.manual_seed(0)
    given = loaded(Nano(), dtype)
    monkeypatch.setattr(pipeline, "raise_program", wrong_at_first)
    monkeypatch.setattr(faithful, "raise_program", wrong_at_first)
    program = read(given)
    assert len(program.sites) == 1
    (left,) = program.unraised
    assert "computes something else (difference" in left.reason
    assert sum(node.target is ATTENTION for node in program.graph.nodes) == 1
    assert given.module is not None
    with torch.no_grad():
        assert_close(program.run(program.example), given.module(**given.kwargs))


def test_a_trace_that_computes_something_else_is_refused() -> None:
    with pytest.raises(Problem, match="does not compute what the model does"):
        read(loaded(Straying()))
