"""Costs against formulas by hand, at several sizes, with and without weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from attnopt.compiler.cost import Workload, cost
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask, MaskKind
from attnopt.compiler.trace import trace
from tests.decoder import (
    BLOCKS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    VOCABULARY,
    WIDTH,
    decoder,
)

PROJECTIONS = 2 * WIDTH * HEADS * HEAD_DIM + 2 * WIDTH * KV_HEADS * HEAD_DIM
MLP = 2 * WIDTH * HIDDEN


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(2, 8), (3, 5), (1, 4096)])
def test_flops_are_those_of_the_formula(meta: bool, batch: int, length: int) -> None:
    got = cost(decoder(meta=meta), Workload(batch, length))
    tokens = batch * length
    core = 4 * batch * HEADS * HEAD_DIM * length * (length + 1) / 2
    site = 2 * tokens * PROJECTIONS + core
    assert got.site_core_flops["s0"] == core
    assert got.site_flops["s0"] == got.site_flops["s1"] == site
    assert got.sublayer_flops["b0.attention"] == site
    total = BLOCKS * (site + 2 * tokens * MLP) + 2 * tokens * WIDTH * VOCABULARY
    assert got.flops == total
    assert got.share("s0") == site / total and got.core_share("s0") == core / total


def test_without_a_workload_the_example_counts() -> None:
    assert cost(decoder(batch=2, length=8)).flops == cost(decoder(), Workload(2, 8)).flops


def test_parameters_by_site_and_in_all() -> None:
    got = cost(decoder())
    norms = 2 * BLOCKS * WIDTH
    assert got.site_params["s0"] == PROJECTIONS
    assert got.sublayer_params["b0.attention"] == PROJECTIONS + WIDTH
    assert got.params == BLOCKS * (PROJECTIONS + MLP) + norms + 2 * WIDTH * VOCABULARY
    assert got.param_bytes == 4 * got.params
    assert cost(decoder(meta=True)).params == got.params


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            made: Tensor = self.head(self.embed(ids))
            return made

    ids = torch.tensor([[1, 2]])
    module = torch.export.export(Tied(), (ids,), strict=False).module()
    assert isinstance(module, torch.fx.GraphModule)
    assert cost(Program(module, Batch((ids,)))).params == 28


def test_bytes_of_a_product_and_none_of_a_view() -> None:
    program = decoder(batch=1, length=8)
    got = cost(program)
    site = program.site("s0")
    assert site.q is not None
    assert got.nodes[site.q.projection].bytes == 4 * (8 * WIDTH + WIDTH * WIDTH + 8 * WIDTH)
    views = [n.name for n in program.graph.nodes if n.target is torch.ops.aten.transpose.int]
    assert views and all(got.nodes[name].bytes == 0 for name in views)


def test_only_the_reference_backend_moves_the_scores() -> None:
    slim, fat = cost(decoder(backend="sdpa")), cost(decoder(backend="reference"))
    node = decoder().attentions()[0].name
    assert fat.nodes[node].bytes - slim.nodes[node].bytes == 4 * (2 * HEADS * 8 * 8) * 4


@pytest.mark.parametrize("kind", ["full", "causal", "window"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("left", "sink"), [(1, 0), (1, 2), (3, 0), (3, 2), (3, 9), (40, 2)])
def test_pairs_are_those_of_the_dense_mask(
    kind: MaskKind, causal: bool, left: int, sink: int
) -> None:
    mask = Mask(kind, left, sink, causal)
    for queries, keys in itertools.product((1, 5, 11), (1, 4, 11)):
        dense = mask.dense(queries, keys).broadcast_to(queries, keys)
        assert mask.pairs(queries, keys) == int(dense.sum()), (queries, keys)


def test_torchs_own_counter_knows_the_canonical_op() -> None:
    spec = AttentionSpec(4, 2, 6, 8, 1.0, CAUSAL)
    q, k, v = torch.randn(2, 4, 5, 6), torch.randn(2, 2, 5, 6), torch.randn(2, 2, 5, 8)
    with FlopCounterMode(display=False) as counter:
        ATTENTION(q, k, v, [], spec.with_(backend="sdpa").text)
    assert counter.get_total_flops() == 2 * 2 * 4 * 15 * (6 + 8)


@pytest.mark.parametrize("causal", [False, True])
def test_an_unraised_sdpa_counts_like_the_canonical_op(causal: bool) -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    inputs = tuple(torch.randn(2, 3, 6, 4) for _ in range(3))
    module = torch.export.export(Plain(), inputs, strict=False).module()
    assert isinstance(module, torch.fx.GraphModule)
    got = cost(Program(module, Batch(inputs)))
    assert got.flops == 2 * 3 * (21 if causal else 36) * 2 * 8
    assert not got.site_flops


def test_a_large_model_needs_no_memory() -> None:
    program = decoder(meta=True)
    assert all(p.is_meta for p in program.module.parameters())
    got = cost(program, Workload(64, 100_000))
    assert got.flops > 1e13


def test_weights_on_meta_and_inputs_on_the_cpu_mix() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(6, 4, bias=False, device="meta")

        def forward(self, x: Tensor) -> Tensor:
            steps = torch.arange(x.shape[1], device=x.device)
            made: Tensor = self.table(x.to("meta") * steps[:, None])
            return made

    x = torch.randn(2, 5, 6, device="meta")
    module = torch.export.export(Positions(), (x,), strict=False).module()
    assert isinstance(module, torch.fx.GraphModule)
    got = cost(Program(module, Batch((torch.randn(2, 5, 6),))))
    assert got.flops == 2 * 2 * 5 * 6 * 4


def test_a_traced_and_raised_llama_counts_as_its_configuration_says() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hf = transformers.LlamaForCausalLM(config).eval()

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.hf(input_ids=input_ids, use_cache=False).logits}

    ids = torch.randint(0, 17, (2, 8))
    loaded = Loaded(Wrapped(), None, (), {"input_ids": ids}, "llama", "hf", task="causal-lm")
    program = raise_program(trace(loaded))
    got = cost(program, Workload(3, 10))
    assert got.site_params["s0"] == 2 * 24 * 24 + 2 * 24 * 12
    products = got.flops - got.site_core_flops["s0"]
    assert products == 2 * 30 * (got.site_params["s0"] + 3 * 24 * 40 + 24 * 17)
    assert got.site_core_flops["s0"] in (4 * 3 * 24 * 100, 4 * 3 * 24 * 55)  # mask kept or class
    assert got.params == 2 * 24 * 17 + got.site_params["s0"] + 3 * 24 * 40 + 3 * 24


def test_an_attention_with_other_keys_than_queries_counts_on_fake_tensors() -> None:
    """Counting must not ask a fake mask for its values, as a decoder that reads an encoder did."""
    expected = CAUSAL.pairs(3, 5)
    with FakeTensorMode():
        assert CAUSAL.pairs(3, 5) == expected
