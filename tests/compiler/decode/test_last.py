"""What of a prompt is computed of its last position alone, and that its logits stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.last import LAST, MIXES
from attnopt.compiler.decode.state import State
from tests.compiler.decode.test_derive import Small, traced
from tests.tolerance import assert_close

WIDE = 48  # a width that nothing else has
aten = torch.ops.aten


class Layers(nn.Module):
    """Two layers of attention and of an MLP, which is told how to go about its tokens."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embed = nn.Embedding(50, 32)
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(32, WIDE) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(WIDE // 2, 32) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for qkv, out, up, down in zip(self.qkv, self.out, self.up, self.down, strict=True):
            shape = (*x.shape[:2], 3, 4, 8)
            q, k, v = qkv(self.norm(x)).view(shape).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(y.transpose(1, 2).reshape(x.shape))
            x = x + self.mlp(x, up, down)
        made: Tensor = self.head(self.norm(x))
        return made

    def mlp(self, x: Tensor, up: nn.Module, down: nn.Module) -> Tensor:
        if self.form == "flat":  # one axis of batch and tokens together
            left, right = up(self.norm(x).view(-1, 32)).chunk(2, -1)
            made: Tensor = down(left.sigmoid() * right).view(x.shape[0], x.shape[1], 32)
            return made
        if self.form == "sized":  # the same, by their number
            flat = up(x.reshape(x.shape[0] * x.shape[1], 32))
            made = down(flat[:, ::2].tanh()).reshape(x.shape)
            return made
        if self.form == "numbered":  # looked up by number, as mixtures of experts do
            at = torch.arange(x.shape[0] * x.shape[1]).flip(0)
            made = down(up(x.reshape(-1, 32))[at][:, ::2])[at].view(x.shape)
            return made
        if self.form == "transposed":
            made = down((up(x).mT[:, : WIDE // 2] ** 2).mT)
            return made
        made = down(up(x).relu()[..., : WIDE // 2])
        return made


class Widths(fx.Interpreter):
    """Notes of how many rows each linear map is, by the width of its outputs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found = dict[int, list[int]]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.target in (aten.linear.default, aten.addmm.default):
            self.found.setdefault(value.shape[-1], []).append(value[..., 0].numel())
        return value


def read(decoder: Decoder, ids: Tensor) -> tuple[Tensor, dict[int, list[int]]]:
    state = decoder.state(len(ids), ids.shape[1])
    run = Widths(decoder.phase("prefill", last=True))
    with torch.no_grad():
        return run.run(ids, state.tables, state.caches), run.found


def same_caches(one: State, other: State) -> None:
    for cache, wanted in zip(one.caches, other.caches, strict=True):
        for x, y in zip(cache, wanted, strict=True):
            assert torch.equal(x, y)


def derived(model: nn.Module) -> Decoder:
    return derive(traced(model, input_ids=torch.randint(0, 50, (2, 12))))


@pytest.mark.parametrize("form", ["", "flat", "sized", "transposed", "numbered"])
def test_the_last_layer_is_keys_and_values(form: str) -> None:
    decoder = derived(Layers(form))
    ids = torch.randint(0, 50, (3, 10))
    every = decoder.prefill(decoder.state(3, 10), ids)
    made, rows = read(decoder, ids)
    assert_close(made, every[:, -1:])
    assert rows[50] == [3]
    assert rows[WIDE] == [30, 3]  # of the last layer, one token of each sequence
    assert rows[96] == [30, 30]  # keys and values of all


def test_caches_are_filled_all_the_same() -> None:
    decoder = derived(Layers(""))
    ids = torch.randint(0, 50, (2, 9))
    one, other = decoder.state(2, 16), decoder.state(2, 16)
    for state, last in ((one, True), (other, False)):
        decoder.prefill(state, ids[:, :5], last=last)
        decoder.step(state, ids[:, 5:], last=last)
    same_caches(one, other)


@pytest.mark.parametrize("mix", ["", "table", "convolved"])
def test_one_layer(mix: str) -> None:
    """Tables are cut too; a convolution mixes tokens, and is computed of all."""
    decoder = derived(Small(mix))
    ids = torch.randint(0, 50, (2, 7))
    every = decoder.prefill(decoder.state(2, 8), ids)
    assert_close(read(decoder, ids)[0], every[:, -1:])
    for node in decoder.phase("prefill", last=True).graph.nodes:
        if node.target is aten.convolution.default or node.meta.get(MIXES) in decoder.convolutions:
            assert not node.meta.get(LAST)


class Outputs(Layers):
    """More outputs than logits; `first` is what comes before these, and may be read by others."""

    def __init__(self, first: str) -> None:
        super().__init__("")
        self.first = first

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        logits = super().forward(input_ids)
        if self.first == "embeddings":
            return self.embed(input_ids), logits
        return logits, logits.argmax(-1), self.embed(input_ids)


@pytest.mark.parametrize("first", ["embeddings", "logits"])
def test_other_outputs(first: str) -> None:
    """What goes by the name of logits may be read on the way to others, which are left out."""
    decoder = derived(Outputs(first))
    ids = torch.randint(0, 50, (2, 7))
    every = decoder.prefill(decoder.state(2, 8), ids)
    made, rows = read(decoder, ids)
    assert_close(made, every[:, -1:])
    if first == "logits":
        assert rows[WIDE] == [14, 2]


class Early(Layers):
    """Logits of a first head, which later layers read."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        early = self.head(self.embed(input_ids))
        return early, super().forward(early.argmax(-1))


def test_logits_that_caches_need_are_of_all() -> None:
    decoder = derived(Early(""))
    ids = torch.randint(0, 50, (2, 7))
    one, other = decoder.state(2, 8), decoder.state(2, 8)
    every, last = decoder.prefill(one, ids), decoder.prefill(other, ids, last=True)
    assert_close(last, every[:, -1:])
    same_caches(other, one)


class Flat(Layers):
    """A flat row of all tokens that both an attention and what follows it read."""

    def mlp(self, x: Tensor, up: nn.Module, down: nn.Module) -> Tensor:
        self.row = x.reshape(-1, 32) if self.row is None else self.row
        made: Tensor = down(up(self.row + x.reshape(-1, 32))[:, ::2]).view(x.shape)
        return made

    def forward(self, input_ids: Tensor) -> Tensor:
        self.row: Tensor | None = None
        return super().forward(input_ids)


def test_what_cannot_be_cut_is_read_whole() -> None:
    """Of an axis of batch and tokens together, the last tokens are no slice."""
    decoder = derived(Flat(""))
    ids = torch.randint(0, 50, (3, 10))
    every = decoder.prefill(decoder.state(3, 10), ids)
    made, rows = read(decoder, ids)
    assert_close(made, every[:, -1:])
    assert rows[WIDE] == [30, 30] and rows[50] == [3]
