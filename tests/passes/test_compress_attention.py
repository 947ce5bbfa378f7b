"""compress_attention: exact at full width or where the model is that narrow, else it loses what was
told, and costs what was told."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler import latent
from attnopt.compiler.compressed import Compressed, Known, Widths, left_pairs
from attnopt.compiler.contract import Edit, Notes, passes, read_pass
from attnopt.compiler.cost import cost
from attnopt.compiler.decode import derive
from attnopt.compiler.decode.latents import Latent
from attnopt.compiler.gauge import unpaired
from attnopt.compiler.grams import rows, with_one
from attnopt.compiler.healing.touched import touched
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.lower import export
from attnopt.compiler.pipeline import apply_plan
from attnopt.compiler.plan import Outcome, Plan
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.site import Path, Site
from attnopt.compiler.site_heads import WHICH
from attnopt.compiler.site_weights import read_weight
from attnopt.compiler.trace import trace
from attnopt.passes.compress_attention import CompressAttention
from attnopt.passes.low_rank_projections import LowRankProjections
from attnopt.passes.refit import Refit
from tests.attention_models import (
    applied,
    distance,
    fused,
    logits,
    missed,
    notes,
    put,
    raised,
    rewritten,
    tokens,
)  # fmt: skip
from tests.tolerance import assert_close

HALF = "compress_attention{keep=0.5}"
IDENTITY = 1e-10  # of the logits' norm, in float64


def compressed(kind: str, line: str = HALF) -> tuple[Program, Edit]:
    return rewritten(kind, line)


def narrow(program: Program) -> Program:
    """The program with q, k and v of half the dims each, all made of half of the model's width."""
    made = program.copy()
    site = made.sites[0]
    pairs = site.rotary.pairs if site.rotary is not None else torch.empty(0, 2).long()
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(32, 16, dtype=torch.float64)).Q
    for which in WHICH:
        path = cast(Path, getattr(site, which))
        weight, bias = read_weight(made, path)
        dim = weight.shape[1]
        maps = torch.eye(dim, dtype=torch.float64).repeat(len(weight), 1, 1)
        free = torch.arange(dim) if which == "v" else unpaired(dim, pairs)
        gone = torch.tensor([]).long() if which == "v" else pairs[: len(pairs) // 2].reshape(-1)
        maps[:, gone, gone] = 0.0
        mixed = torch.randn(len(weight), len(free), len(free) // 2, dtype=torch.float64)
        maps[:, free[:, None], free[None, :]] = mixed @ mixed.mT / max(len(free), 1)
        put(made, path, maps @ weight @ basis @ basis.T,
            None if bias is None else (maps @ bias[..., None])[..., 0])  # fmt: skip
    return made


@pytest.mark.parametrize("kind", ("llama", "learned", "normed"))
def test_at_full_width_it_is_the_identity(kind: str) -> None:
    program = raised(kind)
    site, known = program.sites[0], notes(program)
    given = Known.read(program, site, known)
    heads = given.heads
    width = heads.q.shape[2] - 1
    inside = sum(x.shape[0] * x.shape[1] for x in (heads.q, heads.k, heads.v))
    widths = Widths(heads.k.shape[1], heads.v.shape[1], min(width, inside), 1.0, 1.0)
    made = Compressed.fit(program, given, widths)
    copy = program.copy()
    facts = made.write(copy)
    assert isinstance(facts, Site), facts
    assert max(made.latent.tails) < 1e-12
    copy = copy.with_sites([facts])
    copy.clean()
    assert distance(copy, program) < IDENTITY


@pytest.mark.parametrize("kind", ("llama",))
def test_a_model_that_is_that_narrow_loses_nothing(kind: str) -> None:
    program = narrow(raised(kind))
    made, (edit,) = applied(program, CompressAttention(0.5), notes(program))
    assert edit.evidence["work"] < 0.5
    assert max(v for k, v in edit.evidence.items() if k.endswith("predicted")) < 1e-10
    assert distance(made, program) < IDENTITY


@pytest.mark.parametrize("kind", ("llama", "grouped", "learned"))
def test_heads_of_the_latent_lose_what_was_told(kind: str) -> None:
    """Measured on what the projections of the new graph give."""
    program, (made, edit) = raised(kind), compressed(kind)
    known = notes(program)
    given = Known.read(program, program.sites[0], known)
    weight = chosen(edit)
    widths = given.widths(0.5, weight)
    assert isinstance(widths, Widths)
    fitted = Compressed.fit(program, given, widths, weight)
    parts = given.parts(fitted.small, left_pairs(program.sites[0], fitted.keys))
    x = with_one(recorded(program, known, program.sites[0].q))
    for which, (heads, metric) in zip(WHICH, parts, strict=True):
        path = cast(Path, getattr(made.sites[0], which))
        told, told_of_heldout = (edit.evidence[f"latent_{which}_{said}"]
                                 for said in ("predicted", "heldout"))  # fmt: skip
        found = recorded(made, known, path, of_projection=True)[:, path.channels]
        truth = torch.einsum("hdw,tw->thd", heads, x)
        lost, all_of_it = (
            torch.einsum("hde,the->thd", metric, value).square().sum()
            for value in (truth - found, truth - truth.mean(0))
        )
        assert abs(told - float(lost / all_of_it)) < 1e-6
        assert abs(told - edit.evidence[f"latent_{which}_residual"]) < 1e-6
        assert told_of_heldout > 0.5 * told
    assert sum(edit.evidence[f"latent_{which}_predicted"] for which in WHICH) > 1e-3
    if "qk_predicted" in edit.evidence:
        assert abs(edit.evidence["qk_predicted"] - edit.evidence["qk_residual"]) < 1e-6


def chosen(edit: Edit) -> float:
    """The weight of the logits that lost least."""
    tried = {k: v for k, v in edit.evidence.items() if k.startswith("damage_logits_")}
    assert len(tried) == 3
    return float(min(tried, key=lambda k: tried[k]).removeprefix("damage_logits_"))


def recorded(
    program: Program, known: Notes, path: Path | None, of_projection: bool = False
) -> Tensor:
    """What a path's projection reads or gives, all tokens of the calibration data `[tokens, n]`."""
    assert path is not None
    name = path.projection if of_projection else path.source
    return torch.cat([rows(v[name].double(), None) for v, _ in known.record(program, [name])])


def test_no_latent_of_the_rank_holds_more() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 12).double() @ torch.randn(12, 12).double()
    gram = with_one(x).T @ with_one(x)
    parts = tuple((torch.randn(2, n, 13).double(), torch.eye(n).double().expand(2, n, n))
                  for n in (3, 3, 4))  # fmt: skip
    shares = (0.2, 1.0, 3.0)
    made = latent.components(parts, gram, 5, shares)
    centred = x - x.mean(0)
    seen = [(centred @ heads[..., :-1].flatten(0, 1).T) for heads, _ in parts]
    stacked = torch.cat(
        [value / value.norm() * share**0.5 for value, share in zip(seen, shares, strict=True)], 1
    )
    values = torch.linalg.svdvals(stacked).square()
    lost = sum(tail * share for tail, share in zip(made.tails, shares, strict=True))
    assert lost == pytest.approx(float(values[5:].sum()), rel=1e-9)
    energies = latent.spectrum(parts, gram, shares).flip(0)
    assert_close(energies, values[: len(energies)])


@pytest.mark.parametrize("kind", ("llama", "grouped", "learned"))
def test_it_costs_the_shares_that_were_told(kind: str) -> None:
    """Operations counted in both graphs; what decoders hold of a token."""
    program, (made, edit) = raised(kind), compressed(kind)
    before, after = cost(program), cost(made)
    old, new = program.sites[0], made.sites[0]
    nodes = {path.projection for path in (old.q, old.k, old.v, old.out) if path is not None}
    spent = sum(before.nodes[name].flops for name in nodes)
    other = before.flops - spent - before.site_core_flops["s0"]
    left = after.flops - other - after.site_core_flops["s0"]
    assert left / spent == pytest.approx(edit.evidence["work"], rel=1e-6)
    assert edit.evidence["work"] <= 0.5 and edit.evidence["cache"] <= 0.5
    bytes_before, bytes_after = (derive(p, check=False).bytes_per_token() for p in (program, made))
    assert bytes_after / bytes_before == edit.evidence["cache"]
    assert f"{edit.evidence['work']:.0%} of the projections' products" in edit.note
    known = {name for name, _ in made.module.named_parameters()}
    assert new.q is not None and old.q is not None
    assert new.q.weight in known and old.q.weight not in known


@pytest.mark.parametrize("kind", ("llama", "learned"))
def test_decoding_and_export_go_on(kind: str) -> None:
    made, _ = compressed(kind)
    healed = touched(made, raised(kind)).names["s0"]
    assert sum("latent_down" in name for name in healed) == 1 and len(healed) >= 5
    if kind == "llama":
        module = export(made).module()
        for batch in (tokens(3, 19), tokens(2, 5)):
            assert_close(module(**batch.kwargs)["logits"], logits(made, batch))
    decoder, whole = derive(made), logits(made, tokens(2, 7))
    assert isinstance(next(iter(decoder.caches.values())), Latent) == (kind == "learned")
    ids, state = tokens(2, 7).kwargs["input_ids"], decoder.state(2, 7)
    steps = [decoder.prefill(state, ids[:, :5]), *(decoder.step(state, ids[:, i : i + 1])
             for i in (5, 6))]  # fmt: skip
    assert_close(torch.cat(steps, 1), whole)


def test_a_refit_mends_it() -> None:
    program = raised("learned")
    data = Notes(program, [tokens(8, 48, seed) for seed in (5, 6, 7)], [tokens(8, 48, 9)])
    made, _ = applied(program, CompressAttention(0.5), data)
    mended = Refit().rewrite(made.sites[0], made, data)
    assert isinstance(mended, Edit), mended
    assert mended.evidence["heldout_after"] < mended.evidence["heldout_before"]


def test_three_factors_of_their_own_lose_more_for_the_same_products() -> None:
    """The same heads, whose q, k and v read one subspace."""
    program = narrow(raised("llama"))
    known = notes(program)
    made, _ = applied(program, CompressAttention(0.5), known)
    alone, _ = applied(program, read_pass("shrink_head_dim{keep=0.5}"), known)
    apart, _ = applied(alone, LowRankProjections(0.75), known)
    assert cost(made).flops < cost(alone).flops
    assert distance(made, program) < IDENTITY < 1e-3 < distance(apart, program)


def test_where_decoders_hold_the_latent_heads_may_stay_wider() -> None:
    program = raised("learned")
    known = notes(program)
    given = Known.read(program, program.sites[0], known)
    tried = list(given.within(0.5))
    assert given.absorbed and {w.qk for w in tried} == {2, 4, 6, 8}
    assert all(w.work <= 0.5 and w.cache <= 0.5 for w in tried)
    rotary = Known.read(raised("llama"), raised("llama").sites[0], notes(raised("llama")))
    assert not rotary.absorbed and {w.qk for w in rotary.within(0.5)} == {2, 4}


def test_a_norm_of_each_head_leaves_queries_and_keys() -> None:
    made, edit = compressed("normed")
    assert "values 8 -> 4" in edit.note and "queries and keys stay: a norm" in edit.note
    assert edit.evidence["cache"] == 0.75
    assert made.spec(made.sites[0]).head_dim == 8


def test_says_why_it_does_not_fire() -> None:
    program = raised("llama")
    known = notes(program)
    assert "made so" in missed(fused(program), CompressAttention(), known).reason
    assert "calibration" in missed(program, CompressAttention(), Notes(program)).reason
    assert "no share" in missed(program, CompressAttention(1.0), known).reason
    small = raised("grouped")
    assert "no smaller heads" in missed(small, CompressAttention(0.25), notes(small)).reason


@pytest.mark.parametrize("kind", ("llama", "normed"))
def test_convolutions_change_nothing_before_they_are_trained(kind: str) -> None:
    """They are paid for, and are the site's own; a decoder keeps what they read."""
    program = raised(kind)
    known = replace(notes(program), healed=True)
    plain, _ = applied(program, CompressAttention(0.5), known)
    made, (edit,) = applied(program, CompressAttention(0.5, conv=3), known)
    assert "convolutions of 3 tokens" in edit.note
    # The norm of a head has parts in float32.
    assert distance(made, plain) < (1e-6 if kind == "normed" else IDENTITY)
    spec = made.spec(made.sites[0])
    channels = (spec.heads + spec.kv_heads) * spec.head_dim
    example = made.example.kwargs["input_ids"]
    assert cost(made).flops - cost(plain).flops == 2 * 3 * channels * example.numel()
    own = touched(made, program).names["s0"]
    assert sum(name.endswith("_conv_weight") for name in own) == 2
    assert set(touched(plain, program).names["s0"]) < set(own)
    assert made.sites[0].q is None and "convolution" in made.sites[0].missing["k"]
    assert derive(made).convolution_bytes() == 2 * channels * 8
    assert "convolution" in missed(made, read_pass("shrink_head_dim{keep=0.5}"), known).reason


@lru_cache(maxsize=1)
def healed() -> tuple[Program, list[Outcome]]:
    """A model with convolutions, trained on few tokens."""
    program = raised("learned", torch.float32)
    data = replace(notes(program), training=[tokens(4, 24, seed) for seed in range(10, 20)])
    plan = Plan().then("compress_attention{conv=2}").then("heal{tokens=9600 local=960 rate=0.02}")
    return apply_plan(program, plan, data)


def test_healing_trains_the_convolutions_and_decoding_goes_on() -> None:
    made, outcomes = healed()
    assert all(outcome.applied for outcome in outcomes), [o.reason for o in outcomes]
    told = outcomes[-1].evidence
    assert told["loss_after"] < 0.9 * told["loss_before"]
    names = [name for name, _ in made.module.named_parameters() if name.endswith("_conv_weight")]
    assert len(names) == 2
    for name in names:
        assert made.weight(name)[..., :-1].abs().max() > 0.01  # it reads earlier tokens
    decoder, ids = derive(made), tokens(2, 40).kwargs["input_ids"]
    assert not any(isinstance(cache, Latent) for cache in decoder.caches.values())
    state = decoder.state(2, 40)
    steps = [decoder.prefill(state, ids[:, :5]), decoder.step(state, ids[:, 5:9])]
    steps += [decoder.step(state, ids[:, at : at + 1]) for at in range(9, 40)]
    assert_close(torch.cat(steps, 1), logits(made, tokens(2, 40)))


def test_convolutions_that_nothing_trains_are_refused() -> None:
    program = raised("llama")
    known = notes(program)
    convolved = read_pass("compress_attention{conv=2}")
    told = missed(program, convolved, known)
    assert "without training" in told.reason and "heal{}" in told.help
    for later, applies in (("refit{}", False), ("heal{tokens=96 local=0}", True)):
        _, outcomes = apply_plan(program, Plan().then(convolved.text).then(later), known)
        assert outcomes[0].applied == applies
    _, outcomes = apply_plan(program, Plan().then("heal{tokens=96 local=0}").then(convolved.text),
                             known)  # fmt: skip
    assert "without training" in outcomes[-1].reason
    trained = replace(known, healed=True)
    alone = read_pass("compress_attention{conv=1}")
    assert "no earlier token" in missed(program, alone, trained).reason


def test_convolutions_read_no_padding() -> None:
    """Trained ones too: rows of zeros stand for padded tokens, whatever they hold."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.embed, self.qkv = nn.Embedding(40, 32), nn.Linear(32, 96)
            self.out, self.head = nn.Linear(32, 32), nn.Linear(32, 40)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            x = self.embed(input_ids)
            heads = (p.unflatten(-1, (4, 8)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
            past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            mask = past & (attention_mask[:, None, None, :] != 0)
            mixed = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
            return {"logits": self.head(x + self.out(mixed.transpose(1, 2).flatten(2)))}

    keep = torch.ones(2, 12, dtype=torch.int64)
    keep[0, :5] = 0
    ids = tokens(2, 12).kwargs["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": keep}
    loaded = Loaded(Masked().eval(), None, (), inputs, "masked", "callable")
    program = raise_program(trace(loaded))
    data = [Batch((), {**inputs, "input_ids": tokens(2, 12, at).kwargs["input_ids"]}, keep.bool())
            for at in range(4)]  # fmt: skip
    known = Notes(program, data[:2], data[2:], healed=True)
    made, _ = applied(program, CompressAttention(0.5, conv=3), known)
    plain, _ = applied(program, CompressAttention(0.5), known)
    batch = Batch((), inputs)
    assert_close(logits(made, batch)[keep.bool()], logits(plain, batch)[keep.bool()])
    for name, value in list(made.module.named_parameters()):
        if name.endswith("_conv_weight"):
            made.set_weight(name, torch.randn_like(value))
    decoder = derive(made)
    state = decoder.state(2, 12, decoder.masks(keep))
    steps = [decoder.prefill(state, ids[:, :8]), decoder.step(state, ids[:, 8:])]
    assert_close(torch.cat(steps, 1)[keep.bool()], logits(made, batch)[keep.bool()])
    alone = Batch((), {"input_ids": ids[:1, 5:], "attention_mask": keep[:1, 5:]})
    assert_close(logits(made, batch)[:1, 5:], logits(made, alone))


def test_convolutions_are_for_causal_attentions() -> None:
    x = {"x": torch.randn(2, 9, 32).double()}
    program = raise_program(
        trace(Loaded(Plain().double().eval(), None, (), x, "plain", "callable"))
    )
    known = Notes(program, [Batch((), x)], healed=True)
    assert "its mask is full" in missed(program, CompressAttention(conv=2), known).reason


class Plain(nn.Module):
    """An attention over all tokens, of one input or of two, whose product may make more."""

    def __init__(self, crossed: bool = False, more: int = 0) -> None:
        super().__init__()
        self.crossed, self.more = crossed, more
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 64 + more)
        self.o = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        k, v, rest = self.kv(x.tanh() if self.crossed else x).split((32, 32, self.more), -1)
        heads = (p.unflatten(-1, (4, 8)).transpose(1, 2) for p in (self.q(x), k, v))
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        made: Tensor = x + self.o(mixed.transpose(1, 2).flatten(2))
        return made + rest.sum() if self.more else made


@pytest.mark.parametrize(
    ("model", "why"),
    [(Plain(), ""), (Plain(crossed=True), "of one input"), (Plain(more=3), "makes more than")],
    ids=("one input", "two inputs", "a product of more"),
)
def test_a_plain_module(model: Plain, why: str) -> None:
    x = {"x": torch.randn(2, 9, 32).double()}
    loaded = Loaded(model.double().eval(), None, (), x, "plain", "callable")
    program = raise_program(trace(loaded))
    data = [Batch((), {"x": torch.randn(4, 12, 32).double()}) for _ in range(3)]
    known = Notes(program, data[:2], data[2:])
    if why:
        assert why in missed(program, CompressAttention(), known).reason
        return
    made, (edit,) = applied(program, CompressAttention(), known)
    assert edit.evidence["work"] <= 0.5 and made.spec(made.sites[0]).head_dim == 4
    lost = (cast(Tensor, made.run(data[2])) - cast(Tensor, program.run(data[2]))).norm()
    assert 0 < lost < cast(Tensor, program.run(data[2])).norm()


def test_reads_back_from_its_text() -> None:
    made = passes()["compress_attention"](keep=0.33)
    assert made.text == "compress_attention{keep=0.33}"
    assert read_pass(made.text) == made
