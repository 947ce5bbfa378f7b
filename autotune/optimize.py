"""`optimize`: a trained model in, a faster one with a measured, bounded loss out, and the reasons
for all of it.

Read, trace and raise; apply every exact rewrite; race the result against the model as given and
torch.compile of it; where the budget asks for more, look at the ceiling first and then search the
approximate rewrites under the accuracy bound; measure the winner again on data that nothing before
has seen; write the folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from attnopt.autotune.data import gather
from attnopt.autotune.place import Place, at_home, device_of, home, original, read_at_home
from attnopt.autotune.request import (
    HealBudget,
    Request,
    Wanted,
    parse_budget,
    parse_healing,
    parse_kv_bytes,
    parse_seconds,
    parse_share,
)
from attnopt.autotune.result import Result
from attnopt.autotune.run import Run
from attnopt.compiler.artifact import check_writable, save, source_sha256, work_folder
from attnopt.compiler.device import CPU, Carried
from attnopt.compiler.errors import NothingFound, Problem
from attnopt.compiler.intake.loaded import Loaded, require_weights
from attnopt.compiler.intake.source import evaluating, from_module, load
from attnopt.compiler.pipeline import read
from attnopt.compiler.program import Program
from attnopt.passes.heal import CHECKPOINT

Progress = Callable[[str, float], None]


def optimize(
    model: str | Path | nn.Module,
    example_inputs: Any = None,
    *,
    budget: float | str | None = None,
    max_drop: float | str = 0.01,
    target: str | None = None,
    effort: str = "quick",
    trials: int | None = None,
    timeout: float | str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    resume: bool = False,
    metric: str | None = None,
    text: str | Path | None = None,
    calibration: str | Path | None = None,
    inputs: str | Path | None = None,
    batch: int | None = None,
    length: int | None = None,
    allow_globals: tuple[str, ...] = (),
    trust: bool = False,
    attention: str | None = None,
    dtype: str | None = None,
    heal: str | HealBudget | None = None,
    kv_bytes: float | str | None = None,
    device: str | int | torch.device | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Result:
    """Optimize a model file, an HF directory, `module:callable`, or a module with example inputs.

    `budget` is how many times as fast the result has to be as the faster of the model and
    torch.compile of it (None: as fast as it gets); `max_drop` the largest relative loss of accuracy
    (0.01 is 1%; 0 allows exact rewrites only); both may be text as on the command line ("2x",
    "1%"). `attention` picks the spelling of a transformers
    model (eager, sdpa), `dtype` what a model computes in ("float32"; left out, as it is stored).
    `heal` trains the touched sites of the winner before it is saved, for a time ("5m") or on a
    number of tokens ("200ktok"). `kv_bytes` (0.5 or "50%") asks for the least loss of which a
    decoder keeps at most that share of its cache, in the place of speed. `device` is where the
    model runs, is fitted and trained ("cuda", "cuda:1"; left out, where a module is, and for a file
    the GPU that `target` names where it is here, else the CPU); `target` what speeds are of: left
    out, of that device, measured; of another GPU ("a100") they are estimated. The result is what
    `report.json` holds; with `out` the folder is written. Raises `Problem` for what the user can
    mend, and `NothingFound` when the model has no attention that could be raised.
    """
    budget = parse_budget(budget) if isinstance(budget, str) else budget
    max_drop = parse_share(max_drop) if isinstance(max_drop, str) else max_drop
    seconds = parse_seconds(timeout) if isinstance(timeout, str) else timeout
    there = device_of(model) if device is None else device
    wanted = Wanted(_path(text), _path(calibration), _path(inputs), batch, length)
    request = Request(
        budget, max_drop, target, effort, trials, seconds,  # type: ignore[arg-type]
        _path(out), seed, resume, metric, wanted, command,
        parse_healing(heal) if isinstance(heal, str) else heal,
        parse_kv_bytes(kv_bytes) if isinstance(kv_bytes, str) else kv_bytes,
        None if there is None else str(torch.device(there) if isinstance(there, int) else there),
    )  # fmt: skip
    if request.device is not None:
        Place.of(request.device, request.target)
    if request.out is not None:
        check_writable(request.out)
    source = "" if isinstance(model, nn.Module) else str(model)
    with evaluating(model), at_home(model):
        loaded, sha = _loaded(
            model, example_inputs, request, allow_globals, trust, attention, dtype
        )
        return run(loaded, request, source, sha, progress)


def run(
    loaded: Loaded,
    request: Request,
    source: str = "",
    sha: str = "",
    progress: Progress | None = None,
) -> Result:
    """Optimize a loaded model; see `optimize`."""
    require_weights(loaded)
    if request.device is None and loaded.module is not None:
        found = device_of(loaded.module) or CPU
        request = request if found == CPU else replace(request, device=str(found))
    with at_home(loaded.module):
        return _run(read_at_home(loaded), request, source, sha, progress)


def _run(
    loaded: Loaded, request: Request, source: str, sha: str, progress: Progress | None
) -> Result:
    begun = time.monotonic()
    place = Place.of(request.device, request.target)
    torch.manual_seed(request.seed)
    say = progress or (lambda what, share: None)
    say("tracing", 0.0)
    program = read(loaded)
    require_sites(program)
    data = gather(loaded, request.data, source, training=request.heal is not None)
    program.example = data.timing[0] if data.real else program.example
    there = Carried(place.device)
    given = original(loaded, there)
    if place.device != CPU:  # after the original, which a program may share its weights with
        program, data = program.to(place.device, there), data.to(place.device)
    work = work_folder(request.out) if request.out is not None else None
    if work is not None and not request.resume:
        for name in ("study.journal", "measurements.jsonl", CHECKPOINT):
            (work / name).unlink(missing_ok=True)
    session = Run(
        given, program, data, request, place, task=loaded.task, work=work, sha=sha, progress=say
    )
    built, result = session.go()
    result = replace(
        result, model=loaded.name, model_sha256=sha, seconds=time.monotonic() - begun,
        command=request.command,
        warnings=(
            *loaded.notes,
            *(f"{f}: it could not be made dynamic" for f in program.fixed),
            *result.warnings,
        ),
    )  # fmt: skip
    if request.out is None:
        return result
    say("writing the folder", 0.0)
    batches = {"calibration": data.calibration, "heldout": data.heldout}
    if result.healing is not None and result.healing.accepted:
        batches["training"] = data.training
    fitted = any("APPROXIMATE" in o.exactness.upper() for o in built.outcomes if o.applied)
    home = built.program if place.device == CPU else built.program.to(CPU)
    folder = save(request.out, home, result.plan, result, batches if fitted else {})
    return replace(result, folder=str(folder))


def require_sites(program: Program, coverage: float = 0.0) -> None:
    """Raise `NothingFound` with the nearest miss when no attention was raised, or a smaller share
    of them than `coverage` (0 to 1)."""
    if program.sites:
        _require_coverage(program, coverage)
        return
    if not program.unraised:
        raise NothingFound(
            "A203", f"no attention was found in {program.name}",
            why="the graph holds no softmax over a product of two activations",
            help="attnopt rewrites softmax attention; a model without it has nothing to gain here",
        )  # fmt: skip
    near = program.unraised[0]
    raise NothingFound(
        "A203", f"none of {len(program.unraised)} attentions of {program.name} was understood",
        where=" ".join(filter(None, (near.module, near.source))),
        why=f"{near.reason} (node `{near.node}`)", help=near.help,
    )  # fmt: skip


def _require_coverage(program: Program, share: float) -> None:
    raised, missed = len(program.sites), len(program.unraised)
    if raised >= share * (raised + missed):
        return
    near = program.unraised[0]
    raise NothingFound(
        "A206",
        f"{raised} of {raised + missed} attentions were understood, {share:.0%} are required",
        where=" ".join(filter(None, (near.module, near.source))),
        why=f"{near.reason} (node `{near.node}`)", help=near.help,
    )  # fmt: skip


def _loaded(
    model: str | Path | nn.Module, example_inputs: Any, request: Request, allow: tuple[str, ...],
    trust: bool, attention: str | None, dtype: str | None,
) -> tuple[Loaded, str]:  # fmt: skip
    if isinstance(model, nn.Module):
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise Problem(
                "A118", f"{type(model).__name__} has no weights",
                why="some of them are on the meta device, so there is nothing to measure",
                help="load them first, for example by .to_empty() and .load_state_dict()",
            )  # fmt: skip
        return from_module(model, tree_map_only(Tensor, home, example_inputs)), ""
    data = request.data
    loaded = load(
        str(model), inputs=data.inputs, text=data.text, batch=data.batch, length=data.length,
        allow_globals=allow, trust=trust, attention=attention, dtype=dtype,
    )  # fmt: skip
    path = Path(model)
    return loaded, source_sha256(path) if path.exists() else ""


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)
