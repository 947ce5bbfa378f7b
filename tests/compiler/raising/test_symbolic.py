"""Index expressions: deciding equality on the grid is the same as everywhere, and views map indices
as torch does.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnopt.compiler.raising.constant import element
from attnopt.compiler.raising.evaluate import Unknown
from attnopt.compiler.raising.expression import (
    Affine,
    Compare,
    Condition,
    Datum,
    add,
    compare,
    evaluate,
    logic,
    multiply,
    negate,
    number,
    truth,
    variable,
    where,
)
from attnopt.compiler.raising.mask_class import (
    Classless,
    agree,
    candidates,
    constant_value,
    decide,
    keep_of,
)
from attnopt.compiler.raising.symbolic_views import reshaped
from attnopt.compiler.spec import CAUSAL, FULL, Mask

SIZES = (variable("s"), variable("s"))
ROW, COL = variable("i"), variable("j")
FAR = 40  # beyond every cell that constants up to 6 make


def dense(x: Condition, length: int = FAR) -> Tensor:
    at = torch.arange(length)
    points = {"i": at[:, None], "j": at[None, :], "s": torch.tensor(length)}
    return evaluate(x, points).expand(length, length)  # type: ignore[arg-type]


comparisons = st.builds(
    lambda op, form, constant: Compare(op, form.plus(Affine((), constant))),
    st.sampled_from(["lt", "le", "eq", "ne", "gt", "ge"]),
    st.sampled_from([ROW.plus(COL, -1), COL.plus(ROW, -1), ROW, COL]),
    st.integers(-6, 6),
)
conditions: st.SearchStrategy[Condition] = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.builds(logic, st.sampled_from(["and", "or", "xor"]), inner, inner),
        st.builds(negate, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(conditions, conditions)
def test_agreement_on_the_grid_is_agreement_everywhere(a: Condition, b: Condition) -> None:
    assert agree(a, b, SIZES) is torch.equal(dense(a), dense(b))


@settings(max_examples=60, deadline=None)
@given(conditions)
def test_a_decided_class_is_the_mask(keep: Condition) -> None:
    try:
        mask, padding = decide(keep, SIZES)
    except Classless:
        assert not any(torch.equal(m.dense(FAR, FAR), dense(keep)) for m in (FULL, CAUSAL))
        return
    assert padding is None
    assert torch.equal(mask.dense(FAR, FAR), dense(keep))


masks = st.builds(Mask, st.just("window"), st.integers(1, 9), st.integers(0, 4), st.booleans())


@settings(max_examples=40, deadline=None)
@given(masks)
def test_finds_every_window_back(mask: Mask) -> None:
    found, _ = decide(keep_of(mask), SIZES)
    assert torch.equal(found.dense(FAR, FAR), mask.dense(FAR, FAR))


def test_a_window_of_thousands_is_decided() -> None:
    mask = Mask("window", left=4096, sink=4)
    assert decide(keep_of(mask), SIZES) == (mask, None)
    assert mask in candidates(keep_of(mask))


def test_differences_far_out_are_found() -> None:
    lie = logic("or", keep_of(CAUSAL), compare("ge", ROW, number(10_000)))
    assert not agree(lie, keep_of(CAUSAL), SIZES)
    assert agree(lie, keep_of(CAUSAL), (number(9_000), number(9_000)))  # type: ignore[arg-type]


def test_padding_is_decided_for_every_value() -> None:
    datum = Datum("m", (variable("b"), COL), is_bool=False)
    value = variable(datum)
    mask, padding = decide(logic("and", keep_of(CAUSAL), compare("gt", value, number(0))), SIZES)
    assert mask == CAUSAL
    assert padding is not None
    assert (padding.op, padding.value) == ("gt", 0)  # -1 tells it from "!= 0"
    either = logic("or", keep_of(CAUSAL), truth(value))
    with pytest.raises(Classless):
        decide(either, SIZES)


def test_input_values_compared_with_each_other_are_left_alone() -> None:
    here, there = (variable(Datum("doc", (variable("b"), at), False)) for at in (ROW, COL))
    with pytest.raises(Unknown, match="doc"):
        decide(compare("eq", here, there), SIZES)


def test_sums_of_constant_differences_are_constant() -> None:
    jumps = compare("ne", add(add(ROW, number(1)), ROW, -1), number(1))
    assert constant_value(where(jumps, number(1), number(0))) == 0
    assert constant_value(where(compare("gt", ROW, number(3)), number(1), number(0))) is None


def test_products_of_positions_are_not_understood() -> None:
    with pytest.raises(Unknown, match="multiplied"):
        multiply(ROW, COL)


SHAPES = [
    ((2, 3, 4), (6, 4)),
    ((6, 4), (2, 3, 4)),
    ((6, 5), (3, 2, 1, 5)),
    ((4, 1, 5), (4, 5)),
    ((3, 4), (12,)),
]


@pytest.mark.parametrize(("inner", "outer"), SHAPES)
def test_reshapes_map_indices_as_torch_does(inner: tuple[int, ...], outer: tuple[int, ...]) -> None:
    values = torch.arange(torch.Size(inner).numel()).reshape(inner)
    viewed = values.reshape(outer)
    if len(inner) > len(outer):
        return _merged(values, viewed)
    names = [f"a{n}" for n in range(len(outer))]
    index = reshaped(
        inner, outer, tuple(variable(n) for n in names), dict(zip(names, outer, strict=True))
    )
    for place in torch.cartesian_prod(*(torch.arange(n) for n in outer)):
        at = [int(evaluate(form, dict(zip(names, place, strict=True)))) for form in index]
        assert values[tuple(at)] == viewed[tuple(place)]


def _merged(values: Tensor, viewed: Tensor) -> None:
    """Merged axes are understood where they are split again in the same place."""
    names = [f"a{n}" for n in range(values.dim())]
    extents = dict(zip(names, values.shape, strict=True))
    start = tuple(Affine() if size == 1 else variable(n) for n, size in extents.items())
    middle = reshaped(viewed.shape, values.shape, start, extents)
    assert reshaped(values.shape, viewed.shape, middle, extents) == start


def test_splitting_in_another_place_is_not_understood() -> None:
    index = (variable("a").scaled(3).plus(variable("b")),)
    with pytest.raises(Unknown, match="splits"):
        reshaped((3, 2), (6,), index, {"a": 2, "b": 3})


def test_constants_are_bands_or_nothing() -> None:
    for band in (
        torch.ones(9, 9).tril(),
        torch.ones(9, 9).triu(2),
        torch.ones(9, 7).tril(1).triu(-2),
    ):
        seen = dense(truth(element(band, (ROW, COL))))[:9, : band.shape[1]]
        assert torch.equal(seen, band.bool())
    lie = torch.ones(9, 9).tril()
    lie[3, 5] = 1
    with pytest.raises(Unknown, match="band"):
        element(lie, (ROW, COL))
    with pytest.raises(Unknown, match="NaN"):
        element(torch.full((3, 3), float("nan")), (ROW, COL))
