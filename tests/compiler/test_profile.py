"""Profiles under a planted clock: what belongs to whom, and what removing it could gain."""

from __future__ import annotations

import math

import pytest
import torch
from torch import fx, nn

from attnopt.compiler import profile as profiling
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.profile import ceiling, profile
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.regions import site_parts, sublayer_nodes
from tests.decoder import decoder


class Clock:
    """Advances by a planted number of seconds at each node, by what the node computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        plain = fx.Interpreter.run_node

        def run_node(runner: fx.Interpreter, n: fx.Node) -> object:
            if n.target is ATTENTION:
                self.now += 3.0
            elif n.target is torch.ops.aten.linear.default:
                self.now += 1.0
            return plain(runner, n)

        monkeypatch.setattr(fx.Interpreter, "run_node", run_node)

    def __call__(self) -> float:
        return self.now


def test_time_goes_to_its_site_part_and_sublayer(monkeypatch: pytest.MonkeyPatch) -> None:
    got = profile(decoder(), clock=Clock(monkeypatch), repeats=2)
    assert got.total_s == 2 * (3 + 4 + 2) + 1
    assert got.site_s == {"s0": 7.0, "s1": 7.0}
    assert got.site_part_s["s0"] == {"q": 1, "k": 1, "v": 1, "out": 1, "core": 3, "between": 0}
    assert got.sublayer_s == {"b0.attention": 7.0, "b1.attention": 7.0}
    assert got.share("s0") == got.share("b0.attention") == 7 / 19
    assert got.attention_share == pytest.approx(14 / 19)
    assert got.share("s0", ("core", "v")) == pytest.approx(4 / 19)
    assert got.evidence == "measured" and got.repeats == 2


def test_ceilings_follow_amdahl() -> None:
    assert ceiling(0.0) == 1.0 and ceiling(0.5) == 2.0 and ceiling(1.0) == math.inf
    with pytest.raises(ValueError, match="between 0 and 1"):
        ceiling(1.2)


def test_a_node_of_two_sites_is_split_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    program = decoder()
    monkeypatch.setattr(profiling, "site_parts", lambda program, site: {"shared": "core"})
    table = profiling._shared_parts(program, {"shared": 4.0})
    assert table["s0"]["core"] == table["s1"]["core"] == 2.0


def test_real_time_adds_up() -> None:
    got = profile(decoder(), repeats=2)
    assert got.total_s == pytest.approx(sum(got.node_s.values()))
    assert 0 < got.attention_share < 1 and got.call_s > 0
    assert got.as_json()["sites"]["s0"]["share"] == got.share("s0")


def test_a_program_with_nothing_raised_has_no_sites() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(2, 4)
    module = torch.export.export(model, (x,), strict=False).module()
    assert isinstance(module, fx.GraphModule)
    got = profile(Program(module, Batch((x,))), repeats=1)
    assert got.total_s > 0 and not got.site_s
    assert got.attention_share == 0.0


def test_the_parts_of_a_site_are_what_serves_it_alone() -> None:
    program = decoder()
    site = program.site("s0")
    assert site.q and site.out
    parts = site_parts(program, site)
    assert parts[site.q.projection] == "q" and parts[site.out.projection] == "out"
    assert parts[site.node] == "core" and site.q.source not in parts
    assert set(parts) & set(site_parts(program, program.site("s1"))) == set()
    assert program.parameter_nodes(site.q.weight)[0].name in parts
    inner = sublayer_nodes(program, program.sublayers[0])
    assert site.q.source in inner and program.sublayers[0].exit not in inner


def test_a_site_that_a_rewrite_removed_has_no_parts() -> None:
    program = decoder().copy()
    site, sublayer = program.site("s0"), program.sublayers[0]
    program.node(sublayer.exit).replace_all_uses_with(program.node(sublayer.entry))
    program.clean()
    assert site_parts(program, site) == {}
    assert profile(program, repeats=1).share("s0") == 0.0
