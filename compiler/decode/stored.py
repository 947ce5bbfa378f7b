"""A decoder in the folder of a run: the graph with its attentions as they were recognised, and no
weights, which are those of the model beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from attnopt.compiler.decode.decoder import Decoder
from attnopt.compiler.decode.derive import derive
from attnopt.compiler.device import CPU, Carried
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.export_model import load_export
from attnopt.compiler.lower import export
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.program import Program
from attnopt.compiler.spec import AttentionSpec
from attnopt.compiler.trace import trace


def unweighted(program: Program) -> torch.export.ExportedProgram:
    """The program as it is raised, exported; its weights are empty."""
    made = export(program, _kept)
    for name, value in made.state_dict.items():
        made.state_dict[name] = torch.nn.Parameter(
            value.new_empty(0), requires_grad=False
        ) if isinstance(value, torch.nn.Parameter) else value.new_empty(0)  # fmt: skip
    return made


def restored(
    path: Path, model: torch.export.ExportedProgram, there: Carried | None = None
) -> Decoder:
    """The decoder in a file that `unweighted` was saved to, with the weights of a model, where
    these were carried.

    Raises `Problem` A505 where the two do not belong together, and those of `load_export`.
    """
    loaded = load_export(path)
    graph = loaded.exported
    assert graph is not None
    missing = sorted(graph.state_dict.keys() - model.state_dict.keys())
    if missing:
        raise Problem(
            "A505", f"{path.name} is not of the model beside it", where=str(path),
            why=f"the model has no weight {missing[0]}", help="run optimize again",
        )  # fmt: skip
    for name in graph.state_dict:
        graph.state_dict[name] = model.state_dict[name]
    program = trace(loaded)
    if there is not None and there.device != CPU:
        program = program.to(there.device, there)
    return derive(program, check=False)


def _kept(spec: AttentionSpec) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
        made: Tensor = ATTENTION(q, k, v, list(extras), spec.text)
        return made

    return attention
