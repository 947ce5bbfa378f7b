"""Padding for a model that was traced without it: an input `attention_mask` is added to its graph,
and every attention drops the keys where it is 0.

Positions then count real tokens, as transformers has it, where a table is looked up along the
tokens; other tables stay, which changes nothing where only distances count. Whether so is tried on
a sample, and seen in the tables along the keys at the lengths in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen

from attnopt.compiler.decode.split import Split, Table, sample, split
from attnopt.compiler.decode.state import State
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Batch, Program, infer
from attnopt.compiler.raising.evaluate import example_input
from attnopt.compiler.spec import EXTRAS, parse_spec
from attnopt.compiler.verify import BOUND, difference

if TYPE_CHECKING:
    from attnopt.compiler.decode.decoder import Decoder

aten = torch.ops.aten
_REAL = "real_keys"  # the node that says which keys are seen
MASK = "attention_mask"


def padded(decoder: Decoder) -> Decoder:
    """The decoder with an input that tells which positions are padding.

    Raises `Problem` A707 where a prompt padded on the left is then not what it is alone.
    """
    program = with_padding(decoder.program, decoder.split.tokens[0])
    made = type(decoder)(program, split(program), decoder.slack, decoder.dtype, counted=True)
    try:
        apart, dtype = _apart(decoder, made)
    except RuntimeError as error:
        raise _refused(decoder.program, str(error).splitlines()[0]) from error
    if apart > max(BOUND[torch.float32], BOUND.get(dtype, 0.0)):
        raise _refused(decoder.program, f"padded prompts differ by {apart:.1e} of their rms")
    return made


def counted(parts: Split, state: State, tables: Sequence[Tensor]) -> list[Tensor]:
    """Tables over all columns as rows of a batch need them that count real ones alone.

    A table along the tokens is looked up by row; one along the keys stays, and has to say of
    columns what it says of real positions. Raises `Problem` A707 where it does not, and where real
    columns are not all behind the padding.
    """
    (mask,) = (state.masks[name] for name in parts.masks)
    real = mask == parts.real
    at = real.cumsum(1).sub(1).clamp(min=0)
    before = real.shape[1] - real.sum(1)
    if bool((real != (torch.arange(real.shape[1], device=real.device) >= before[:, None])).any()):
        raise Problem(
            "A707", "there is padding between tokens", help="pad prompts on the left",
            why="the model was traced without an attention_mask",
        )  # fmt: skip
    found = []
    for table, value in zip(parts.tables, tables, strict=True):
        if table.keys is not None and table.node != _REAL:
            for shift in set(before.tolist()) - {0}:
                if not _alike(table, value, int(shift)):
                    raise Problem(
                        "A707", "the model takes no padding here",
                        why=f"`{table.node}` relates columns, not their distances",
                        help="give prompts of one length, or trace the model with attention_mask",
                    )  # fmt: skip
        elif table.rows and table.batched and value.shape[0] in (1, state.batch):
            shape = [1] * value.dim()
            shape[0], shape[table.rows] = at.shape
            value = value.expand(state.batch, *value.shape[1:])
            value = value.gather(table.rows, at.reshape(shape).expand_as(value))
        found.append(value)
    return found


def _alike(table: Table, value: Tensor, shift: int) -> bool:
    """Whether a mask or bias says the same of columns that are all moved, up to a constant of each
    query (which a softmax takes no notice of), of keys that are no later than their queries."""
    assert table.keys is not None
    size = value.shape[table.keys] - shift
    moved = value.narrow(table.keys, shift, size)
    value = value.narrow(table.keys, 0, size)
    seen = torch.ones(1, size, dtype=torch.bool, device=value.device)
    if table.rows is not None:
        moved, value = moved.narrow(table.rows, shift, size), value.narrow(table.rows, 0, size)
        seen = torch.ones(size, size, dtype=torch.bool, device=value.device).tril()
    if value.dtype == torch.bool:
        return not bool(((moved != value) & seen).any())
    apart = torch.where(moved == value, 0.0, moved.double() - value.double())
    least = torch.where(seen, apart, float("inf")).amin(-1)
    most = torch.where(seen, apart, float("-inf")).amax(-1)
    scale = torch.where(value.isfinite(), value, 0).abs().max().clamp(min=1)
    return bool((most - least <= 1e-5 * scale).all())


def with_padding(program: Program, tokens: str) -> Program:
    """The program with an input `attention_mask` int64 `[batch, seq]`, 0 at keys that no query
    sees. `tokens` names an input `[batch, seq, ...]`."""
    made = program.copy()
    held = made.graph.find_nodes(op="placeholder")
    example = {node.name: example_input(program, node) for node in held}
    first = cast(Tensor, example[tokens])
    made.example = Batch((), {**example, MASK: first.new_ones(first.shape[:2], dtype=torch.int64)})
    made.graph.set_codegen(CodeGen())
    mask = made.find(MASK)  # there is one where the model takes a mask that it does not read
    if mask is None:
        with made.graph.inserting_after(held[-1]):
            mask = made.graph.placeholder(MASK)
    fake = made.node(tokens).meta["val"]
    mask.meta["val"] = fake.new_ones(fake.shape[:2], dtype=torch.int64)
    with made.graph.inserting_after(mask):
        real = made.graph.create_node("call_function", aten.ne.Scalar, (mask, 0), name=_REAL)
    infer(real)
    for node in made.attentions():
        _drop(node, real)
    made.module.recompile()
    return made


def _drop(attention: fx.Node, real: fx.Node) -> None:
    q, k, v, extras, line = cast(tuple[Any, ...], attention.args)
    spec = parse_spec(str(line))
    if "padding" in spec.extras or spec.mask.sink:
        what = "drops keys by a constant" if "padding" in spec.extras else "keeps the first columns"
        raise Problem(
            "A707", "the model takes no padding", why=f"`{attention.name}` {what}",
            help="give prompts of one length, or trace it with attention_mask among its inputs",
        )  # fmt: skip
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


def _refused(program: Program, why: str) -> Problem:
    return Problem(
        "A707", f"{program.name} takes no padding",
        why=f"it was traced without an attention_mask, and its positions count columns: {why}",
        help="give prompts of one length, or trace it with attention_mask and position_ids among "
        "its inputs",
    )  # fmt: skip
