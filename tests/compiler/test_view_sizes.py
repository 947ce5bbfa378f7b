"""Where the heads are in a view: beside the batch, joined to it, or joined to their dims."""

from __future__ import annotations

from typing import cast

import pytest
from torch import fx

from attnopt.compiler.program import Program
from attnopt.compiler.reproject import between_nodes
from attnopt.compiler.site import Path
from attnopt.compiler.site_weights import VIEWS
from attnopt.compiler.view_sizes import Changed, one_axis
from tests.attention_models import raised


def chain(program: Program) -> tuple[fx.Node, list[fx.Node]]:
    """The heads of the keys, and what is made of them up to the attention."""
    site = program.sites[0]
    split = program.node(cast(Path, site.k).split)
    made = between_nodes(split, cast(fx.Node, program.node(site.node).args[1]))
    assert made is not None
    return split, made


def test_the_axis_of_heads_is_found_where_batch_and_heads_are_one() -> None:
    program = raised("bloom").copy()
    split, nodes = chain(program)
    changed = Changed(program, {split: split}, 2)
    assert changed.axis(split) == 2
    ranks = {node.meta["val"].dim(): changed.axis(node) for node in nodes}
    assert ranks == {4: 1, 3: 0}  # [batch, heads, seq, dim] and [batch * heads, seq, dim]


def test_sizes_that_are_nodes_follow_the_heads() -> None:
    program = raised("bloom").copy()
    split, nodes = chain(program)
    half = program.call(
        split.target, (split.args[0], *split.args[1:]), before=split.next
    )  # the same heads, of which half are left
    half.meta["val"] = half.meta["val"][:, :, :2]
    view = next(node for node in nodes if node.target in VIEWS)
    turned = cast(fx.Node, view.args[0])
    fewer = program.call(turned.target, (half, *turned.args[1:]), before=view)
    changed = Changed(program, {split: half}, 2)
    (sizes,) = changed.viewed(view, {turned: fewer})
    made = program.call(view.target, (fewer, sizes), before=view)
    assert str(made.meta["val"].shape[0]) == str(view.meta["val"].shape[0]).replace("4", "2")
    assert one_axis(view, made)
    assert isinstance(sizes[0], fx.Node) and sizes[1:] == [-1, 8]


@pytest.mark.parametrize("axis", (0, 1))
def test_a_view_of_one_axis_says_none_of_others(axis: int) -> None:
    program = raised("bloom").copy()
    split, nodes = chain(program)
    changed = Changed(program, {split: split}, axis)
    assert changed.axis(split) == axis  # batch and seq are axes like others
    joined = next(node for node in nodes if node.target in VIEWS)
    assert changed.axis(joined) == axis
