"""`export_checkpoint`: a finished run as a plain checkpoint of transformers.

The plan is replayed on the original model, since a saved program no longer tells which weight holds
which heads; what comes out is held against the model that the run saved. Nothing is trained again:
healing keeps every name and shape, and its weights are those of the saved model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from attnopt.autotune.replay import rebuild, report_of, require_data, same_model
from attnopt.compiler.artifact import load as load_folder
from attnopt.compiler.artifact import read_plan
from attnopt.compiler.checkpoint import Written, write_checkpoint
from attnopt.compiler.checkpoint.changes import kept_out, refusal
from attnopt.compiler.checkpoint.names import read_names
from attnopt.compiler.checkpoint.place import check_place
from attnopt.compiler.contract import Exactness, read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded, require_weights
from attnopt.compiler.intake.source import load
from attnopt.compiler.plan import Plan
from attnopt.compiler.program import Batch, Program
from attnopt.passes.heal import Heal

Progress = Callable[[str, float], None]


def export_checkpoint(
    folder: str | Path,
    out: str | Path,
    model: str | Path,
    *,
    trust: bool = False,
    attention: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write the model of the run in `folder` to the folder `out`, for stock transformers to load.

    `model` is the folder of the original model; `attention` and `dtype` are what the run read it
    with. Raises `Problem` A505 (no run), A511 to A513 as `apply` does, A521 for a model that is no
    folder of transformers and for what its family cannot express, A522 when the written checkpoint
    answers otherwise than the run's model, A523, A502 and A508 for a place that cannot be written.
    """
    say = progress or (lambda what, share: None)
    home, source, to = Path(folder), Path(model), Path(out)
    if not (source / "config.json").is_file():
        raise Problem(
            "A521", f"{source} is not a folder of a transformers model",
            why="a checkpoint takes its family, its tokenizer and its config from the original",
            help="give the original with --model; other models can be exported with --onnx",
        )  # fmt: skip
    check_place(to, source)
    report, plan = report_of(home), read_plan(home)
    steps = {read_pass(step.rewrite).text for step in plan.steps}
    kept_out(o for o in report.outcomes if o.rewrite in steps)  # before minutes of replaying
    require_data(plan, report, home)
    same_model(report, source)
    optimized = load_folder(home)
    example = optimized.exported.example_inputs
    assert example is not None
    batch = Batch(tuple(example[0]), dict(example[1]))
    say("reading the original", 0.1)
    loaded = _like_the_run(source, batch, trust, attention, dtype)
    fitted = _fitted(plan)
    again = rebuild(loaded, fitted, home, report, source, say)
    left = {step.rewrite for step in plan.steps} - {step.rewrite for step in fitted.steps}
    left = {read_pass(rewrite).text for rewrite in left}
    outcomes = (*again.outcomes, *(o for o in report.outcomes if o.rewrite in left))
    program = again.program
    if any(isinstance(read_pass(o.rewrite), Heal) for o in outcomes if o.applied):
        program = _with_weights(program, optimized.exported.state_dict)
    say("writing", 0.8)
    return write_checkpoint(
        loaded, again.original, program, plan, outcomes, source, to, (optimized, batch)
    )


def _fitted(plan: Plan) -> Plan:
    """The plan up to its last approximate step, without healing: what follows changes no
    function, and may hide which weights hold which heads (packed tokens).

    Raises `Problem` A521 where an approximate rewrite comes after healing.
    """
    made = [read_pass(step.rewrite) for step in plan.steps]
    healed = next((i for i, p in enumerate(made) if isinstance(p, Heal)), len(made))
    for step, p in zip(plan.steps[healed:], made[healed:], strict=True):
        if p.exactness is Exactness.APPROXIMATE and not isinstance(p, Heal):
            raise refusal(
                f"`{step.rewrite}` comes after a healing in the plan",
                why="it was fitted to healed weights, and would be fitted anew to others",
                help="let heal be the last of the approximate rewrites",
            )
    last = max(
        (i for i, p in enumerate(made, 1) if p.exactness is Exactness.APPROXIMATE), default=0
    )
    steps = zip(plan.steps[:last], made, strict=False)
    return replace(
        plan, steps=tuple(step for step, rewrite in steps if not isinstance(rewrite, Heal))
    )


def _with_weights(program: Program, saved: Mapping[str, Tensor]) -> Program:
    """A program with the weights that the saved one has under the same names and in the same
    shape, in its own dtype; it keeps the others, which later steps of the plan have replaced.
    """
    made = program.copy()
    for name in read_names(program):
        value, own = saved.get(name), program.weight(name)
        if value is None or value.shape != own.shape or not own.is_floating_point():
            continue
        if not torch.equal(value := value.detach().to(own.dtype), own):
            made.set_weight(name, value)
    return made


def _like_the_run(
    source: Path, batch: Batch, trust: bool, attention: str | None, dtype: str | None
) -> Loaded:
    """The original with the inputs that the run's model was saved with."""
    with tempfile.TemporaryDirectory() as place:
        inputs = Path(place) / "inputs.pt"
        torch.save((batch.args, dict(batch.kwargs)), inputs)
        loaded = load(str(source), inputs=inputs, trust=trust, attention=attention, dtype=dtype)
    require_weights(loaded)
    return loaded
