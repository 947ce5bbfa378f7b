"""Diagnostics for the commands: which data they are measured on, and how much of a run they may
take."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from attnopt.autotune.data import CALIBRATION_TEXT, EVALUATION_TEXT, Data, gather
from attnopt.autotune.request import Request, Wanted
from attnopt.compiler.diagnostics.diagnose import OutOfTime, diagnose
from attnopt.compiler.diagnostics.diagnosis import Diagnosis
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded, require_weights
from attnopt.compiler.program import Batch, Program

SHARE = 0.05  # of a search's time
TOKENS = 2048  # that a run's report is measured on


def calibration(loaded: Loaded, wanted: Wanted, source: str) -> tuple[Batch, ...]:
    """The batches that `inspect --diagnose` measures on: the text or tensors that were given, else
    the calibration text beside the model.

    Raises `Problem` A415 where there is neither, and A118 for a model without weights.
    """
    require_weights(loaded)
    text = wanted.text
    if text is None and wanted.inputs is None:
        beside = (Path(source) / name for name in (CALIBRATION_TEXT, EVALUATION_TEXT))
        text = next((path for path in beside if path.is_file()), None)
    data = gather(loaded, replace(wanted, text=text, calibration=text), source)
    if wanted.inputs is not None and text is None:
        return (*data.calibration, *data.heldout, *data.evaluation) or data.timing
    if not data.real:
        raise Problem(
            "A415", "diagnostics need data that the model would read in use", where=source,
            why="no text was given, none is beside the model, and its example inputs are made up",
            help="give text with --text FILE, or tensors with --inputs FILE",
        )  # fmt: skip
    return (*data.calibration, *data.heldout)


def within(program: Program, data: Data, request: Request) -> Diagnosis | None:
    """The diagnostics of a run's report, as long as they take no more than a twentieth of its time;
    None where nothing approximate is asked for, or no real data is there."""
    if request.effort == "none" or not data.real or not data.calibration:
        return None
    allowed, begun = SHARE * request.seconds, time.monotonic()
    try:
        return diagnose(
            program, data.calibration, seed=request.seed, tokens=TOKENS, seconds=allowed
        )
    except OutOfTime:
        spent = time.monotonic() - begun
        return Diagnosis(
            seed=request.seed,
            seconds=spent,
            skipped=f"it takes more than {allowed:.3g} s, a twentieth of the run's time",
        )
    # The one place that catches bugs: the search is over, and what it found must not be lost to
    # figures that only explain it. The report says what happened.
    except Exception as error:  # noqa: BLE001
        said = (str(error).splitlines() or [""])[0]
        return Diagnosis(
            seed=request.seed,
            seconds=time.monotonic() - begun,
            skipped=f"they failed: {type(error).__name__}{': ' if said else ''}{said}",
        )
