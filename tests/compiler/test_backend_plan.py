"""`torch.compile(model, backend="attnopt", options={"plan": ...})`: the saved run's function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.autotune import entries
from attnopt.compiler import artifact, backend
from attnopt.compiler.backend_plan import GraphInputs
from attnopt.compiler.contract import Notes
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.source import from_module
from attnopt.compiler.pipeline import apply_plan, read
from attnopt.compiler.plan import Plan, Step
from attnopt.compiler.program import Batch
from tests.autotune.results import full
from tests.decoder import decoder
from tests.families import Nano
from tests.tolerance import assert_close

FITTED = Plan(
    (Step("simplify_mask{}"), Step("fuse_attention{}"), Step("merge_kv_heads{method=mean}"),
     Step("refit{}"), Step("skip_sublayers{method=linear}", ("b1.mlp",)))
)  # fmt: skip
WINDOW = Plan((Step("sliding_window{left=4 sink=1}", ("s0",)),))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from torch._inductor import compile_fx

    def as_it_is(module: Any, inputs: Any, config_patches: Any) -> Any:
        return module

    monkeypatch.setattr(compile_fx, "compile_fx", as_it_is)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _batch(inputs: int = 1) -> Batch:
    return Batch(tuple(torch.randn(4, 40, 64) for _ in range(inputs)))


def _run(folder: Path, plan: Plan, model: nn.Module, inputs: int = 1) -> Path:
    """The folder of a run of the model, with figures that nobody measured."""
    program = read(from_module(model, _batch(inputs).args))
    kept = {"calibration": [_batch(inputs) for _ in range(4)], "heldout": [_batch(inputs)]}
    made, outcomes = apply_plan(program, plan, Notes(program, *kept.values()))
    assert all(o.applied for o in outcomes if not o.rewrite.startswith("refit")), outcomes
    sites = entries.sites(program, outcomes, None, None)
    found = replace(full("nano"), plan=plan, outcomes=tuple(outcomes), sites=sites)
    return artifact.save(folder / "run", made, plan, found, kept)


@pytest.fixture(scope="module")
def model() -> Nano:
    return Nano().eval()


@pytest.mark.parametrize("plan", [FITTED, WINDOW], ids=["fitted", "window"])
def test_it_computes_what_the_run_saved(tmp_path: Path, model: Nano, plan: Plan) -> None:
    folder = _run(tmp_path, plan, model)
    compiled = torch.compile(
        model, backend=backend.attnopt, dynamic=True, options={"plan": str(folder / "plan.json")}
    )
    saved = artifact.load(folder)
    with torch.no_grad():
        for shape in ((4, 40), (2, 17)):
            x = torch.randn(*shape, 64)
            assert_close(compiled(x), saved(x), f"at {shape}")
            assert (saved(x) - model(x)).abs().max() > 1e-3


class Weighed(nn.Module):
    """Reads its second input first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Nano()

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        made: Tensor = self.inner(gates.sigmoid() * x)
        return made


def test_positional_inputs_that_are_read_in_another_order(tmp_path: Path) -> None:
    model = Weighed().eval()
    folder = _run(tmp_path, FITTED, model, 2)
    compiled = torch.compile(model, backend=backend.attnopt, dynamic=True, options={"plan": folder})
    x, gates = torch.randn(2, 4, 40, 64)
    with torch.no_grad():
        assert_close(compiled(x, gates), artifact.load(folder)(x, gates), "as saved")


def test_rows_one_by_one_where_the_graph_is_for_one_row(tmp_path: Path, model: Nano) -> None:
    folder = _run(tmp_path, FITTED, model)
    compiled = torch.compile(model, backend=backend.attnopt, options={"plan": folder})
    x = torch.randn(1, 40, 64)
    with torch.no_grad():
        assert_close(compiled(x), artifact.load(folder)(torch.cat((x, x)))[:1], "one row")


def test_another_length_than_compiled_for(tmp_path: Path, model: Nano) -> None:
    folder = _run(tmp_path, WINDOW, model)
    compiled = torch.compile(model, backend=backend.attnopt, options={"plan": folder})
    with torch.no_grad(), pytest.raises(Exception, match=r"compiled for `x` of 1 x 17 x 64"):
        compiled(torch.randn(1, 17, 64))


def test_a_model_with_a_graph_break(tmp_path: Path, model: Nano) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            for block in self.inner.blocks:
                x = block(x)
                torch._dynamo.graph_break()
            return x

    folder = _run(tmp_path, WINDOW, model)
    compiled = torch.compile(Broken(), backend=backend.attnopt, options={"plan": folder})
    with torch.no_grad(), pytest.raises(Exception, match=r"this graph has 1"):
        compiled(torch.randn(1, 40, 64))


def test_a_fitted_weight_that_changes_later(tmp_path: Path) -> None:
    model = Nano().eval()
    folder = _run(tmp_path, FITTED, model)
    compiled = torch.compile(model, backend=backend.attnopt, dynamic=True, options={"plan": folder})
    x = torch.randn(2, 40, 64)
    with torch.no_grad():
        compiled(x)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert_close(compiled(x), model(x), "the graph as it was given")


def test_a_plan_that_is_not_there(model: Nano) -> None:
    with pytest.raises(Problem, match="cannot read plan"):
        backend.SavedPlan.read("nowhere/plan.json")
    compiled = torch.compile(model, backend=backend.attnopt, options={"plan": "nowhere"})
    with pytest.raises(Exception, match="cannot read nowhere"):
        compiled(torch.randn(1, 9, 64))


def test_a_plan_that_heals_trains_nothing_in_a_compilation(tmp_path: Path) -> None:
    saved = backend.SavedPlan(tmp_path, Plan((Step("heal{tokens=64}"),)))
    program = decoder()
    inputs = GraphInputs(program.module, (), [program.example.kwargs["input_ids"]])
    with pytest.raises(Problem, match="heals its model") as caught:
        saved.applied(program, inputs)
    assert caught.value.code == "A213" and "attnopt.load" in caught.value.help
