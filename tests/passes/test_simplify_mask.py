"""simplify_mask: proved classes replace mask tensors exactly, rows without keys included; the rest
stays.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.compiler.contract import Edit, Miss, Notes, passes, read_pass
from attnopt.compiler.lower import export
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.spec import CAUSAL, FULL, Mask
from tests.masked_attention import Masked, Spelling, masked
from tests.residual_models import traced_family
from tests.tolerance import assert_close

PASS = "simplify_mask{}"
LOWEST = torch.finfo(torch.float32).min


def simplified(program: Program) -> Program:
    made, outcomes = apply_pass(program, read_pass(PASS), ("*",), Notes(program))
    assert all(outcome.applied for outcome in outcomes), outcomes
    return made


def answer(program: Program) -> Edit | Miss:
    return read_pass(PASS).rewrite(program.sites[0], program, Notes(program))


def causal(x: Tensor) -> Tensor:
    at = torch.arange(x.shape[1])
    return at[None, :] <= at[:, None]


def dropped(m: Masked, x: Tensor, a: Tensor) -> Tensor:
    keep = causal(x)[None, None] & a.bool()[:, None, None, :]
    return torch.zeros(keep.shape).masked_fill(~keep, LOWEST)


def kept(m: Masked, x: Tensor, a: Tensor) -> Tensor:
    return causal(x)[None, None] & (a > 0)[:, None, None, :]


def biased(m: Masked, x: Tensor, a: Tensor) -> Tensor:
    n = x.shape[1]
    keep = (a == 1)[:, None, None, :]
    return torch.where(keep, m.noise[:n, :n], LOWEST)


CASES: dict[str, tuple[Spelling, Mask, tuple[str, ...], str]] = {
    "kept": (kept, CAUSAL, ("padding",), "-inf"),
    "dropped": (dropped, CAUSAL, ("padding",), "min"),
    "biased": (biased, FULL, ("bias", "padding"), "min"),
    "only causal": (lambda m, x, a: m.added[: x.shape[1], : x.shape[1]], CAUSAL, (), "-inf"),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_replaces_the_tensor_exactly(name: str, fused: bool) -> None:
    spelling, mask, extras, fill = CASES[name]
    before = masked(spelling, fused) if fused or name != "kept" else masked(spelling)
    after = simplified(before)
    spec = after.spec(after.sites[0])
    assert (spec.mask, spec.extras, spec.fill) == (mask, extras, fill)
    for length in (2, 7, 12):
        x = torch.randn(4, length, 8)
        real = torch.ones(4, length, dtype=torch.int64)
        real[0, : length // 2] = 0  # left padding: the first queries read no key
        real[1, length // 2 :] = 0
        real[2] = 0
        inputs = Batch((), {"x": x, "attention_mask": real})
        assert_close(after.run(inputs), before.run(inputs), f"{name} at {length}")


def test_is_idempotent_and_says_so() -> None:
    once = simplified(masked(kept))
    again = answer(once)
    assert isinstance(again, Miss)
    assert "no mask tensor" in again.reason
    twice = answer(simplified(masked(biased)))
    assert isinstance(twice, Miss)
    assert "nothing in it is a class" in twice.reason


def test_leaves_what_is_only_observed_and_names_the_node() -> None:
    def lie(m: Masked, x: Tensor, a: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])[:, None]
        return causal(x) | (i * i >= 1600)

    program = masked(lie)
    miss = answer(program)
    assert isinstance(miss, Miss)
    assert "looks like causal, not proved" in miss.reason
    assert program.node(miss.at).target is torch.ops.aten.mul.Tensor


def test_leaves_a_tensor_of_no_class() -> None:
    miss = answer(masked(lambda m, x, a: causal(x).T))
    assert isinstance(miss, Miss)
    assert "no class" in miss.reason


def test_soft_drops_stay_where_a_query_may_lose_all_keys() -> None:
    def soft(m: Masked, x: Tensor, a: Tensor) -> Tensor:
        return torch.zeros(a.shape).masked_fill(a == 0, -10000.0)[:, None, None, :]

    miss = answer(masked(soft))
    assert isinstance(miss, Miss)
    assert "-10000" in miss.reason


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_layers_share_one_padding_and_the_mask_is_gone(name: str, attention: str) -> None:
    model, traced = traced_family(name, attention)
    before = raise_program(traced)
    after = simplified(before)
    nodes: list[Any] = [node.args[3][-1] for node in after.attentions()]  # type: ignore[index, union-attr]
    assert len(set(nodes)) == 1
    value = nodes[0].meta["val"]
    assert (value.dtype, value.dim()) == (torch.bool, 2)
    shapes = [n.meta["val"].dim() for n in after.graph.nodes if _is_mask(n)]
    assert not any(dim == 4 for dim in shapes)
    inputs = dict(traced.example.kwargs)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][0, :4] = 0
    expected, got = model(**inputs), export(after).module()(**inputs)
    for key, item in expected.items():
        assert_close(got[key], item, f"{name} {key}")


def _is_mask(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.bool


def test_reads_back_from_its_text() -> None:
    made = passes()["simplify_mask"]()
    assert read_pass(made.text) == made
