"""All-MiniLM-L6-v2 on full batches: exact rewrites are never slower, and the ceiling is seen before
anything is searched."""

from __future__ import annotations

from attnopt.autotune.optimize import optimize
from benchmarks.minilm import SENTENCES, model_folder
from benchmarks.run import Row

FLOOR = 0.97
SHAPES = ((8, 128), (4, 512))


def rows() -> list[Row]:
    """Exact rewrites per shape, then `--max-drop 1%` with and without a budget."""
    made = [_exact(batch, length) for batch, length in SHAPES]
    return [*made, _searched(*SHAPES[0])]


def _exact(batch: int, length: int) -> Row:
    result = optimize(model_folder(), text=SENTENCES, batch=batch, length=length, max_drop=0.0)
    assert result.speed is not None
    ratio = result.speed.ratio
    figure = f"{ratio.value:.2f}x over {result.speed.best} ({ratio.low:.2f} to {ratio.high:.2f})"
    numbers = {"speed": ratio.value, "low": ratio.low, "high": ratio.high}
    return Row(
        f"MiniLM {batch}x{length}, no padding, exact",
        figure,
        f"at least {FLOOR}x",
        ratio.value >= FLOOR,
        numbers,
    )


def _searched(batch: int, length: int) -> Row:
    result = optimize(
        model_folder(),
        text=SENTENCES,
        batch=batch,
        length=length,
        budget=2.0,
        max_drop=0.01,
        timeout="5m",
    )
    assert result.speed is not None and result.ceiling is not None
    words = result.relaxation.words if result.relaxation else "none needed"
    tier = result.accuracy.tier if result.accuracy else ""
    figure = (
        f"{result.speed.ratio.value:.2f}x ({tier}), exit {result.exit_code}; "
        f"attention's ceiling {result.ceiling.speedup.value:.2f}x; {words}"
    )
    numbers = {
        "speed": result.speed.ratio.value,
        "exit": result.exit_code,
        "ceiling": result.ceiling.speedup.value,
    }
    near = result.accuracy is not None and result.accuracy.tier in ("exact", "near-lossless")
    lower = result.relaxation.budget if result.relaxation else None
    honest = result.exit_code == 2 and lower is not None and 1.0 <= lower < 2.0
    return Row(
        f"MiniLM {batch}x{length}, --budget 2x --max-drop 1%",
        figure,
        "near-lossless; met, or exit 2 with a smaller budget that is",
        near and (result.met or honest),
        numbers,
    )
