"""The gauge is tried on the graph: rotary leaves complex numbers, a norm turns or nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.compiler.gauge import Freedom, complex_scalars, freedom, permutes, unpaired
from tests.attention_models import raised
from tests.tolerance import assert_close


@pytest.mark.parametrize("kind", ("llama", "partial", "learned"))
def test_rotary_leaves_complex_numbers_and_free_dims(kind: str) -> None:
    program = raised(kind)
    for which in ("q", "k", "v"):
        found = freedom(program, program.sites[0], which)  # type: ignore[arg-type]
        assert found == Freedom("scale", True), which


def test_wrong_pairs_do_not_commute() -> None:
    program = raised("llama")
    site = program.sites[0]
    assert site.rotary is not None
    crossed = replace(site.rotary, pairs=site.rotary.pairs.roll(1, 0)[:, [0, 1]])
    mixed = torch.stack([site.rotary.pairs[:, 0], site.rotary.pairs[:, 1].roll(1)], dim=1)
    assert freedom(program, replace(site, rotary=crossed), "k").pairs == "scale"  # an order only
    wrong = replace(site, rotary=replace(site.rotary, pairs=mixed))
    assert freedom(program, wrong, "k").pairs == "none"
    unrotated = replace(site, rotary=None)
    assert not freedom(program, unrotated, "k").rest


def test_a_norm_leaves_turns_where_its_weight_is_even() -> None:
    program = raised("normed")
    assert freedom(program, program.sites[0], "k").pairs == "none"
    even = program.copy()
    for name, weight in list(even.module.named_parameters()):
        if "k_norm" in name:
            even.set_weight(name, torch.full_like(weight, 0.7))
    found = freedom(even, even.sites[0], "k")
    assert found.pairs == "turn"
    assert "norm" in found.why
    assert freedom(even, even.sites[0], "v") == Freedom("scale", True)


def test_heads_that_the_graph_repeats_may_change_places() -> None:
    program = raised("by groups")
    site = program.sites[0]
    assert site.k is not None and site.k.split
    assert program.node(site.k.split).meta["val"].shape[2] == 2 * site.kv_heads
    order = torch.tensor([2, 0, 3, 1])
    assert all(permutes(program, site, which, order) for which in ("k", "v"))  # type: ignore[arg-type]
    own = raised("own norms")
    assert not permutes(own, own.sites[0], "k", order)


def test_a_norm_over_all_heads_leaves_nothing() -> None:
    program = raised("norm of all")
    found = freedom(program, program.sites[0], "k")
    assert (found.pairs, found.rest) == ("none", False)
    assert "one norm over all heads of k" in found.why


def test_an_unknown_path_has_no_freedom() -> None:
    program = raised("llama")
    found = freedom(program, replace(program.sites[0], k=None), "k")
    assert (found.pairs, found.rest) == ("none", False)
    assert found.why


def test_the_weaker_of_two_holds() -> None:
    both = Freedom("scale", True) & Freedom("turn", False, "a norm")
    assert both == Freedom("turn", False, "a norm")


def test_complex_scalars_multiply_pairs_as_complex_numbers() -> None:
    pairs = torch.tensor([[0, 3], [1, 4]])
    x, factors = torch.randn(6, dtype=torch.float64), torch.randn(2, dtype=torch.complex128)
    y = complex_scalars(6, pairs, factors) @ x
    product = torch.complex(x[:2], x[3:5]) * factors
    assert_close(torch.complex(y[:2], y[3:5]), product)
    assert torch.equal(y[[2, 5]], x[[2, 5]])
    assert unpaired(6, pairs).tolist() == [2, 5]
