"""Applying passes: exact ones are compared and rolled back when they lie; plans replay; lowering
keeps the function."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import pytest
import torch

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, Refused
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.lower import export, lower
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.pipeline import apply_pass, apply_plan
from attnopt.compiler.plan import Plan
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from attnopt.compiler.verify import compare, difference, variations
from tests.attention_models import raised, tokens
from tests.families import Nano, floats
from tests.tolerance import assert_close


@lru_cache(maxsize=1)
def two_sites() -> Program:
    """Two plain blocks in float64, raised."""
    torch.manual_seed(0)
    inputs = {name: value.double() for name, value in floats(2, 9).items()}
    return raise_program(
        trace(Loaded(Nano().double().eval(), None, (), inputs, "nano", "callable"))
    )


@dataclass(frozen=True)
class Scaled(Pass):
    """Changes the softmax scale at the first site: not exact, whatever it says."""

    name: ClassVar[str] = "scaled"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    by: float = 1.5
    only: str = "s0"

    def rewrite(self, target: Any, program: Program, notes: Notes) -> Edit | Miss:
        factor = self.by if target.id == self.only else 1.0
        return Edit(spec=target.spec.with_(scale=target.spec.scale * factor))


@dataclass(frozen=True)
class Refusing(Pass):
    """Finds out in the middle of its edit that it cannot be done."""

    name: ClassVar[str] = "refusing"
    exactness: ClassVar[Exactness] = Exactness.EXACT

    def rewrite(self, target: Any, program: Program, notes: Notes) -> Edit | Miss:
        def edit(copy: Program) -> None:
            copy.graph.erase_node(next(n for n in reversed(copy.graph.nodes) if n.op == "output"))
            raise Refused(Miss("half way"))

        return Edit(graph=edit)


def test_a_lie_is_rolled_back_and_the_rest_is_kept() -> None:
    program = two_sites()
    made, outcomes = apply_pass(program, Scaled(), ("*",), Notes(program))
    by_site = {outcome.target: outcome for outcome in outcomes}
    assert not by_site["s0"].applied
    assert "rolled back" in by_site["s0"].reason
    assert by_site["s1"].applied
    assert compare(program, made).same


def test_the_comparison_can_fail() -> None:
    program = two_sites()
    lie = Scaled(by=1.001)
    edited, _ = apply_pass(program, Scaled(by=1.0), ("*",), Notes(program))
    assert compare(program, edited).same
    assert not apply_pass(program, lie, ("s0",), Notes(program))[1][0].applied


def test_a_refusal_half_way_leaves_the_program_whole() -> None:
    program = two_sites()
    made, outcomes = apply_pass(program, Refusing(), ("*",), Notes(program))
    assert [o.reason for o in outcomes] == ["half way", "half way"]
    assert_close(made.run(program.example), program.run(program.example))


def test_an_unknown_target_is_named() -> None:
    program = two_sites()
    _, (outcome,) = apply_pass(program, Scaled(by=1.0), ("s9",), Notes(program))
    assert not outcome.applied
    assert "s9" in outcome.reason


def test_nan_never_agrees() -> None:
    assert difference(torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])) != 0
    assert not difference(torch.ones(3), torch.full((3,), float("nan"))) <= 1e9
    assert difference(torch.ones(3), torch.ones(4)) == float("inf")


def test_variations_change_sizes() -> None:
    shapes = {tuple(batch.kwargs["x"].shape) for batch in variations(two_sites())}
    assert len(shapes) == 3


@pytest.mark.parametrize("kind", ["grouped", "learned"])
def test_lowering_and_exporting_keep_the_function(kind: str) -> None:
    program = raised(kind, torch.float32)
    plan = Plan().then("fold_repeated_kv{}").then("simplify_mask{}").then("fuse_attention{}")
    made, _ = apply_plan(program, plan, Notes(program))
    module = lower(made)
    assert all(node.target is not ATTENTION for node in module.graph.nodes)
    exported = export(made)
    assert all("attnopt" not in str(node.target) for node in exported.graph.nodes)
    for batch, length in ((2, 11), (3, 20), (1, 5)):
        inputs = tokens(batch, length)
        expected = program.run(inputs)["logits"]
        assert_close(module(**inputs.kwargs)["logits"], expected, "lowered")
        assert_close(exported.module()(**inputs.kwargs)["logits"], expected, "exported")


def test_plans_read_back() -> None:
    plan = Plan(compiled=True).then("sliding_window{left=64}", ("s0", "s1"))
    assert Plan.from_json(plan.as_json()) == plan
    with pytest.raises(Problem, match="unknown pass"):
        Plan.from_json({"format": 1, "steps": [{"rewrite": "nonsense{}", "targets": ["*"]}]})
    with pytest.raises(Problem, match="format"):
        Plan.from_json({"format": 99, "steps": []})
