"""The sizes of attentions in the fields of the family's config: how many heads, how many that have
keys and values, how many dims of each.

A config says one size for all layers: `per_layer_config`, which every config of transformers takes,
is read by no model of Llama's build, and its `skip` leaves nothing out. Layers that kept fewer
heads than others are filled up with heads of zeros: their values are zero, so is what the output
projection makes of them, and the function is the same. As many are added where the config refuses a
number (Llama's wants the width to be a multiple of it). Merged heads are not filled up: every query
head reads one that it had.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.checkpoint.changes import Changes, Pair, refusal
from attnopt.compiler.checkpoint.names import Names
from attnopt.compiler.intake.checkpoint import LOAD_ERRORS, first_line
from attnopt.compiler.program import Program
from attnopt.compiler.site import Rotary, Site

_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_UNREAD = "and its model does not read per_layer_config"
_SAME = 1e-5  # of a frequency, which tables in float32 give to 1e-6
Told = dict[str, tuple[Any, Any]]


def sizes(config: Any, made: Changes) -> Told:
    """Each field of sizes that differs, with its values before and after; `config` is the
    original's.

    Raises `Problem` A521 for sizes that it cannot say.
    """
    dim = _dim(config, made)
    if any(pruned(made, pair) for pair in made.pairs):
        return _fewer_heads(config, made, dim)
    cut = any(_dims(made.program, p.after) != _dims(made.original, p.before) for p in made.pairs)
    told = {**_kv_heads(config, made), **(_head_dim(config, dim) if cut else {})}
    refused = _refused(config, told) if cut else ""
    if refused:
        first = made.pairs[0].before
        why = f"the config of {config.model_type} does not take it: {refused}"
        raise refusal(f"{first.id} has heads of {dim} dims", where=first.module, why=why)
    return told


def pruned(made: Changes, pair: Pair) -> bool:
    """Whether the plan took heads of an attention away."""
    return made.program.spec(pair.after).heads != made.original.spec(pair.before).heads


def _dims(program: Program, site: Site) -> tuple[int, int]:
    spec = program.spec(site)
    return spec.head_dim, spec.v_dim


def resized(made: Changes, pair: Pair) -> bool:
    """Whether the plan took heads of an attention away, or dims of its heads."""
    cut = _dims(made.program, pair.after) != _dims(made.original, pair.before)
    return cut or pruned(made, pair)


def _kv_heads(config: Any, made: Changes) -> Told:
    changed = [pair for pair in made.pairs if pair.after.kv_heads != pair.before.kv_heads]
    if not changed:
        return {}
    name = _field(config, *_KV_HEADS)
    first = changed[0]
    if name is None:
        raise refusal(
            f"{first.before.id} has {first.after.kv_heads} key/value heads",
            where=first.before.module,
            why=f"the config of {config.model_type} has no field for their number",
        )
    other = next((p for p in made.pairs if p.after.kv_heads != first.after.kv_heads), None)
    if other is not None:
        raise refusal(
            f"{other.before.id} has {other.after.kv_heads} key/value heads, "
            f"{first.before.id} has {first.after.kv_heads}",
            where=other.before.module,
            why=f"the config of {config.model_type} has one {name} for all layers, {_UNREAD}",
            help="merge the heads of every layer by the same factor",
        )
    return {name: (first.before.kv_heads, first.after.kv_heads)}


def _dim(config: Any, made: Changes) -> int:
    """The dims of all heads where the plan took heads or dims away; 0 where it did not."""
    if not any(resized(made, pair) for pair in made.pairs):
        return 0
    first = made.pairs[0]
    dim, _ = _dims(made.program, first.after)
    for pair in made.pairs:
        keys, values = _dims(made.program, pair.after)
        why = f"the config of {config.model_type} has one dim for all of them, {_UNREAD}"
        if keys != values:
            raise refusal(
                f"{pair.before.id} has queries and keys of {keys} dims and values of {values}",
                where=pair.before.module, why=why,
                help="cut both to the same dim, or use the run's own model.pt2",
            )  # fmt: skip
        if keys != dim:
            raise refusal(
                f"{pair.before.id} has heads of {keys} dims, {first.before.id} of {dim}",
                where=pair.before.module, why=why, help="cut the heads of every layer alike",
            )  # fmt: skip
    return dim


def _head_dim(config: Any, dim: int) -> Told:
    """The dim of a head, said outright, whether the class of the config names the field or its
    model asks for it only."""
    name = _field(config, "head_dim") or "head_dim"
    was = getattr(config, name, None)
    return {} if was == dim else {name: (was, dim)}


def _fewer_heads(config: Any, made: Changes, dim: int) -> Told:
    """The numbers of heads, the least that the config takes and that hold those of every layer."""
    specs = {pair.before.id: made.program.spec(pair.after) for pair in made.pairs}
    most = max(made.pairs, key=lambda pair: specs[pair.before.id].heads)
    before = made.original.spec(most.before).heads
    group = specs[most.before.id].heads // most.after.kv_heads
    for pair in made.pairs:
        own = specs[pair.before.id].heads // pair.after.kv_heads
        if own != group:
            raise refusal(
                f"{pair.before.id} has {own} query heads per key/value head, "
                f"{most.before.id} has {group}",
                where=pair.before.module,
                why=f"the config of {config.model_type} has one number for all layers, {_UNREAD}",
            )
    name, kv = _field(config, "num_attention_heads"), _field(config, *_KV_HEADS)
    why = f"the config of {config.model_type} has one number of heads for all layers, {_UNREAD}"
    if name is None or (kv is None and group > 1):
        why = f"the config of {config.model_type} has no field for them"
    else:
        for count in range(most.after.kv_heads, (before - 1) // group + 1):
            told = {name: (before, count * group), **_head_dim(config, dim)}
            if kv is not None:
                told[kv] = (most.before.kv_heads, count)
            refused = _refused(config, told)
            if not refused:
                return {key: (was, now) for key, (was, now) in told.items() if was != now}
            why = f"the config of {config.model_type} takes no smaller number: {refused}"
    raise refusal(
        f"{most.before.id} has {specs[most.before.id].heads} heads of {dim} dims",
        where=most.before.module, why=why,
        help="take as many heads from every layer, or use the run's own model.pt2",
    )  # fmt: skip


def _field(config: Any, *names: str) -> str | None:
    """The name under which a config keeps the first of these fields that it has; None for
    none."""
    found = next((name for name in names if hasattr(config, name)), None)
    return None if found is None else str(config.attribute_map.get(found, found))


def _refused(config: Any, told: Mapping[str, tuple[Any, Any]]) -> str:
    """Why a config does not take some fields; empty where it does."""
    try:
        with_fields(config, told)
    except config_errors() as error:
        return _last_line(error)
    return ""


def with_fields(config: Any, told: Mapping[str, tuple[Any, Any]]) -> Any:
    """A config with other values, read anew as loading would. Raises what its class raises."""
    fresh = copy.deepcopy(config)
    for name, (_, value) in told.items():
        setattr(fresh, name, value)
    return type(config).from_dict(fresh.to_dict())


def config_errors() -> tuple[type[Exception], ...]:
    """What classes of configs and models raise on values that do not go together."""
    hub = importlib.import_module("huggingface_hub.errors")
    return (*LOAD_ERRORS, getattr(hub, "StrictDataclassError", ValueError))


@contextmanager
def building(config: Any) -> Iterator[None]:
    """Raise `Problem` A521 where the family's code makes no model of this config."""
    try:
        yield
    except config_errors() as error:
        raise refusal(
            f"transformers builds no {config.model_type} of these sizes", why=_last_line(error)
        ) from error


