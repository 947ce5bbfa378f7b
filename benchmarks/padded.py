"""All-MiniLM-L6-v2 on batches of real sentences of mixed length: exact rewrites alone, `--budget 2x
--max-drop 0`."""

from __future__ import annotations

from attnopt.autotune.optimize import optimize
from benchmarks.minilm import SENTENCES, model_folder
from benchmarks.run import Row

BAR = 2.5


def rows() -> list[Row]:
    """One row per batch size."""
    return [_row(batch) for batch in (8, 32)]


def _row(batch: int) -> Row:
    result = optimize(model_folder(), text=SENTENCES, batch=batch, budget=2.0, max_drop=0.0)
    assert result.speed is not None and result.accuracy is not None
    ratio = result.speed.ratio
    figure = (
        f"{ratio.value:.2f}x over {result.speed.best} ({ratio.low:.2f} to {ratio.high:.2f}), "
        f"fill {result.workload.fill:.0%}, exit {result.exit_code}"
    )
    numbers = {
        "speed": ratio.value, "low": ratio.low, "high": ratio.high,
        "over": {name: number.value for name, number in result.speed.over.items()},
        "fill": result.workload.fill, "drop": result.accuracy.drop.value, "exit": result.exit_code,
        "seconds": {timed.name: timed.seconds.value for timed in result.baselines if timed.seconds},
    }  # fmt: skip
    return Row(
        f"MiniLM, {batch} sentences a batch",
        figure,
        f"at least {BAR}x, exit 0",
        ratio.value >= BAR and result.met,
        numbers,
    )
