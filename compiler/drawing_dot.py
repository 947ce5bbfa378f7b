"""A drawing as text for graphviz: blocks and sublayers as clusters, attentions as boxes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count, pairwise

from attnopt.compiler.drawing import INPUTS, Branch, Card, Drawing, Fold, Step

_HEAD = """digraph attnopt {
  rankdir=TB; compound=true; fontname="Helvetica"; bgcolor="transparent"; color="#8a8f98";
  node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=11, fillcolor="#f3f4f6",
    color="#8a8f98", fontcolor="#1f2328"];
  edge [color="#6b7280", fontname="Helvetica", fontsize=10];
"""
_FILLS = {"raised": "#d8ecfb", "missing": "#fdf0c8", "unraised": "#fbd9d5"}


def dot(drawn: Drawing) -> str:
    """The drawing in the DOT language."""
    numbers = count()
    lines = [f"  label={quoted(f'{drawn.title}: {drawn.summary}')}; labelloc=t;"]
    inputs = quoted(f"inputs\n{drawn.inputs}")
    lines.append(f"  n_in [label={inputs}];")
    ends = {INPUTS: "n_in"}
    for at, fold in enumerate(drawn.folds):
        made = list(_fold(at, fold, ends[fold.stream], numbers))
        end = made.pop()
        lines += made
        lines += [f"  {ends[s]} -> {end} [style=dashed, lhead=cluster_f{at}];" for s in fold.reads]
        ends[at] = end
    lines.append('  n_out [label="outputs"];')
    lines.append(f"  {ends[len(drawn.folds) - 1]} -> n_out;")
    return _HEAD + "\n".join(lines) + "\n}\n"


def quoted(text: str) -> str:
    """A string of the DOT language; line breaks become its own."""
    escaped = (
        re.sub(r"[^\n\x20-\x7e\u00a0-\U0010ffff]", "?", text)
        .replace("\\", "\\\\")
        .replace('"', '\\"')
        .replace("\n", "\\n")
    )
    return f'"{escaped}"'


def _fold(at: int, fold: Fold, source: str, numbers: count[int]) -> Iterator[str]:
    """The lines of a fold, and last the name of the node that it ends in."""
    if fold.stem:
        yield f"  n_stem{at} [label={quoted(fold.stem)}, shape=plaintext, style=solid];"
        yield f"  {source} -> n_stem{at};"
        source = f"n_stem{at}"
    yield f"  subgraph cluster_f{at} {{ label={quoted(fold.title)}; fontname=Helvetica;"
    edges, head = list[str](), source
    for number, block in enumerate(fold.blocks):
        for place, step in enumerate(block.steps):
            name = f"{at}_{number}_{place}"
            yield from _step(name, step, head, edges, numbers)
            head = f"n_end{name}"
        if block.after:
            yield f"    n_after{at}_{number} [label={quoted(block.after)}, shape=plaintext];"
            edges.append(f"  {head} -> n_after{at}_{number};")
            head = f"n_after{at}_{number}"
    yield "  }"
    yield from edges
    yield head


def _step(name: str, step: Step, head: str, edges: list[str], numbers: count[int]) -> Iterator[str]:
    if step.before:
        yield f"    n_on{name} [label={quoted(step.before)}, shape=plaintext, style=solid];"
        edges.append(f"  {head} -> n_on{name};")
        head = f"n_on{name}"
    shape = 'circle, label="+"' if step.residual else 'point, label=""'
    yield f"    n_end{name} [shape={shape}, width=0.2];"
    if step.residual:
        edges.append(f"  {head} -> n_end{name} [penwidth=2];")
    for branch in step.branches:
        cluster = next(numbers)
        yield f"    subgraph cluster_s{cluster} {{ label={quoted(_named(branch))}; style=dashed;"
        names = []
        for card in branch.cards:
            names.append(f"n_{next(numbers)}")
            fill = _FILLS[look(card)]
            yield f'      {names[-1]} [label={quoted(_said(card))}, fillcolor="{fill}"];'
        if branch.rest:
            names.append(f"n_{next(numbers)}")
            yield f"      {names[-1]} [label={quoted(branch.rest)}];"
        yield "    }"
        edges.append(f"  {head} -> {names[0]};")
        edges += [f"  {a} -> {b};" for a, b in pairwise(names)]
        edges.append(f"  {names[-1]} -> n_end{name};")


def look(card: Card) -> str:
    """How an attention is coloured: understood, with facts missing, or left alone."""
    if not card.raised:
        return "unraised"
    return "missing" if card.missing else "raised"


def _named(branch: Branch) -> str:
    return f"{branch.kind}  {branch.module}".strip()


def _said(card: Card) -> str:
    missing = [f"not found: {', '.join(card.missing)}"] if card.missing else []
    return "\n".join([f"{card.title}  {card.module}".strip(), *card.lines, *missing])