def _last_line(error: Exception) -> str:
    """What an error says: its last line, since classes of configs begin with the validator's
    name."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else first_line(error)


def check_smaller(
    model: Any, weights: Mapping[str, Tensor], made: Changes, names: Names,
    place: Callable[[str], str],
) -> None:  # fmt: skip
    """Raise `Problem` A521 where a new model has projections as large as the original's `weights`
    although heads became fewer or smaller: its family takes the width for them all."""
    changed = {
        names(path.weight): pair
        for pair in made.pairs
        if resized(made, pair)
        for path in (pair.before.q, pair.before.k, pair.before.v)
        if path is not None
    }
    for name, like in model.state_dict().items():
        old = place(name)
        if old not in changed or like.numel() < weights[old].numel():
            continue
        site, kind = changed[old].before, model.config.get_text_config().model_type
        raise refusal(
            f"{site.id} has fewer or smaller heads", where=site.module,
            why=f"{kind} has no field for the dim of a head: it divides its width among them",
        )  # fmt: skip


def misfit(made: Changes, pair: Pair, to: Program, new: Site) -> str:
    """Why an attention of the new model cannot hold that of a pair; empty where it can."""
    spec, other = made.program.spec(pair.after), to.spec(new)
    heads, kv = spec.heads, pair.after.kv_heads
    if not resized(made, pair):
        return "" if kv == new.kv_heads else f"{new.kv_heads} key/value heads"
    filled = any(pruned(made, one) for one in made.pairs) and (
        heads * new.kv_heads == other.heads * kv and heads <= other.heads
    )
    if not filled and (heads, kv) != (other.heads, new.kv_heads):
        return f"{other.heads} heads and {new.kv_heads} key/value heads"
    if (spec.head_dim, spec.v_dim) != (other.head_dim, other.v_dim):
        return f"heads of {other.head_dim} and {other.v_dim} dims"
    return _turned(pair.after.rotary, new.rotary)


def _turned(mine: Rotary | None, other: Rotary | None) -> str:
    """In which way the angles of the new model are others; empty where they are the same."""
    if mine is None or other is None:
        return "" if mine is other else "another position encoding"
    alike = torch.equal(mine.pairs, other.pairs) and mine.gain == other.gain
    if alike and torch.allclose(mine.frequencies, other.frequencies, rtol=_SAME):
        return ""
    mine_, theirs = (
        ", ".join(f"{float(f):.3g}" for f in rotary.frequencies) for rotary in (mine, other)
    )
    return f"rotary pairs that turn by {theirs} per position, not by {mine_}"
