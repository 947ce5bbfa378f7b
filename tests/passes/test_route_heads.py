"""route_heads: what is off adds nothing but its mean, and steps equal the whole."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

import pytest
import torch

from attnopt.compiler.attend_routed import calls
from attnopt.compiler.contract import Notes, passes, read_pass
from attnopt.compiler.cost import cost
from attnopt.compiler.decode import caches, derive
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.pipeline import apply_edit
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.route_graph import Router, gate_of, install
from attnopt.compiler.routing import Seen
from attnopt.compiler.trace import trace
from attnopt.passes.refit import Refit
from attnopt.passes.route_heads import RouteHeads
from tests.attention_models import applied, distance, logits, missed, notes, raised, tokens
from tests.families import Block
from tests.tolerance import assert_close

HALF = "route_heads{active=0.5}"


@lru_cache(maxsize=16)
def routed(kind: str, line: str = HALF) -> tuple[Program, dict[str, float]]:
    program = raised(kind)
    made, edits = applied(program, read_pass(line), notes(program))
    return made, dict(edits[0].evidence)


def gated(program: Program, router: Router) -> Program:
    made = program.copy()
    install(made, made.sites[0], router)
    made.clean()
    return made


def steady(program: Program, group: int) -> Program:
    """The program with the values of one key/value head the same for all tokens."""
    made = program.copy()
    path = made.sites[0].v
    assert path is not None
    weight = made.weight(path.weight).detach().clone()
    (weight if path.layout == "out_in" else weight.T)[path.channels[group]] = 0
    made.set_weight(path.weight, weight)
    return made


@pytest.mark.parametrize("kind", ("grouped", "learned"))
def test_all_heads_on_is_the_program(kind: str) -> None:
    program = raised(kind)
    spec = program.spec(program.sites[0])
    rest = torch.full((spec.heads, spec.v_dim), float("nan"), dtype=torch.float64)
    whole = gated(program, Router(4, torch.zeros(4, dtype=torch.bool), rest))
    assert torch.equal(logits(whole, tokens(3, 19)), logits(program, tokens(3, 19)))


@pytest.mark.parametrize("kind", ("grouped", "learned"))
def test_a_head_that_says_the_same_of_all_tokens_can_be_off(kind: str) -> None:
    """Its result is zero, or with a bias another constant, which its mean is."""
    program = steady(raised(kind), 1)
    made, edits = applied(program, RouteHeads(0.75, router="linear"), notes(program))
    assert edits[0].evidence["heldout"] < 1e-20
    assert_close(logits(made, tokens(3, 19)), logits(program, tokens(3, 19)))


@pytest.mark.parametrize("line", (HALF, "route_heads{active=0.5 router=norm}"))
def test_as_many_heads_run_as_are_asked_for(line: str) -> None:
    made, _ = routed("grouped", line)
    gate = gate_of(made.node(made.sites[0].node))
    assert gate is not None
    known = notes(raised("grouped"))
    ((values, _),) = list(known.record(made, [gate.on.name, gate.join.name], known.heldout))
    on = values[gate.on.name][..., 0].transpose(1, 2).flatten(0, 1).unflatten(1, (4, 2))
    assert torch.equal(on[..., 0], on[..., 1])  # query heads of one key/value head go together
    assert (on[..., 0].sum(1) == 2).all()
    always = on[..., 0].all(0)
    assert int(always.sum()) == 1
    assert on[..., 0].any(0).sum() > 2  # and others take turns


@pytest.mark.parametrize("kind", ("grouped", "learned"))
def test_what_is_lost_is_what_was_told(kind: str) -> None:
    program, known = raised(kind), notes(raised(kind))
    made, evidence = routed(kind)
    out = program.sites[0].out
    assert out is not None
    bias = 0.0 if out.bias is None else program.weight(out.bias)
    judged = [Batch((), {"input_ids": known.heldout[0].kwargs["input_ids"][2:]})]  # of 4 sequences
    for batches, key in ((known.calibration, "residual"), (judged, "heldout")):
        lost = energy = 0.0
        for (mine, _), (theirs, _) in zip(
            known.record(made, [out.projection], batches),
            known.record(program, [out.projection], batches), strict=True,
        ):  # fmt: skip
            lost += float((mine[out.projection] - theirs[out.projection]).square().sum())
            energy += float((theirs[out.projection] - bias).square().sum())
        assert evidence[key] == pytest.approx(lost / energy, rel=1e-6)
    kind = min(("norm", "linear"), key=lambda name: evidence[f"compared_{name}"])
    assert evidence["heldout"] == evidence[f"heldout_{kind}"] != evidence[f"compared_{kind}"]
    assert evidence["heldout_least"] < evidence["heldout"]


def test_the_router_that_loses_less_is_taken() -> None:
    made = {name: routed("learned", HALF.replace("}", f" router={name}}}"))[0]
            for name in ("norm", "linear")}  # fmt: skip
    best, told = routed("learned")
    chosen = min(made, key=lambda name: told[f"compared_{name}"])
    assert distance(best, made[chosen]) == 0.0
    assert distance(made["norm"], made["linear"]) > 0


def test_means_are_those_of_tokens_that_a_head_is_off_for() -> None:
    z = torch.arange(12.0).view(3, 4, 1)
    seen = Seen(z, torch.zeros(3, 2), None, torch.ones(4, 1, 5))
    off = torch.tensor([[True, False], [False, False], [True, False]])
    assert seen.means(off).flatten().tolist() == [4.0, 5.0, 6.0, 7.0]


@pytest.mark.parametrize("kind", ("grouped", "learned"))
def test_steps_that_read_some_heads_are_the_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = routed(kind)
    decoder = derive(made)
    read: list[int] = []

    def eager(*given: object) -> list[tuple[int, int]] | None:
        found = partial(calls, least=0)(*given)  # type: ignore[arg-type]
        read.append(-1 if found is None else sum(last - first for first, last in found))
        return found

    monkeypatch.setattr(caches, "calls", eager)
    batch = tokens(1, 64, 3)
    expected, ids = logits(made, batch), batch.kwargs["input_ids"]
    state = decoder.state(1, 80)
    steps = [decoder.step(state, ids[:, at : at + 1]) for at in range(64)]
    actual = torch.cat(steps, 1)
    held = made.spec(made.sites[0]).kv_heads  # which may hold heads repeated
    assert read == [held // 2] * 63  # the first token is a prompt
    assert float((actual - expected).abs().max()) < 1e-4
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


def test_what_comes_after_still_works() -> None:
    program, made = raised("grouped"), routed("grouped")[0]
    mended, edits = applied(made, Refit(), notes(program))
    assert edits[0].evidence["heldout_after"] < edits[0].evidence["heldout_before"]
    assert distance(mended, program) < distance(made, program)
    more = cost(made).site_flops["s0"] - cost(program).site_flops["s0"]
    assert more == 2 * 22 * 32 * 4  # the router alone: 22 tokens, a width of 32, 4 scores
    assert made.spec(made.sites[0]) == program.spec(program.sites[0])
    assert "routed already" in missed(made, RouteHeads(0.5), notes(program)).reason
    assert not read_pass("prune_heads{keep=0.5}").rewrite(made.sites[0], made, notes(program))


def test_a_plain_module_and_half_precision() -> None:
    x = torch.randn(2, 11, 64)
    for dtype in (torch.float64, torch.bfloat16):
        loaded = Loaded(Block().to(dtype).eval(), None, (), {"x": x.to(dtype)}, "plain", "callable")
        program = raise_program(trace(loaded))
        known = Notes(program, [Batch((), {"x": torch.randn(8, 20, 64).to(dtype)})])
        edit = RouteHeads(0.5).rewrite(program.sites[0], program, known)
        assert edit
        made = apply_edit(program, program.sites[0], edit)
        assert made.run(Batch((), {"x": x.to(dtype)})).dtype == dtype
        assert "2 of 4" in edit.note


def test_says_why_it_does_not_fire() -> None:
    program = raised("learned")
    known = notes(program)
    assert "all of them" in missed(program, RouteHeads(0.875), known).reason
    assert "calibration" in missed(program, RouteHeads(), Notes(program)).reason
    assert "shared below 1" in missed(program, RouteHeads(shared=1.0), known).reason
    site = program.sites[0]
    assert site.out is not None
    for changed, why in (
        (replace(site, kv_heads=1), "one key/value head"),
        (replace(site, out=None, missing={"out": "made so"}), "made so"),
        (replace(site, out=replace(site.out, channels=site.out.channels[:, :0])), "factors"),
    ):
        other = program.copy().with_sites([changed])
        assert why in missed(other, RouteHeads(), known).reason
    other = program.copy().with_sites([replace(site, q=None)])
    assert "no function of one" in missed(other, RouteHeads(router="linear"), known).reason
    answer = RouteHeads().rewrite(other.sites[0], other, known)
    assert answer and "norms of queries" in answer.note


def test_reads_back_from_its_text() -> None:
    made = passes()["route_heads"](active=0.5, router="norm")
    assert made.text == "route_heads{active=0.5 router=norm}"
    assert read_pass(made.text) == made
