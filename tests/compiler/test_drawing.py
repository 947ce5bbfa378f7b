"""Drawings: what is folded, what is joined, and that the files are well-formed."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.compiler.drawing import INPUTS, Branch, Card, Drawing, Fold, drawing
from attnopt.compiler.drawing import Block as Drawn
from attnopt.compiler.drawing import Step as DrawnStep
from attnopt.compiler.drawing_dot import dot, quoted
from attnopt.compiler.drawing_svg import svg

WIDTH = 16
_SVG = "{http://www.w3.org/2000/svg}"


class Attention(nn.Module):
    """Two heads; `odd` ones are not understood, `causal` ones have a mask."""

    def __init__(self, kind: str = "full") -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        given = x if memory is None else memory
        q, k, v = (
            f(y).unflatten(2, (2, 8)).transpose(1, 2)
            for f, y in ((self.q, x), (self.k, given), (self.v, given))
        )
        scores = q @ k.transpose(-1, -2)
        if self.kind == "odd":
            scores = scores.sin()
        if self.kind == "causal":
            size = x.shape[1]
            far = torch.ones(size, size, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(far, float("-inf"))
        made: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return made


class Layer(nn.Module):
    """A pre-norm layer, with its MLP beside the attention or after it."""

    def __init__(self, kind: str = "full", parallel: bool = False) -> None:
        super().__init__()
        self.norm, self.attention, self.parallel = nn.LayerNorm(WIDTH), Attention(kind), parallel
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.parallel:
            return x + self.attention(h) + self.mlp(h)
        x = x + self.attention(h)
        return torch.as_tensor(x + self.mlp(x))


class Stack(nn.Module):
    """Layers of these kinds over a stem."""

    def __init__(self, *kinds: str, parallel: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(kind, parallel) for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


class TwoStacks(nn.Module):
    """An encoder, and a decoder that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stack("full", "full")
        self.first, self.cross = Attention("causal"), Attention()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        memory = self.encoder(x)
        y = y + self.first(y)
        return torch.as_tensor(y + self.cross(y, memory))


def drawn(model: nn.Module, *more: Tensor) -> Drawing:
    inputs = (torch.randn(2, 6, WIDTH), *more)
    return drawing(attnopt.inspect(model.eval(), inputs, time=False))


def test_equal_blocks_are_drawn_once() -> None:
    (fold,) = drawn(Stack(*["full"] * 4)).folds
    assert (fold.times, fold.first, fold.last, fold.stream, fold.stem) == (
        4,
        0,
        3,
        INPUTS,
        "linear",
    )
    (block,) = fold.blocks
    attention, mlp = (step.branches[0] for step in block.steps)
    assert attention.module == "layers.*.attention" and mlp.kind == "mlp"
    assert attention.cards[0].ids == ("s0", "s1", "s2", "s3")
    assert attention.cards[0].title == "s0, s1 … s3 (4)"
    assert attention.rest.startswith("4 projections, ") and mlp.rest.startswith("2 projections, ")


def test_a_pattern_of_several_blocks_is_drawn_once() -> None:
    folds = drawn(Stack(*["causal", "causal", "full"] * 2, "causal")).folds
    assert [(len(f.blocks), f.times, f.stream) for f in folds] == [(3, 2, INPUTS), (1, 1, 0)]
    assert folds[0].title == "blocks 0 to 5: these 3 × 2" and folds[1].title == "block 6"


def test_blocks_that_differ_are_not_folded() -> None:
    folds = drawn(Stack("full", "odd", "full")).folds
    assert [fold.times for fold in folds] == [1, 1, 1]
    card = folds[1].blocks[0].steps[0].branches[0].cards[0]
    assert card.ids == ("u0",) and not card.raised and "aten.sin" in card.lines[1]


def test_parallel_branches_share_a_step() -> None:
    (fold,) = drawn(Stack("full", "full", parallel=True)).folds
    (step,) = fold.blocks[0].steps
    assert [branch.kind for branch in step.branches] == ["attention", "mlp"]


def test_an_attention_outside_of_all_residuals_stands_on_the_stream() -> None:
    (fold,) = drawn(Attention("odd")).folds
    (step,) = fold.blocks[0].steps
    assert not step.residual and step.branches[0].cards[0].ids == ("u0",)


def test_what_is_read_across_is_no_stream() -> None:
    made = drawn(TwoStacks(), torch.randn(2, 5, WIDTH))
    encoder, *decoder = made.folds
    assert encoder.times == 2 and decoder[0].stream == INPUTS
    assert [fold.reads for fold in decoder if fold.reads] == [(0,)]
    assert "style=dashed, lhead=" in dot(made)


_NASTY = (
    'a "quoted" <b> & \\ name\nwith a line, \x1b and more than enough characters to be cut ' * 2
)


def nasty() -> Drawing:
    cards = (
        Card(("s0",), _NASTY, True, (_NASTY,), ("k",)),
        Card(("u0",), _NASTY, False, ("left alone", _NASTY)),
    )
    step = DrawnStep((Branch("attention", _NASTY, cards, "1 projection"),), before=_NASTY)
    fold = Fold((Drawn((step,)),), 1, 0, 0, stem=_NASTY)
    return Drawing(_NASTY, _NASTY, (fold, Fold((Drawn((step,)),), 2, 1, 2, 0, (0,))), "all")


@pytest.mark.parametrize("made", [nasty(), Drawing("empty", "", (), "0 of 0")])
def test_the_svg_is_well_formed_and_needs_nothing_else(made: Drawing) -> None:
    text = svg(made)
    root = ElementTree.fromstring(text)
    assert root.tag == f"{_SVG}svg" and float(root.attrib["width"]) > 0
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"<script|@import|href|url\(", text)
    boxes = [r for r in root.iter(f"{_SVG}rect") if r.attrib["width"] != "100%"]
    for box in boxes:
        right = float(box.attrib["x"]) + float(box.attrib["width"])
        bottom = float(box.attrib["y"]) + float(box.attrib["height"])
        assert right <= float(root.attrib["width"]) and bottom <= float(root.attrib["height"])


def test_what_was_left_alone_has_another_colour() -> None:
    root = ElementTree.fromstring(svg(nasty()))
    looks = [r.attrib["class"].split()[0] for r in root.iter(f"{_SVG}rect")]
    assert {"missing", "unraised", "fold", "branch"} <= set(looks)


def _statements(text: str) -> list[str]:
    """The DOT text outside of its strings."""
    return re.sub(r'"(?:[^"\\]|\\.)*"', "S", text).splitlines()


@pytest.mark.parametrize("made", [nasty(), Drawing("empty", "", (), "0 of 0")])
def test_the_dot_text_is_balanced_and_names_only_its_own_nodes(made: Drawing) -> None:
    text = dot(made)
    bare = "\n".join(_statements(text))
    assert '"' not in bare and bare.count("{") == bare.count("}") and "\x1b" not in text
    made_nodes = set(re.findall(r"^ *(n_\w+) \[", bare, re.MULTILINE))
    used = {name for edge in re.findall(r"(n_\w+) -> (n_\w+)", bare) for name in edge}
    assert used and used <= made_nodes
    clusters = set(re.findall(r"subgraph (cluster_\w+)", bare))
    assert set(re.findall(r"lhead=(cluster_\w+)", bare)) <= clusters


def test_strings_of_the_dot_language() -> None:
    assert quoted('a "b" \\ c\nd') == '"a \\"b\\" \\\\ c\\nd"'
