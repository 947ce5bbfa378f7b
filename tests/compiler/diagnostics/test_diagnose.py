"""Whole programs with known answers: copying, duplicated and rank-one heads, empty sublayers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.autotune.record import dump, read
from attnopt.compiler import attend
from attnopt.compiler.diagnostics.diagnose import OutOfTime, diagnose
from attnopt.compiler.diagnostics.diagnosis import Diagnosis
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.program import Batch, Program, peek
from attnopt.compiler.raising import raise_program
from attnopt.compiler.site import Site
from attnopt.compiler.site_weights import read_output
from attnopt.compiler.skip_order import influence
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask
from tests.decoder import HEAD_DIM, decoder
from tests.programs import one_attention
from tests.residual_models import Decoder, traced, traced_family

WORDS = 300


class Induction(nn.Module):
    """A head that looks for the token after the last occurrence of the present one, and one that
    reads all alike. The key of a position is the token before it."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.line = spec.text
        self.words = nn.Embedding.from_pretrained(40.0 * torch.eye(WORDS))

    def forward(self, ids: Tensor) -> Tensor:
        now = self.words(ids)
        before = torch.cat((torch.zeros_like(now[:, :1]), now[:, :-1]), dim=1)
        q = torch.stack((now, torch.zeros_like(now)), dim=1)
        k = torch.stack((before, before), dim=1)
        made: Tensor = ATTENTION(q, k, q, [], self.line)
        return made


def induction() -> tuple[Program, list[Batch]]:
    spec = AttentionSpec(2, 2, WORDS, WORDS, scale=1.0, mask=CAUSAL)
    ids = torch.stack([torch.randperm(WORDS)[:150] for _ in range(2)])
    exported = torch.export.export(Induction(spec), (ids,), strict=False)
    module = exported.module()
    assert isinstance(module, torch.fx.GraphModule)
    program = Program(module, Batch((ids,)), name="induction")
    (node,) = program.attentions()
    return program.with_sites([Site("s0", node.name, "", "", spec, 2)]), [Batch((ids,))]


def test_an_induction_head_copies_and_a_uniform_one_does_not() -> None:
    program, batches = induction()
    (site,) = diagnose(program, batches).sites
    assert site.per_head["induction"][0] == pytest.approx(1.0, abs=1e-4)
    assert site.per_head["retrieval"][0] == 1.0
    assert site.per_head["induction"][1] < 0.05 and site.per_head["retrieval"][1] == 0.0


class Masked(Induction):
    """The same under a mask, True at real tokens; or at padding, where `turned`."""

    turned = False

    def forward(self, ids: Tensor, told: Tensor) -> Tensor:  # type: ignore[override]
        now = self.words(ids)
        before = torch.cat((torch.zeros_like(now[:, :1]), now[:, :-1]), dim=1)
        q = torch.stack((now, torch.zeros_like(now)), dim=1)
        k = torch.stack((before, before), dim=1)
        keep = torch.logical_not(told) if self.turned else told
        made: Tensor = ATTENTION(q, k, q, [keep], self.line)
        return made


def masked(keep: Tensor, turned: bool = False) -> Program:
    spec = AttentionSpec(2, 2, WORDS, WORDS, scale=1.0, mask=CAUSAL, extras=("padding",))
    ids = torch.stack([torch.randperm(WORDS)[:150] for _ in range(2)])
    model = Masked(spec)
    model.turned = turned
    args = (ids, ~keep if turned else keep)
    module = torch.export.export(model, args, strict=False).module()
    assert isinstance(module, torch.fx.GraphModule)
    program = Program(module, Batch(args), name="masked induction")
    (node,) = program.attentions()
    return program.with_sites([Site("s0", node.name, "", "", spec, 2)])


def test_copies_that_a_given_mask_hides_do_not_count() -> None:
    keep = torch.ones(2, 150, dtype=torch.bool)
    keep[1, :100] = False
    program = masked(keep)
    found = diagnose(program, [program.example])
    assert found.sites[0].per_head["retrieval"][0] == 1.0
    assert found.sites[0].per_head["induction"][0] == pytest.approx(1.0, abs=1e-4)
    assert any("126 positions that a given mask hides" in note for note in found.notes)


def test_where_a_given_mask_hides_all_copies_nothing_is_measured() -> None:
    keep = torch.ones(2, 150, dtype=torch.bool)
    keep[:, :100] = False
    program = masked(keep)
    (site,) = diagnose(program, [program.example]).sites
    assert "retrieval" not in site.per_head and "induction" not in site.per_head
    assert "a mask of the data hides" in site.missing["retrieval"]


