"""What a picture of a raised program shows, before it is laid out: the residual stream as a chain
of blocks, their sublayers, and the attentions in them.

Operators that work on each token alike are counted, not drawn, and blocks that repeat are drawn
once: a picture of 80 layers that shows 80 boxes shows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import fx

from attnopt.compiler.excerpt import operator
from attnopt.compiler.inspect import Inspection
from attnopt.compiler.program import Program
from attnopt.compiler.raising.projections import projection
from attnopt.compiler.regions import sublayer_nodes
from attnopt.compiler.site import Site, Sublayer, Unraised

INPUTS = -1  # the model's inputs, as a source of a block
_BEFORE = -2  # the block before, whichever that is
_LONGEST = 8  # blocks in a pattern that repeats, such as five local layers and a global one


@dataclass(frozen=True)
class Card:
    """One attention; after folding, all of them that are alike."""

    ids: tuple[str, ...]
    module: str
    raised: bool
    lines: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Its id, or some of many."""
        if len(self.ids) <= 3:
            return ", ".join(self.ids)
        return f"{self.ids[0]}, {self.ids[1]} … {self.ids[-1]} ({len(self.ids)})"


@dataclass(frozen=True)
class Branch:
    """One sublayer: its attentions, and in `rest` what else it does, in words."""

    kind: str
    module: str
    cards: tuple[Card, ...]
    rest: str = ""


@dataclass(frozen=True)
class Step:
    """Branches that read one state of the stream and are added to it; one that stands on the stream
    itself where `residual` is False. `before` says what is done to the stream ahead of them."""

    branches: tuple[Branch, ...]
    before: str = ""
    residual: bool = True


@dataclass(frozen=True)
class Block:
    """A block of the model.

    `stream` is the position of the block that its stream comes from, or `INPUTS`, and `reads` are
    the positions of others whose results its attentions read. `stem` says what the inputs pass
    before they are a stream, `after` what the stream passes behind the last sum.
    """

    steps: tuple[Step, ...]
    stream: int = INPUTS
    reads: tuple[int, ...] = ()
    stem: str = ""
    after: str = ""


@dataclass(frozen=True)
class Fold:
    """A pattern of blocks that is there `times` times in a row, from block `first` to `last`.

    `stream`, `reads` and `stem` are as of a block, with positions of folds.
    """

    blocks: tuple[Block, ...]
    times: int
    first: int
    last: int
    stream: int = INPUTS
    reads: tuple[int, ...] = ()
    stem: str = ""

    @property
    def title(self) -> str:
        """Which blocks, and how many times."""
        if self.first == self.last:
            return f"block {self.first}"
        pattern = f"these {len(self.blocks)}" if len(self.blocks) > 1 else "this"
        return f"blocks {self.first} to {self.last}: {pattern} × {self.times}"


@dataclass(frozen=True)
class Drawing:
    """A program as a chain of folds, with the model's name and inputs."""

    title: str
    inputs: str
    folds: tuple[Fold, ...]
    summary: str


def drawing(found: Inspection) -> Drawing:
    """What to draw of an inspected model."""
    blocks = _Reader(found.program).blocks()
    summary = f"{found.raised} of {len(found.sites)} attentions understood"
    return Drawing(found.program.name, found.inputs, tuple(_folded(blocks)), summary)


