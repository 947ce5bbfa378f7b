"""Residual sublayers from dominators: every structure is found, what only looks like one is not."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.program import Program
from attnopt.compiler.raising.blocks import sublayers
from attnopt.compiler.site import Sublayer
from tests.residual_models import FAMILIES, LAYERS, MLP, WIDTH, Attention, Block, Decoder, traced
from tests.residual_models import traced_family as traced_family_

PAIRS = [f"b{i}.{kind}" for i in range(LAYERS) for kind in ("attention", "mlp")]


def traced_family(name: str, attention: str = "") -> Program:
    pytest.importorskip("transformers")
    return traced_family_(name, attention)[1]


def kinds(program: Program) -> list[str]:
    return [item.kind for item in sublayers(program)]


@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "") for name in sorted(FAMILIES)), ("llama", "eager")]
)
def test_finds_attention_and_mlp_of_every_layer(name: str, attention: str) -> None:
    program = traced_family(name, attention)
    found = sublayers(program)
    assert [item.id for item in found] == PAIRS
    assert [item.block for item in found] == [i for i in range(LAYERS) for _ in range(2)]
    for item in found:
        check(program, item)


def check(program: Program, item: Sublayer) -> None:
    """The exit adds the branch, and the inner nodes are dead once the branch is."""
    exit, branch = program.node(item.exit), program.node(item.branch)
    assert branch in exit.all_input_nodes
    assert str(program.node(item.entry).meta["val"].shape) == str(exit.meta["val"].shape)
    inner = {program.node(name) for name in item.inner}
    assert branch in inner
    assert exit not in inner
    assert program.node(item.entry) not in inner
    for node in inner - {branch}:
        assert set(node.users) <= inner
    assert any(node.op == "get_attr" for node in inner)


def test_module_is_the_deepest_common_one_without_the_prefix() -> None:
    first, second = sublayers(traced_family("llama"))[:2]
    assert first.module == "model.layers.0.self_attn"
    assert second.module == "model.layers.0.mlp"


def test_sequential_sublayers_are_a_chain() -> None:
    found = sublayers(traced_family("llama"))
    for before, after in pairwise(found):
        assert after.entry == before.exit


def test_parallel_branches_share_their_entry() -> None:
    found = sublayers(traced_family("neox"))
    for attention, mlp in zip(found[::2], found[1::2], strict=True):
        assert attention.entry == mlp.entry
        assert attention.branch != mlp.branch


def test_the_norm_after_a_post_norm_sum_is_no_part_of_the_branch() -> None:
    program = traced_family("bert")
    found = sublayers(program)
    norms = [n for n in program.graph.nodes if n.target is torch.ops.aten.layer_norm.default]
    inner = {name for item in found for name in item.inner}
    assert len(norms) == 1 + len(found)
    assert not inner & {norm.name for norm in norms}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_encoder(norm_first: bool, batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 2 * WIDTH, batch_first=batch_first, norm_first=norm_first
    )
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    found = sublayers(traced(model, torch.randn(2, 7, WIDTH)))
    assert [item.id for item in found] == PAIRS
    assert found[2].module == "layers.1.self_attn"


def test_nanogpt_block_counts_no_sum_inside_its_gelu() -> None:
    assert [item.id for item in sublayers(traced(Decoder(), tokens()))] == PAIRS


def tokens() -> Tensor:
    return torch.randint(0, 50, (2, 9))


class Plain(nn.Module):
    """Attention and MLP in a row, with no residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attention(x))


def test_a_model_without_residuals_has_none() -> None:
    assert sublayers(traced(Plain(), torch.randn(2, 7, WIDTH))) == ()


class Doubled(Plain):
    """Residuals of twice the stream."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.attention(x), x, alpha=2)


def test_a_stream_that_is_doubled_is_no_residual() -> None:
    assert sublayers(traced(Doubled(), torch.randn(2, 7, WIDTH))) == ()


class Skips(nn.Module):
    """Two blocks inside a long skip connection, and each hidden state returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.first(x)
        y = self.second(h)
        return x + y, h, y


def test_blocks_inside_a_long_skip_connection_are_found_one_by_one() -> None:
    found = sublayers(traced(Skips(), torch.randn(2, 7, WIDTH)))
    assert [item.id for item in found] == PAIRS[:4]


class Gated(nn.Module):
    """A scaled stream (as DeepNorm), a routed MLP, and a residual with one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 2), nn.ModuleList([MLP(), MLP()])
        self.attention, self.last = Attention(), nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](1.7 * x + self.attention(x))
        weight = torch.softmax(self.router(x), -1)
        routed = sum(weight[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        x = self.norms[1](1.7 * x + routed)
        return x + self.last(x)


def test_scaled_streams_and_routers() -> None:
    found = sublayers(traced(Gated(), torch.randn(2, 7, WIDTH)))
    assert found[0].id == "b0.attention"
    assert {item.kind for item in found[1:]} == {"mlp", "other"}
    assert found[-1].kind == "other"


def test_a_hundred_layers_take_little_time() -> None:
    program = repeated(100)
    start = time.process_time()
    found = sublayers(program)
    assert len(found) == 200
    assert time.process_time() - start < 5.0


def repeated(times: int) -> Program:
    """The graph of one block, copied behind itself: tracing that many layers takes long."""
    one = traced(Block(), torch.randn(2, 7, WIDTH))
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    (start,) = (n for n in one.graph.nodes if n.op == "placeholder")
    (end,) = (n for n in one.graph.nodes if n.op == "output")
    stream = values[start] = graph.node_copy(start)
    for _ in range(times):
        values[start] = stream
        for node in one.graph.nodes:
            if node.op not in ("placeholder", "output"):
                values[node] = graph.node_copy(node, lambda n: values[n])
        stream = values[end.all_input_nodes[0]]
    graph.output(stream)
    return Program(torch.fx.GraphModule(one.module, graph), one.example)