@pytest.mark.parametrize("turned", [False, True])
def test_a_mask_that_says_what_is_real_is_filled(turned: bool) -> None:
    keep = torch.ones(2, 150, dtype=torch.bool)
    keep[:, :100] = False
    program = masked(keep, turned)
    found = diagnose(program, [Batch(program.example.args, valid=keep)])
    assert found.sites[0].per_head["retrieval"][0] == 1.0
    assert not any("hides" in note for note in found.notes)


class Memory(nn.Module):
    """Attention to the keys and values of one sequence, the same for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(x.shape[0], x.shape[1], 4, 4) for part in self.qkv)
        weights = torch.einsum("bshd,thd->bhst", q, k[0]).softmax(-1)
        return torch.einsum("bhst,thd->bshd", weights, v[0])


def test_keys_without_a_batch() -> None:
    x = torch.randn(3, 7, 16)
    program = raise_program(traced(Memory(), x))
    assert len(program.sites) == 1
    found = diagnose(program, [Batch((x,))])

    assert found.sites[0].queries == 21


class SharedKeys(Memory):
    """Keys of one sequence, the same for all rows, and values of each."""

    def forward(self, x: Tensor) -> Tensor:
        heads = (-1, 7, 4, 4)
        q, v = (self.qkv[i](x).view(heads).transpose(1, 2) for i in (0, 2))
        k = self.qkv[1](x[:1]).view(heads).transpose(1, 2)
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def test_keys_without_a_batch_beside_values_with_one() -> None:
    x = torch.randn(3, 7, 16)
    program = raise_program(traced(SharedKeys(), x))
    assert len(program.sites) == 1
    found = diagnose(program, [Batch((x,))])

    assert found.sites[0].missing["kv"] == "7 tokens make keys, 21 make values"


def test_inputs_that_lie_deeper() -> None:
    from attnopt.compiler.diagnostics.diagnose import _positions, _rows

    batch = Batch(({"x": (torch.zeros(3, 7, 16),)},))
    assert (_rows(batch), _positions(batch)) == (3, 21)
    assert (_rows(Batch()), _positions(Batch())) == (0, 0)


def test_without_token_ids_copying_is_not_measured_and_says_why() -> None:
    program = one_attention(AttentionSpec(2, 2, 4, 4, 0.5, CAUSAL), seq=20)
    (site,) = diagnose(program, [program.example]).sites
    assert "retrieval" not in site.per_head
    assert site.missing["retrieval"] == "no input holds token ids"
    assert (
        "projection of k" in site.missing["kv"] and "projection of q" in site.missing["qk_weights"]
    )
    assert "qk_rank" in site.per_head and "qk_weights_rank" not in site.per_head


def _weights(program: Program) -> tuple[Tensor, ...]:
    return tuple(program.weight(f"blocks.0.{name}.weight").clone() for name in "qkv")


def changed(**weights: Tensor) -> Program:
    """The small decoder with weights of block 0 replaced."""
    program = decoder(2, 16).copy()
    for name, value in weights.items():
        program.set_weight(f"blocks.0.{name}.weight", value)
    return program


def batches(program: Program, count: int = 3) -> list[Batch]:
    shape = program.example.kwargs["input_ids"].shape
    return [Batch((), {"input_ids": torch.randint(0, 31, shape)}) for _ in range(count)]


def test_duplicated_heads_are_alike() -> None:
    q, k, v = _weights(decoder(2, 16))
    k[HEAD_DIM:], v[HEAD_DIM:] = k[:HEAD_DIM], v[:HEAD_DIM]
    q[2 * HEAD_DIM : 3 * HEAD_DIM] = q[:HEAD_DIM]  # heads 0 and 2 stand on key heads 0 and 1
    program = changed(q=q, k=k, v=v)
    site = diagnose(program, batches(program)).sites[0]
    assert site.similarity["maps"][0][2] == pytest.approx(1, abs=1e-4)
    assert site.similarity["maps"][0][1] < 0.999
    for name in ("keys", "values"):
        assert site.similarity[name][0][1] == pytest.approx(1, abs=1e-3), name
    assert len(site.per_head["kv_rank"]) == 2 and site.whole["kv_columns"] == 4 * HEAD_DIM


def test_a_rank_one_head_has_rank_one() -> None:
    q, _, v = _weights(decoder(2, 16))
    q[1:HEAD_DIM] = q[:1] * torch.arange(2, HEAD_DIM + 1)[:, None]
    v[:HEAD_DIM] = 0
    v[0] = 1.0
    program = changed(q=q, v=v)
    site = diagnose(program, batches(program)).sites[0]
    for name in ("qk_rank", "qk_weights_rank", "vo_weights_rank"):
        assert site.per_head[name][0] == pytest.approx(1, abs=1e-3), name
        assert site.per_head[f"{name}99"][0] == 1
        assert site.per_head[name][3] > 1.5, name
    assert site.spectra["qk_weights"][0][0] == pytest.approx(1, abs=1e-4)


def test_a_sublayer_that_adds_nothing_has_no_influence() -> None:
    out = torch.zeros_like(decoder(2, 16).weight("blocks.0.out.weight"))
    program = changed(out=out)
    first, second = diagnose(program, batches(program)).sublayers
    assert first.influence == pytest.approx(0, abs=1e-9)
    assert second.influence is not None and second.influence > 1e-3
    assert first.tokens == 3 * 2 * 16


def test_influence_is_that_of_the_ranking() -> None:
    program = decoder(2, 16)
    data = batches(program)
    ranked = influence(program, program.sublayers, data)
    for layer in diagnose(program, data).sublayers:
        assert layer.influence == pytest.approx(ranked[layer.id])


def test_what_a_window_changes_is_what_the_window_changes() -> None:
    """Against the attention run under the windowed mask itself."""
    program = decoder(2, 16)
    data = batches(program, 1)
    site = program.sites[0]
    found = diagnose(program, data).sites[0]
    operands = [node.name for node in program.node(site.node).args[:3]]  # type: ignore[union-attr]
    q, k, v = peek(program, operands, data[0]).values()
    assert site.out is not None
    output = read_output(program, site.out)
    spec = program.spec(site)
    window = spec.with_(mask=Mask("window", left=4, sink=4))
    runs = [attend.reference(q.double(), k.double(), v.double(), [], s) for s in (spec, window)]
    before, after = (torch.einsum("bhsd,hdw->bhsw", run, output) for run in runs)
    change = (after - before).square()
    heads = (change.sum((0, 2, 3)) / before.square().sum((0, 2, 3))).sqrt()
    assert found.per_head["moved_4"] == pytest.approx(heads.tolist(), abs=1e-4)
    whole = (after - before).sum(1).norm() / before.sum(1).norm()
    assert found.whole["moved_4"] == pytest.approx(float(whole), abs=1e-4)
    assert found.whole["moved_8"] < found.whole["moved_4"]


def test_the_seed_alone_decides_and_a_record_reads_back() -> None:
    program = decoder(2, 16)
    data = batches(program)
    runs = [diagnose(program, data, queries=4, seed=seed) for seed in (1, 1, 2)]
    assert runs[0].sites == runs[1].sites != runs[2].sites
    assert "4 queries" in " ".join(runs[0].notes)
    assert read(Diagnosis, dump(runs[0])) == runs[0]


def test_padding_changes_nothing() -> None:
    """Padded on the right with anything, real tokens give the figures that they give alone."""
    _, program = traced_family("llama")
    program = raise_program(program)
    ids = torch.randint(3, 50, (1, 24))
    alone = Batch((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    padded = torch.cat((ids, torch.randint(3, 50, (1, 9))), dim=1)
    mask = torch.cat((torch.ones(1, 24), torch.zeros(1, 9)), dim=1).long()
    longer = Batch((), {"input_ids": padded, "attention_mask": mask}, mask.bool())
    one, other = (diagnose(program, [batch]) for batch in (alone, longer))
    for left, right in zip(one.sites, other.sites, strict=True):
        for name in (
            "entropy",
            "entropy_share",
            "sink",
            "distance",
            "qk_rank",
            "vo_rank",
            "kv_rank",
        ):
            assert left.per_head[name] == pytest.approx(right.per_head[name], rel=1e-3), name
    for before, after in zip(one.sublayers, other.sublayers, strict=True):
        assert before.influence == pytest.approx(after.influence, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "neox", "gpt2", "bert", "vit", "t5", "sandwich-norm"])
def test_every_family_is_measured(name: str) -> None:
    _, program = traced_family(name)
    program = raise_program(program)
    kwargs: dict[str, Any] = dict(program.example.kwargs)
    found = diagnose(program, [Batch((), kwargs)])
    assert len(found.sites) == 2 and found.sublayers
    for site in found.sites:
        assert {"entropy", "sink", "local_1", "qk_rank", "vo_rank", "kv_rank"} <= set(site.per_head)
        assert set(site.missing) <= {"retrieval", "keys"}, site.missing
        for row in (site.per_head["entropy_share"], site.per_head["sink"]):
            assert all(0 <= value <= 1 + 1e-5 for value in row)
    assert all(layer.influence is not None for layer in found.sublayers)


def test_what_takes_too_long_is_given_up() -> None:
    program = decoder(2, 16)
    with pytest.raises(OutOfTime):
        diagnose(program, batches(program), seconds=0.0)


def test_a_plain_decoder_reads_back_through_raising() -> None:
    program = raise_program(traced(Decoder(), torch.randint(0, 50, (2, 32))))
    found = diagnose(program, [Batch((torch.randint(0, 50, (2, 32)),))])
    assert found.widths == (4, 8, 16) and found.tokens == 64
    assert all("retrieval" in site.per_head for site in found.sites)