class _Reader:
    """The blocks of a program, with what each reads."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.order = {name: at for at, name in enumerate(self.nodes)}
        self.cards = {site.id: _card(site) for site in program.sites}
        self.ends: dict[str, int] = {}  # node -> the position of the block that it ends

    def blocks(self) -> list[Block]:
        """The blocks in the order of the graph; attentions outside of all are blocks themselves."""
        by_block = groupby(self.program.sublayers, key=lambda layer: layer.block)
        found: list[tuple[int, list[Sublayer], Card | None, str]] = []
        held, unraised = set[str](), self._unraised()
        for _, group in by_block:
            layers = list(group)
            held |= {id for layer in layers for id in (*layer.sites, *unraised.get(layer.id, {}))}
            found.append((self.order.get(layers[0].branch, 0), layers, None, ""))
        for site in self.program.sites:
            if site.id not in held:
                found.append((self.order.get(site.node, 0), [], self.cards[site.id], site.node))
        for loose in unraised.get("", {}).values():
            node = self.program.unraised[int(loose.ids[0][1:])].node
            found.append((self.order.get(node, 0), [], loose, node))
        found.sort(key=lambda item: item[0])
        for at, (_, layers, _, node) in enumerate(found):
            self.ends |= {layer.exit: at for layer in layers} | ({node: at} if node else {})
        made = [self._block(at, *item[1:], unraised) for at, item in enumerate(found)]
        return self._with_ends(made)

    def _with_ends(self, blocks: list[Block]) -> list[Block]:
        """The blocks with what follows each (the norm of a post-norm layer) as its own end, so that
        the first and the last are like the others."""
        for at, block in enumerate(blocks):
            if block.stream != INPUTS:
                source = blocks[block.stream]
                blocks[block.stream] = replace(source, after=block.stem or source.after)
                blocks[at] = replace(blocks[at], stem="")
        exits = {at: name for name, at in self.ends.items()}
        for at in range(1, len(blocks)):
            readers = list(self.nodes[exits[at]].users)
            norm = blocks[at - 1].after
            if not blocks[at].after and norm and [operator(node) for node in readers] == [norm]:
                blocks[at] = replace(blocks[at], after=norm)
        return blocks

    def _unraised(self) -> dict[str, dict[str, Card]]:
        """The attentions that were left alone, by the sublayer that they stand in."""
        made: dict[str, dict[str, Card]] = {}
        for i, miss in enumerate(self.program.unraised):
            inside = [
                s.id for s in self.program.sublayers if {miss.node, *miss.passed} & {*s.inner}
            ]
            made.setdefault(inside[0] if inside else "", {})[f"u{i}"] = _left_alone(f"u{i}", miss)
        return made

    def _block(
        self,
        at: int,
        layers: list[Sublayer],
        card: Card | None,
        node: str,
        unraised: dict[str, dict[str, Card]],
    ) -> Block:
        if card is not None:
            step = Step((Branch("attention", card.module, (card,)),), residual=False)
            return Block((step,), *self._from(at, self.nodes[node]))
        steps = list[Step]()
        for entry, group in groupby(layers, key=lambda layer: layer.entry):
            branches = tuple(self._branch(layer, unraised.get(layer.id, {})) for layer in group)
            steps.append(Step(branches, self._on_stream(entry) if steps else ""))
        stream, _, stem = self._from(at, self.nodes[layers[0].entry])
        attentions = [self.nodes[self.program.site(id).node] for s in layers for id in s.sites]
        keys = [k for attention in attentions if isinstance(k := attention.args[1], fx.Node)]
        reads = tuple(sorted(self._above(keys)[1] - {at, stream}))
        return Block(tuple(steps), stream, reads, stem)

    def _branch(self, layer: Sublayer, unraised: dict[str, Card]) -> Branch:
        names = sublayer_nodes(self.program, layer)
        calls = [self.nodes[name] for name in names if self.nodes[name].op == "call_function"]
        projections = sum(projection(node) is not None for node in calls)
        others = len(calls) - projections - len(layer.sites)
        rest = f"{_count(projections, 'projection')}, {_count(others, 'other operator')}"
        cards = (*(self.cards[id] for id in layer.sites), *unraised.values())
        return Branch(layer.kind, layer.module, cards, rest)

    def _from(self, at: int, start: fx.Node) -> tuple[int, tuple[int, ...], str]:
        """Where a block's stream comes from, what else it reads, and what is done to it before."""
        sources = sorted(self._above([start])[1] - {at})
        stream = sources[-1] if sources else INPUTS
        return stream, tuple(sources[:-1]), self._on_stream(start.name)

    def _on_stream(self, entry: str) -> str:
        """What stands between the last sum, or the inputs, and a sublayer."""
        between = [n for n in self._above([self.nodes[entry]])[0] if n.op == "call_function"]
        names = {operator(node) for node in between}
        if entry in self.ends or not names:
            return ""
        return names.pop() if len(names) == 1 else _count(len(between), "operator")

    def _above(self, starts: Iterable[fx.Node]) -> tuple[list[fx.Node], set[int]]:
        """The nodes above some up to the nearest ends of blocks, and those blocks."""
        between, found = list[fx.Node](), set[int]()
        waiting, seen = list(starts), set[fx.Node]()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.name in self.ends:
                found.add(self.ends[node.name])
                continue
            between.append(node)
            waiting.extend(node.all_input_nodes)
        return between, found


