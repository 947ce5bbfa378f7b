"""Write an optimized program as a checkpoint, load it again without attnopt's code in the way, and
compare before it takes its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from attnopt.compiler.checkpoint.changes import Changes, Pair, changes, refusal
from attnopt.compiler.checkpoint.deepseek import converted
from attnopt.compiler.checkpoint.latents import has_latents, read_latents
from attnopt.compiler.checkpoint.names import Names
from attnopt.compiler.checkpoint.place import (
    beside,
    check_place,
    copy_files,
    put,
    write_plan,
    writing,
)
from attnopt.compiler.checkpoint.reload import Reloaded, allow
from attnopt.compiler.checkpoint.settings import Settings, settings, window_of
from attnopt.compiler.checkpoint.sizes import building, check_smaller, misfit
from attnopt.compiler.checkpoint.weights import (
    Mover,
    assembled,
    by_name,
    check_accounted,
    to_move,
)
from attnopt.compiler.contract import read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.hf_config import require_transformers
from attnopt.compiler.intake.hf_directory import quiet
from attnopt.compiler.intake.hf_model import HFModel, set_attention
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.intake.weightless import weightless
from attnopt.compiler.plan import Outcome, Plan
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.site import Site
from attnopt.compiler.trace import trace
from attnopt.compiler.verify import BOUND, compare, own_dtype


@dataclass(frozen=True)
class Written:
    """What was written: a model of class `family` in `folder`.

    `settings` maps the fields of the config that differ to their values before and after; `zeroed`
    are modules whose output projection is zero; `kept` names rewrites of which nothing is written,
    since they change no function. `error` is the largest difference of the reloaded model's outputs
    from the optimized one's on the run's example inputs, over their root mean square; `parameters`
    counts weights before and after. `padded` maps attentions that were filled up with heads of
    zeros to how many heads they have and how many there are.
    """

    folder: Path
    family: str
    files: tuple[str, ...]
    settings: Mapping[str, tuple[Any, Any]]
    zeroed: tuple[str, ...]
    kept: tuple[str, ...]
    error: float
    dtype: str
    parameters: tuple[int, int]
    padded: Mapping[str, tuple[int, int]]

    def as_json(self) -> dict[str, Any]:
        """The same as a JSON object."""
        told = {name: {"was": was, "now": now} for name, (was, now) in self.settings.items()}
        was, now = self.parameters
        return {
            "folder": str(self.folder), "family": self.family, "files": list(self.files),
            "settings": told, "zeroed": list(self.zeroed), "kept": list(self.kept),
            "error": self.error, "dtype": self.dtype, "parameters": {"was": was, "now": now},
            "padded": {module: list(heads) for module, heads in self.padded.items()},
        }  # fmt: skip


def write_checkpoint(
    loaded: Loaded,
    original: Program,
    program: Program,
    plan: Plan,
    outcomes: Iterable[Outcome],
    source: Path,
    out: Path,
    saved: tuple[Callable[..., Any], Batch] | None = None,
) -> Written:
    """Write what a plan made of a transformers model as a checkpoint in the folder `out`.

    `original` and `program` are the model's program before and after the plan, `loaded` the model,
    read from the folder `source`. `saved` is the optimized model as the run saved it, with an
    example for it; without it the program and its example stand for it. Raises `Problem` A521 for
    what the family cannot express (before anything is written), A522 when the reloaded checkpoint
    answers otherwise, A502, A508 and A523 for a place that cannot be written.
    """
    check_place(out, source)
    outcomes = tuple(outcomes)
    hf: Any = getattr(loaded.module, "hf", None)
    names = Names.read(original, hf.state_dict(), loaded.root_prefix)
    made = changes(original, program, outcomes)
    latents = read_latents(made) if has_latents(outcomes) else {}
    check_accounted(made, names, {name for maps in latents.values() for name in maps.weights})
    converter = converted(hf, made, names, latents) if latents else None
    fields = converter.settings if converter else settings(hf, made, names)
    zeroed = _zeroed(made, fields, names)
    padded = dict[str, tuple[int, int]]()
    if converter:
        model = converter.model(by_name(hf.state_dict(), made, names))
        set_attention(model, hf.config._attn_implementation)
        traced = _traced(loaded, model)
    else:
        model, traced, padded = _filled(loaded, hf, made, fields, names)
    run, batch = saved or (program, program.example)
    valid_only = any(type(read_pass(o.rewrite)).valid_only for o in outcomes if o.applied)
    same = compare(program, traced, valid_only)
    # Weights of another scale are rounded anew, to the dtype that they are stored in.
    bound = max(same.bound, BOUND[own_dtype(original)]) if converter else same.bound
    allow(same.error, bound, f"in {same.dtype}", out)
    with beside(out) as fresh:
        _save(model, fresh)
        with writing(out):
            copy_files(source, fresh)
            write_plan(plan, fresh)
        error = Reloaded(fresh, loaded, out).holds(made, run, batch)
        files = put(fresh, out)
    return Written(
        out, type(model).__name__, tuple(files), dict(fields.told), zeroed,
        made.kept, error, str(own_dtype(original)).removeprefix("torch."),
        (_count(hf), _count(model)), padded,
    )  # fmt: skip


def _zeroed(made: Changes, fields: Settings, names: Names) -> tuple[str, ...]:
    """The sublayers that stay in the config, and the projections that silence them."""
    silent = []
    for item in made.removed:
        if all(fields.drops(names(name)) for name in item.own):
            continue
        if item.last is None:
            raise refusal(
                f"the {item.layer.kind} sublayer {item.layer.id} cannot be silenced",
                where=item.layer.module,
                why="a block of the family has it, and it ends in no single projection of its own",
                help="delete the whole block",
            )
        silent.append(names(item.last.weight).removesuffix(".weight"))
    return tuple(silent)


def _filled(
    loaded: Loaded, hf: Any, made: Changes, fields: Settings, names: Names
) -> tuple[Any, Program, dict[str, tuple[int, int]]]:
    """The new model with its weights, its trace, and which attentions got heads of zeros; weights
    that keep their shape are shared with the original."""
    with weightless(), building(fields.config):
        model = type(hf)(fields.config)
    check_smaller(model, hf.state_dict(), made, names, fields.place)
    set_attention(model, hf.config._attn_implementation)
    named = by_name(hf.state_dict(), made, names)
    moved = to_move(made, names)
    gone = frozenset(names(name) for item in made.removed for name in item.own)
    found, fresh = assembled(model, named, set().union(*moved.values()), fields, gone)
    model.load_state_dict(found, strict=True, assign=True)
    model.tie_weights()
    traced = _traced(loaded, model)
    padded = dict[str, tuple[int, int]]()
    if moved or any(pair.window is not None for pair in made.pairs):
        new = raise_program(traced)
        mover = Mover(made.program, new, fresh)
        for pair, site in _facts(new, made, fields):
            heads = made.program.spec(pair.after).heads, new.spec(site).heads
            if heads[0] != heads[1]:
                padded[pair.before.module] = heads
            if pair.before.id in moved:
                mover.move(pair, site)
        mover.finish()
    return model, traced, padded


def _traced(loaded: Loaded, model: Any) -> Program:
    return trace(replace(loaded, module=HFModel(model.eval()).eval(), weights="meta"))


def _facts(new: Program, made: Changes, fields: Settings) -> list[tuple[Pair, Site]]:
    """Each attention with its site in the new model.

    Raises `Problem` A521 where the new model has other heads or another mask there.
    """
    found = {fields.place(site.module): site for site in new.sites}
    pairs = []
    for pair in made.pairs:
        site = found.get(pair.before.module)
        if site is None:
            raise refusal(
                f"{pair.before.id} is not found in the new model", where=pair.before.module
            )
        if why := misfit(made, pair, new, site):
            own = made.program.spec(pair.after)
            raise refusal(
                f"{pair.before.id} has {own.heads} heads of {own.head_dim} dims, "
                f"{pair.after.kv_heads} with keys and values",
                where=pair.before.module, why=f"with this config it has {why}",
            )  # fmt: skip
        wanted = pair.before.mask if pair.window is None else f"{pair.window.left} keys"
        got = site.mask if pair.window is None else f"{window_of(site.mask)} keys"
        if wanted != got:
            raise refusal(
                f"{pair.before.id} reads {wanted}", where=pair.before.module,
                why=f"with this config it reads {got}",
            )  # fmt: skip
        pairs.append((pair, site))
    return pairs


def _save(model: Any, folder: Path) -> None:
    transformers = require_transformers(str(folder))
    try:
        with quiet(transformers):
            model.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise Problem(
            "A502", f"cannot write the checkpoint beside {folder.parent}", why=str(error),
            help="give another folder, or make room",
        ) from error  # fmt: skip


def _count(hf: Any) -> int:
    return sum(p.numel() for p in hf.parameters())
