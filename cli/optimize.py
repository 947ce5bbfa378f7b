"""`optimize MODEL`: a faster model, with what it cost, in a folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from attnopt.cli import options
from attnopt.cli.stdout import Interrupted, document
from attnopt.compiler.errors import Problem

RUNS = Path("attnopt-out")


def optimize(
    ctx: typer.Context,
    model: options.Model,
    target: Annotated[
        str | None,
        typer.Option(
            help="What speeds are of: the device, timed (default), or a GPU, by name, estimated."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where the model runs, is fitted and healed: cpu, cuda, cuda:1 (default: the "
            "target where it is here, else cpu)."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="How many times as fast, e.g. 2x (default: as fast as it gets)."),
    ] = None,
    max_drop: Annotated[
        str, typer.Option(help="Largest loss of accuracy; 0 for exact rewrites only.")
    ] = "1%",
    kv_bytes: Annotated[
        str | None,
        typer.Option(
            help="Look for the least loss that keeps this share of a decoder's cache, e.g. 50%."
        ),
    ] = None,
    effort: Annotated[str, typer.Option(help="How hard to search: none, quick or full.")] = "quick",
    trials: Annotated[
        int | None, typer.Option(help="Plans to try at most (default: by effort).")
    ] = None,
    timeout: Annotated[
        str | None, typer.Option(help="Time to search, e.g. 10m (default: by effort).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Output folder (default: {RUNS}/<model>).", metavar="DIR")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run in the same folder.")
    ] = False,
    heal: Annotated[
        str | None,
        typer.Option(
            help="Train what the winning plan changed before it is saved, for a time such as 5m or "
            "on tokens such as 200ktok.",
        ),
    ] = None,
    heal_rank: Annotated[
        int,
        typer.Option(min=0, help="Train changes of this rank (LoRA); 0 trains whole weights."),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    metric: options.Metric = None,
    text: options.Text = None,
    calibration: options.Calibration = None,
    inputs: options.Inputs = None,
    batch: options.Batch = None,
    length: options.Length = None,
    allow_global: options.AllowGlobal = None,
    trust: options.Trust = False,
    attention: options.Attention = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> int:
    """Make the attention of MODEL fast, and measure what it cost."""
    from attnopt.autotune.request import (
        parse_budget,
        parse_healing,
        parse_kv_bytes,
        parse_seconds,
        parse_share,
    )

    if heal_rank and heal is None:
        raise Problem(
            "A610", "--heal-rank needs --heal", help="optimize --help lists the options"
        )  # fmt: skip
    demands: dict[str, Any] = {
        "budget": None if budget is None else parse_budget(budget),
        "max_drop": parse_share(max_drop),
        "target": target,
        "device": device,
        "effort": effort,
        "trials": trials,
        "timeout": None if timeout is None else parse_seconds(timeout),
        "out": RUNS / name_of(model) if out is None else out,
        "seed": seed,
        "resume": resume,
        "metric": metric,
        "heal": None if heal is None else parse_healing(heal, heal_rank),
        "kv_bytes": None if kv_bytes is None else parse_kv_bytes(kv_bytes),
        "command": shlex.join(ctx.obj or ["optimize", model]),
    }
    _check(demands)
    try:
        return _optimize(
            model, json, threads, **demands, text=text, calibration=calibration, inputs=inputs,
            batch=batch, length=length, allow_globals=tuple(allow_global or ()), trust=trust,
            attention=attention, dtype=dtype,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise _interrupted(demands["out"], demands["command"]) from None


def _check(demands: dict[str, Any]) -> None:
    """Everything that can be refused without torch."""
    from attnopt.autotune.request import Request
    from attnopt.codegen.target import target
    from attnopt.compiler.folder import check_writable

    Request(**demands)
    if demands["target"] is not None:
        target(demands["target"])
    check_writable(demands["out"])


def _optimize(model: str, as_json: bool, threads: int | None, **asked: Any) -> int:
    from attnopt.cli import draw
    from attnopt.cli.progress import Progress

    with Progress("optimize", quiet=as_json) as bar:
        bar("starting torch", 0.0)
        options.set_threads(threads)
        from attnopt.autotune.optimize import optimize as run

        options.find_metric(asked["metric"])
        result = run(model, progress=bar, **asked)
    if as_json:
        document({**result.as_json(), "folder": result.folder})
    else:
        draw.outcomes(result.outcomes)
        draw.verdict(result)
    return result.exit_code


def name_of(model: str) -> str:
    """What a run of this model is called: its file's or directory's name, or the callable's."""
    path = Path(model)
    if path.is_dir():
        named = path.resolve().name
    else:
        named = path.stem if path.exists() else model.rpartition(":")[2]
    return re.sub(r"[^\w.\-]+", "-", named).strip("-.") or "model"


def _interrupted(out: Path, command: str) -> Interrupted:
    again = command if "--resume" in shlex.split(command) else f"{command} --resume"
    return Interrupted(
        "A611",
        "interrupted",
        where=str(out),
        why="what was measured so far is kept; an earlier result in the folder is untouched",
        help=f"go on with: {again}",
    )
