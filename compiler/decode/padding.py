"""Padding for a model that was traced without it: an input `attention_mask` is added to its graph,
and every attention drops the keys where it is 0.

Positions then count real tokens, as transformers has it, where a table holds them by batch; others
stay, which changes nothing where only distances count. Whether a padded prompt is what it is alone
is tried.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen

from attnopt.compiler.decode.decoder import Decoder, derive
from attnopt.compiler.decode.split import sample
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Batch, Program, infer
from attnopt.compiler.raising.evaluate import example_input
from attnopt.compiler.spec import EXTRAS, parse_spec
from attnopt.compiler.verify import BOUND, difference

aten = torch.ops.aten
MASK = "attention_mask"


def padded(decoder: Decoder) -> Decoder:
    """The decoder with an input that tells which positions are padding.

    Raises `Problem` A707 where a prompt padded on the left is then not what it is alone.
    """
    program = with_padding(decoder.program, decoder.split.tokens[0])
    made = derive(program, decoder.slack, check=False)
    made.dtype, made.counted = decoder.dtype, True
    apart, dtype = _apart(decoder, made)
    if apart > max(BOUND[torch.float32], BOUND.get(dtype, 0.0)):
        raise Problem(
            "A707", f"{decoder.program.name} takes no padding",
            why="it was traced without an attention_mask, and prompts padded on the left would "
            f"give other logits than alone (by {apart:.1e} of their rms): it counts positions "
            "from the first column",
            help="give prompts of one length, or trace it with attention_mask and position_ids "
            "among its inputs",
        )  # fmt: skip
    return made


def with_padding(program: Program, tokens: str) -> Program:
    """The program with an input `attention_mask` int64 `[batch, seq]`, 0 at keys that no query
    sees. `tokens` names an input `[batch, seq, ...]`."""
    made = program.copy()
    held = made.graph.find_nodes(op="placeholder")
    example = {node.name: example_input(program, node) for node in held}
    first = cast(Tensor, example[tokens])
    made.example = Batch((), {**example, MASK: first.new_ones(first.shape[:2], dtype=torch.int64)})
    made.graph.set_codegen(CodeGen())
    with made.graph.inserting_after(held[-1]):
        mask = made.graph.placeholder(MASK)
    fake = made.node(tokens).meta["val"]
    mask.meta["val"] = fake.new_ones(fake.shape[:2], dtype=torch.int64)
    with made.graph.inserting_after(mask):
        real = made.graph.call_function(aten.ne.Scalar, (mask, 0))
    infer(real)
    for node in made.attentions():
        _drop(node, real)
    made.module.recompile()
    return made


def _drop(attention: fx.Node, real: fx.Node) -> None:
    q, k, v, extras, line = cast(tuple[Any, ...], attention.args)
    spec = parse_spec(str(line))
    if "padding" in spec.extras:
        raise Problem("A707", f"`{attention.name}` drops keys of its own by a constant")
    found = dict(zip(spec.extras, extras, strict=True)) | {"padding": real}
    names = tuple(sorted(found, key=EXTRAS.index))
    # Padded positions see no key; the mean of all values, and no NaN, is kept for them.
    changed = spec.with_(extras=names, fill="min")
    attention.args = (q, k, v, [found[name] for name in names], changed.text)


def _apart(decoder: Decoder, made: Decoder) -> tuple[float, torch.dtype]:
    """How far the logits of prompts padded on the left are from those of the prompts alone, and the
    dtype of these."""
    parts = decoder.split
    given = sample(decoder.program, parts, decoder.dtype)
    tokens = [given[name] for name in parts.tokens]
    rows, length = tokens[0].shape[:2]
    at = length // 3
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[:, :at] = 0
    positions = mask.cumsum(1).sub(1).clamp(min=0)
    read = [
        positions.to(x.dtype) if "position" in name else x
        for name, x in zip(parts.tokens, tokens, strict=True)
    ]
    read = [x.to(decoder.device) for x in read]
    state = made.state(rows, length, made.masks(mask))
    among = made.prefill(state, *read)[:, at:]
    alone = decoder.prefill(decoder.state(rows, length - at), *(x[:, at:] for x in read))
    return difference(alone, among), alone.dtype
