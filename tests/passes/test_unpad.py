"""Unpadding keeps every value at a real token, whatever the padding, and says where it may not be
done."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.contract import Edit, Miss, Notes, read_pass
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.packed_ops import PACK_INDEX, PACKED_ATTENTION
from attnopt.compiler.pipeline import apply_edit, apply_pass
from attnopt.compiler.program import Batch as Call
from attnopt.compiler.program import Program, record
from attnopt.compiler.raising import raise_program
from attnopt.compiler.spec import parse_spec
from attnopt.compiler.trace import trace
from attnopt.passes.simplify_mask import SimplifyMask
from attnopt.passes.unpad import Unpad
from tests.tolerance import assert_close

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 99, "max_position_embeddings": 64,
}  # fmt: skip
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "bert-eager": lambda: transformers.BertModel(
        transformers.BertConfig(**SIZES, attn_implementation="eager")
    ),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=99)
    ),
    "electra": lambda: transformers.ElectraModel(
        transformers.ElectraConfig(**SIZES, embedding_size=16)
    ),
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**SIZES)),
    "modernbert": lambda: transformers.ModernBertModel(
        transformers.ModernBertConfig(
            **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
            global_attn_every_n_layers=2, local_attention=6,
        )
    ),
    "t5": lambda: transformers.T5EncoderModel(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False)
    ),
}  # fmt: skip
LENGTHS = [[7, 4, 2], [9, 9, 9, 9], [3, 12, 3, 1, 3], [5, 0, 2], [6]]


class Wrapped(nn.Module):
    """A transformers model called with ids and a mask, giving a dict of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return {name: value for name, value in out.items() if isinstance(value, Tensor)}


