"""A new projection in the place of an old one: the same function, or a reason why not."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

import pytest
import torch

from attnopt.compiler.contract import Miss
from attnopt.compiler.program import Program
from attnopt.compiler.reproject import reproject
from attnopt.compiler.site import Path, Site
from attnopt.compiler.site_weights import read_output, read_weight, write_output, write_query
from tests.attention_models import logits, raised, tokens
from tests.tolerance import assert_close

Which = Literal["q", "k", "v"]


def again(program: Program, which: Which) -> Site | Miss:
    """Reproject with the projection's own weights."""
    site = program.sites[0]
    weight, bias = read_weight(program, cast(Path, getattr(site, which)))
    flat = None if bias is None else bias.reshape(-1)
    return reproject(program, site, which, weight.flatten(0, 1), flat, len(weight))


@pytest.mark.parametrize("kind", ("grouped", "learned", "partial", "normed", "bloom", "by groups"))
def test_its_own_weights_change_nothing(kind: str) -> None:
    program = raised(kind)
    made = program.copy()
    for which in ("q", "k", "v"):
        site = again(made, which)  # type: ignore[arg-type]
        assert isinstance(site, Site), site
        made = made.with_sites([site])
    made.clean()
    for batch in (tokens(2, 11), tokens(3, 5)):
        assert_close(logits(made, batch), logits(program, batch))
    site = made.sites[0]
    assert made.spec(site).kv_heads == site.kv_heads == 4
    for which in ("q", "k", "v"):
        path = cast(Path, getattr(site, which))
        assert made.has(path.projection) and made.has(path.split)
        weight, _ = read_weight(made, path)
        assert_close(weight, read_weight(program, getattr(program.sites[0], which))[0])


def test_takes_any_number_of_heads_that_divides_the_queries() -> None:
    program = raised("grouped").copy()
    weight = torch.randn(2 * 4, 32)
    site = reproject(program, program.sites[0], "k", weight, None, 2)
    assert isinstance(site, Site)
    assert program.node(site.node).args[1].meta["val"].shape[1] == 2  # type: ignore[union-attr]
    miss = reproject(program.copy(), program.sites[0], "k", torch.randn(12, 32), None, 3)
    assert isinstance(miss, Miss)
    assert "cannot share 3" in miss.reason


def test_names_what_stands_in_the_way() -> None:
    program = raised("grouped")
    site = program.sites[0]
    assert site.k is not None
    unknown = replace(site, k=None, missing={"k": "it joins two projections"})
    miss = reproject(program.copy(), unknown, "k", torch.randn(8, 32), None, 2)
    assert isinstance(miss, Miss)
    assert "joins two" in miss.reason
    gone = replace(site, k=replace(site.k, split="gone"))
    miss = reproject(program.copy(), gone, "k", torch.randn(8, 32), None, 2)
    assert isinstance(miss, Miss)
    assert (miss.at, "earlier rewrite" in miss.reason) == ("gone", True)
    miss = reproject(program.copy(), site, "k", torch.randn(8, 31), None, 2)
    assert isinstance(miss, Miss)
    assert miss.at == site.k.source


def test_a_weight_per_head_on_the_way_does_not_adapt() -> None:
    """Something that is not alike for all heads cannot be cloned for fewer, and is named."""
    program = raised("llama").copy()
    site = program.sites[0]
    node = program.node(site.node)
    key = cast(torch.fx.Node, node.args[1])
    gain = program.parameter("gain", torch.rand(4, 1, 1, dtype=torch.float64), before=node)
    scaled = program.call(torch.ops.aten.mul.Tensor, (key, gain), before=node)
    node.update_arg(1, scaled)
    miss = reproject(program, site, "k", torch.randn(16, 32), None, 2)
    assert isinstance(miss, Miss)
    assert miss.at == scaled.name


@pytest.mark.parametrize("kind", ("grouped", "learned", "partial"))
def test_what_is_read_can_be_written_back(kind: str) -> None:
    program = raised(kind)
    made, site = program.copy(), program.sites[0]
    assert site.q is not None and site.out is not None
    weight, bias = read_weight(made, site.q)
    out = read_output(made, site.out)
    site = write_query(made, site, weight, bias)
    site = write_output(made, site, out)
    made.clean()
    assert_close(logits(made, tokens(2, 11)), logits(program, tokens(2, 11)))
    doubled = write_output(made, site, 2 * out)
    assert doubled.out is not None
    assert_close(read_output(made, doubled.out), 2 * out)
    assert_close(read_output(program, site.out), out)  # type: ignore[arg-type]


def test_a_weight_that_others_read_is_not_written() -> None:
    program = raised("llama").copy()
    site = program.sites[0]
    assert site.out is not None
    (read,) = program.parameter_nodes(site.out.weight)
    node = program.node(site.out.projection)
    other = program.call(torch.ops.aten.linear.default, (node.args[0], read), before=node)
    before = program.weight(site.out.weight).clone()
    made = write_output(program, site, 0 * read_output(program, site.out))
    assert made.out is not None and made.out.weight != site.out.weight
    assert torch.equal(program.weight(site.out.weight), before)
    assert node.args[1].target == made.out.weight  # type: ignore[union-attr]
    assert other.args[1] is read