def _card(site: Site) -> Card:
    spec = site.spec
    lines = (
        f"{spec.heads}/{site.kv_heads} heads × {spec.head_dim}, scale {spec.scale * site.gain:.4g}",
        f"mask {site.mask} ({site.mask_certainty})",
        f"position {site.position}",
        f"{site.spelling}{', norms on q and k' if site.qk_norm else ''}",
    )
    return Card((site.id,), site.module, True, lines, tuple(site.missing))


def _left_alone(id: str, miss: Unraised) -> Card:
    return Card((id,), miss.module, False, ("left alone", miss.reason, miss.source))


def _folded(blocks: Sequence[Block]) -> Iterator[Fold]:
    """The blocks with repeated patterns drawn once, their sources as positions of folds."""
    alike = [_alike(block, at) for at, block in enumerate(blocks)]
    position: dict[int, int] = {INPUTS: INPUTS}
    at, made = 0, 0
    while at < len(blocks):
        length, times = max(
            ((n, _repeats(alike, at, n)) for n in range(1, _LONGEST + 1)),
            key=lambda pair: (pair[0] * pair[1] if pair[1] > 1 else 1, -pair[0]),
        )
        length = length if times > 1 else 1
        end = at + length * times
        groups = [blocks[at + i : end : length] for i in range(length)]
        position |= dict.fromkeys(range(at, end), made)
        reads = {position[s] for group in groups for b in group for s in b.reads} - {made}
        first, merged = blocks[at], tuple(_merged(group) for group in groups)
        yield Fold(
            merged, times, at, end - 1, position[first.stream], tuple(sorted(reads)), first.stem
        )
        at, made = end, made + 1


def _repeats(alike: Sequence[Block], at: int, length: int) -> int:
    """How many times the pattern that starts here is there in a row, each reading the one
    before."""
    pattern = list(alike[at : at + length])
    if len(pattern) < length:
        return 0
    pattern[0] = replace(pattern[0], stream=_BEFORE, stem="")
    times = 1
    while alike[at + times * length : at + (times + 1) * length] == pattern:
        times += 1
    return times


def _alike(block: Block, at: int) -> Block:
    """A block without what numbers it: equal for blocks that are drawn as one."""
    stream = _BEFORE if block.stream == at - 1 != INPUTS else block.stream
    return replace(block, steps=tuple(map(_plain_step, block.steps)), stream=stream)


def _plain_step(step: Step) -> Step:
    return replace(step, branches=tuple(
        replace(b, module=_starred(b.module), cards=tuple(
            replace(c, ids=(), module=_starred(c.module), lines=tuple(map(_starred, c.lines)))
            if not c.raised else replace(c, ids=(), module=_starred(c.module))
            for c in b.cards))
        for b in step.branches))  # fmt: skip


def _merged(blocks: Sequence[Block]) -> Block:
    """Blocks that are alike as one, with the ids of all."""
    if len(blocks) == 1:
        return blocks[0]
    steps = []
    for same in zip(*(block.steps for block in blocks), strict=True):
        branches = []
        for branch in zip(*(step.branches for step in same), strict=True):
            cards = tuple(
                replace(group[0], ids=tuple(id for card in group for id in card.ids),
                        module=_starred(group[0].module))
                for group in zip(*(one.cards for one in branch), strict=True)
            )  # fmt: skip
            branches.append(replace(branch[0], module=_starred(branch[0].module), cards=cards))
        steps.append(replace(same[0], branches=tuple(branches)))
    return replace(blocks[0], steps=tuple(steps))


def _starred(text: str) -> str:
    """Text without the numbers that count layers or nodes."""
    return re.sub(r"(?<![\w])\d+(?![\w])|_\d+\b", "*", text)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