def inputs(lengths: list[int], side: str = "right", seq: int = 0) -> dict[str, Tensor]:
    """Ids `[B, S]` and a mask with the given numbers of real tokens, at the right, at the left or
    anywhere."""
    seq = seq or max(lengths)
    mask = torch.zeros(len(lengths), seq, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        places = {"right": range(seq), "left": range(seq - 1, -1, -1)}.get(
            side, torch.randperm(seq).tolist()
        )
        row[list(places)[:length]] = 1
    return {"input_ids": torch.randint(5, 99, mask.shape), "attention_mask": mask}


def prepared(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> Program:
    """The module traced and raised, its masks as classes."""
    program = raise_program(trace(Loaded(module.eval(), None, args, kwargs, "tiny", "callable")))
    for site in program.sites:
        answer = SimplifyMask().rewrite(program.site(site.id), program, Notes(program))
        if isinstance(answer, Edit):
            program = apply_edit(program, program.site(site.id), answer)
    return program


def unpadded(program: Program) -> Program:
    answer = Unpad().rewrite(program, program, Notes(program))
    assert isinstance(answer, Edit), answer
    return apply_edit(program, program, answer)


def missed(program: Program) -> Miss:
    answer = Unpad().rewrite(program, program, Notes(program))
    assert isinstance(answer, Miss)
    return answer


@cache
def pair(name: str) -> tuple[Program, Program]:
    """A tiny model with weights of some size, and the same unpadded, in float64."""
    torch.manual_seed(1)
    model = Wrapped(ENCODERS[name]()).double()
    for parameter in model.parameters():
        parameter.data.normal_(0.1 if parameter.dim() == 1 else 0.0, 0.3)
    before = prepared(model, **inputs([7, 4, 2]))
    return before, unpadded(before)


def compare_real(before: Program, after: Program, given: dict[str, Tensor]) -> None:
    """All outputs agree at real tokens; outputs without a token axis agree everywhere."""
    real = given["attention_mask"].bool()
    with torch.no_grad():
        expected, actual = before(**given), after(**given)
    assert list(expected) == list(actual)
    for name in expected:
        assert actual[name].shape == expected[name].shape
        if expected[name].shape[:2] == real.shape:
            assert_close(actual[name][real], expected[name][real], name)
        else:
            assert_close(actual[name], expected[name], name)


@pytest.mark.parametrize("name", ENCODERS)
def test_real_tokens_keep_their_values(name: str) -> None:
    before, after = pair(name)
    assert not after.attentions()
    for lengths in LENGTHS:
        for side in ("right", "left", "mixed"):
            compare_real(before, after, inputs(lengths, side, seq=max(lengths) + 1))
    compare_real(before, after, inputs([1]))
    compare_real(before, after, inputs([1, 1, 0], seq=1))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_product_on_tokens_is_packed(name: str) -> None:
    before, _ = pair(name)
    answer = Unpad().rewrite(before, before, Notes(before))
    assert isinstance(answer, Edit)
    outside = 1 if "pooler_output" in before.run(Call(kwargs=inputs([2, 1]))) else 0
    assert answer.evidence["packed_products"] == answer.evidence["products"] - outside > 0


def test_padded_positions_hold_zero() -> None:
    _, after = pair("distilbert")
    given = inputs([6, 2, 0])
    (out,) = after(**given).values()
    assert (out[given["attention_mask"] == 0] == 0).all()
    assert (out[given["attention_mask"] == 1] != 0).all()


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_tokens_mix_within_their_sequence_only(name: str) -> None:
    """Changing one token changes its own sequence (later positions alone under a causal mask) and
    nothing else."""
    _, after = pair(name)
    given = inputs([6, 4, 3])
    changed = {**given, "input_ids": given["input_ids"].clone()}
    changed["input_ids"][1, 2] = 4
    with torch.no_grad():
        key = "logits" if name == "llama" else "last_hidden_state"
        moved = (after(**given)[key] != after(**changed)[key]).any(-1)
    assert not moved[0].any() and not moved[2].any()
    assert moved[1, 2:4].all() and bool(moved[1, :2].any()) is (name != "llama")


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_padded_ids_are_never_read(name: str) -> None:
    """Ids outside the vocabulary crash an embedding that reads them: at padded positions they do no
    harm."""
    _, after = pair(name)
    given = inputs([6, 4, 1])
    clean = after(**given)
    given["input_ids"][given["attention_mask"] == 0] = 10**6
    for before, poisoned in zip(clean.values(), after(**given).values(), strict=True):
        assert torch.equal(before, poisoned)


class Encoder(nn.Module):
    """Torch's own encoder, padding marked by True; pooled over the real tokens, or mixed by a
    convolution at the end."""

    def __init__(self, end: str = "", batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.end, self.batch_first = end, batch_first

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        if self.end == "before":
            x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        y: Tensor = self.encoder(x, src_key_padding_mask=pad)
        if self.end == "conv":
            y = y + self.conv(y.transpose(1, 2)).transpose(1, 2)
        if self.end == "mean":
            y = (y * (~pad).unsqueeze(-1).to(y.dtype)).sum(1) / (~pad).sum(1, keepdim=True)
        if self.end == "max":
            y = y.masked_fill(pad.unsqueeze(-1), -1e4).amax(1)
        if self.end == "plain mean":
            y = y.mean(1)
        return y


def batch(lengths: list[int], seq: int, batch_first: bool = True) -> tuple[Tensor, Tensor]:
    pad = torch.arange(seq)[None, :] >= torch.tensor(lengths)[:, None]
    x = torch.randn(len(lengths), seq, 16, dtype=torch.float64)
    return (x if batch_first else x.transpose(0, 1).contiguous()), pad


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_encoder(batch_first: bool) -> None:
    module = Encoder(batch_first=batch_first).double()
    before = prepared(module, *batch([5, 3, 1, 2], 7, batch_first))
    answer = Unpad().rewrite(before, before, Notes(before))
    assert isinstance(answer, Edit)
    assert answer.evidence["packed_products"] == answer.evidence["products"] == 8
    after = unpadded(before)
    for lengths, seq in (([5, 3, 1], 6), ([4, 4, 9, 2], 9), ([3], 3)):
        x, pad = batch(lengths, seq, batch_first)
        expected, actual = before(x, pad), after(x, pad)
        if not batch_first:
            expected, actual = expected.transpose(0, 1), actual.transpose(0, 1)
        assert_close(actual[~pad], expected[~pad])


def test_nan_in_padded_positions_does_not_leak() -> None:
    after = unpadded(prepared(Encoder().double(), *batch([5, 3, 1, 2], 7)))
    x, pad = batch([6, 2, 4], 6)
    clean = after(x, pad)
    poisoned = after(x.masked_fill(pad[..., None], float("nan")), pad)
    assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("end", ["mean", "max", "before"])
def test_mixing_that_cannot_see_padding_stays(end: str) -> None:
    """Pooling behind the mask reads constants at padded positions; a convolution before the encoder
    reads its input."""
    before = prepared(Encoder(end).double(), *batch([5, 3, 1, 2], 7))
    after = unpadded(before)
    x, pad = batch([6, 2, 4, 1], 7)
    expected, actual = before(x, pad), after(x, pad)
    if end == "before":
        expected, actual = expected[~pad], actual[~pad]
    assert_close(actual, expected)


@pytest.mark.parametrize("end, node", [("conv", "conv1d"), ("plain mean", "mean")])
def test_mixing_that_may_see_padding_is_a_reason_not_to(end: str, node: str) -> None:
    miss = missed(
        prepared(
            Encoder(end), *(x.float() if x.is_floating_point() else x for x in batch([5, 3], 7))
        )
    )
    assert "padded positions cannot be left out" in miss.reason
    assert node in miss.reason + miss.at


def test_not_without_a_padding_mask() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.encoder(x)
            return made

    miss = missed(prepared(Plain(), torch.randn(2, 5, 16)))
    assert miss.reason == "no attention has a padding mask: every position counts as real"


def test_not_twice_and_not_without_attention() -> None:
    _, after = pair("bert")
    assert missed(after).reason == "the program already runs on packed tokens"
    linear = trace(Loaded(nn.Linear(3, 3), None, (torch.randn(2, 3),), {}, "tiny", "callable"))
    assert missed(linear).reason == "the program has no raised attention"


def test_not_for_a_batch_of_one_fixed_by_the_trace() -> None:
    given = (torch.randn(1, 6, 16), torch.zeros(1, 6) > 0)
    exported = torch.export.export(Slow(Encoder().eval()), given, strict=False)
    program = raise_program(trace(Loaded(None, exported, given, {}, "tiny", "export")))
    (padding,) = [n for n in program.graph.nodes if n.name == "pad"]
    for node in program.attentions():
        spec = parse_spec(str(node.args[4]))
        node.args = (*node.args[:3], [padding], spec.with_(extras=("padding",)).text)
    assert missed(program).reason == "the batch size is fixed at 1 in this trace"


class Slow(nn.Module):
    """A module without torch's fused inference kernel."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        torch.backends.mha.set_fastpath_enabled(False)
        made: Tensor = self.inner(x, pad)
        torch.backends.mha.set_fastpath_enabled(True)
        return made


def test_pipeline_verifies_it_and_keeps_the_original() -> None:
    before, _ = pair("bert")
    nodes = [node.name for node in before.graph.nodes]
    after, (outcome,) = apply_pass(before, read_pass("unpad"), ("*",), Notes(before))
    assert outcome.applied, outcome.reason
    assert outcome.error is not None and outcome.error < 1e-10
    assert [node.name for node in before.graph.nodes] == nodes
    assert {after.spec(site).text for site in after.sites} == {
        site.spec.text for site in after.sites
    }
    compare_real(before, after.copy(), inputs([5, 2], "left"))


@pytest.mark.parametrize("name", ["bert", "modernbert", "t5", "llama"])
def test_it_exports_and_loads_with_every_dim_free(name: str) -> None:
    _, after = pair(name)
    dims = {
        key: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        for key in ("input_ids", "attention_mask")
    }
    exported = torch.export.export(
        after.module, (), inputs([5, 2, 3]), dynamic_shapes=dims, strict=False
    )
    stored = io.BytesIO()
    torch.export.save(exported, stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    given = inputs([3, 8, 8, 1])
    with torch.no_grad():
        for expected, actual in zip(after(**given).values(), loaded(**given).values(), strict=True):
            assert_close(actual, expected)


def test_packed_values_have_one_row_per_kept_token() -> None:
    _, after = pair("distilbert")
    (index,) = [n.name for n in after.graph.nodes if n.target is PACK_INDEX]
    attention = next(n.name for n in after.graph.nodes if n.target is PACKED_ATTENTION)
    found, _ = record(after, [index, attention], Call(kwargs=inputs([4, 1, 2], seq=9)))
    assert found[attention].shape == (7, 4, 8)
    kept, offsets, keys = found[index]
    assert kept.tolist() == [9, 18, 19, 0, 1, 2, 3]
    assert offsets.tolist() == [0, 1, 3, 7]
    assert not len(keys)


def test_text_round_trip() -> None:
    assert read_pass(Unpad().text) == Unpad()
