"""What the roofline says of each bar of the GPU table, and of which it can say nothing.

Every kernel and every peer with a known least work is given the same shares of the target's peaks,
so that a ratio holds what is read and computed less, and nothing of how well either is written.
Nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from attnopt.codegen.roofline import ASSUMED
from attnopt.codegen.target import Target
from benchmarks.gpu_case import OURS, Bar, Case

NOT_MEASURED = "not yet measured"
_ALIKE = "the same work at the same share of the peak: 1x by construction, which answers nothing"
_WAITS = "it waits for memory: 100% by construction, which answers nothing"


@dataclass(frozen=True)
class Estimated:
    """A bar with its estimated figure, None where there is none, and what is to be said of it."""

    bar: Bar
    value: float | None
    said: str = ""

    @property
    def figure(self) -> str:
        """The figure in the bar's own unit."""
        if self.value is None:
            return "–"
        if self.bar.of == "flops":
            return f"{self.value / 1e12:.0f} TFLOP/s"
        return f"{self.value:.0%}" if self.bar.of == "bandwidth" else f"{self.value:.3g}x"

    @property
    def verdict(self) -> str:
        """What follows from the figure, in words; the bar itself is not yet measured."""
        parts = [self.said] if self.said else []
        if self.answers:
            above = self.value is not None and self.value >= self.bar.least
            parts.insert(0, "above the bar" if above else "**below the bar**")
        return "; ".join(parts)

    @property
    def answers(self) -> bool:
        """Whether the figure says anything about the bar."""
        given = self.value is not None and self.bar.asked
        return given and not self.said.startswith((_ALIKE, _WAITS))


def shares(target: Target) -> list[str]:
    """The shares of the peaks that estimates go by, each with its source, or that it is assumed."""
    found = []
    for name, assumed in ASSUMED.items():
        if name == "matmul":  # of products outside of attention, which are not in this table
            continue
        if name in target.achievable:
            found.append(
                f"{name}: {target.achievable[name]:.0%} of the peak, calibrated "
                f"({target.achievable_source})"
            )
        else:
            found.append(f"{name}: {assumed:.0%} of the peak, ASSUMED (no published figure here)")
    return found


def estimated_bars(case: Case, target: Target) -> list[Estimated]:
    """All bars of a case on a target."""
    missed = case.cls.supports(case.spec, target)
    if missed is not None:
        return [Estimated(bar, None, f"not here: {missed.reason}") for bar in case.bars]
    seconds = case.estimates(target)
    if not seconds:
        return [Estimated(bar, None, "the target has no peaks") for bar in case.bars]
    return [_estimated(case, bar, target, seconds) for bar in case.bars]


def _estimated(case: Case, bar: Bar, target: Target, seconds: dict[str, float]) -> Estimated:
    if bar.of == "flops":
        return _rate(case, bar, target, seconds[OURS])
    if bar.of == "bandwidth":
        copied = target.bandwidth * {**ASSUMED, **target.achievable}["bandwidth"]
        value = case.work().bytes / seconds[OURS] / copied
        said = _WAITS if value > 0.999 else "it waits for arithmetic, at the share of attention"
        return Estimated(bar, value, said)
    if bar.contender not in seconds:
        return Estimated(bar, None, _unknown(case, [bar.contender]))
    known = [name for name in bar.over if name in seconds]
    others = [name for name in bar.over if name not in seconds]
    if not known:
        return Estimated(bar, None, _unknown(case, others))
    value = min(seconds[name] for name in known) / seconds[bar.contender]
    said = [_ALIKE] if abs(value - 1) < 1e-3 else []
    if others:
        said.append(f"against {' and '.join(known)} alone: {_unknown(case, others)}")
    return Estimated(bar, value, "; ".join(said))


def _rate(case: Case, bar: Bar, target: Target, seconds: float) -> Estimated:
    rate = case.work().flops / seconds
    dtype = case.load.dtype if case.load.dtype in target.peak else "float16"
    share, asked = rate / target.peak[dtype], bar.least / target.peak[dtype]
    said = f"{share:.0%} of the peak, where the bar asks for {asked:.0%}"
    if asked > 1:
        said += ": more than the device has"
    return Estimated(bar, rate, said)


def _unknown(case: Case, names: Sequence[str]) -> str:
    told = [f"{name} is not estimated, {case.unknown.get(name, 'nothing tells')}" for name in names]
    return "; ".join(told)


def lines(cases: Sequence[Case], target: Target) -> Iterator[str]:
    """The estimates for a terminal."""
    yield f"estimated by the roofline of {target.title}, not measured"
    yield from (f"  {share}" for share in shares(target))
    for case in cases:
        seconds = case.estimates(target)
        times = ", ".join(f"{name} {s * 1e3:.3f} ms" for name, s in seconds.items())
        yield f"{case.name}: {times or 'nothing of it'} (estimated)"
        for found in estimated_bars(case, target):
            verdict = found.verdict.replace("**", "")
            told = [found.bar.words, f"estimated {found.figure}", verdict, NOT_MEASURED]
            yield "    " + " | ".join(part for part in told if part)


def page(cases: Sequence[Case], target: Target) -> str:
    """The estimates as a document: every bar, marked as not yet measured."""
    table = [
        "| case | bar | estimated | what the estimate says | measured |",
        "|---|---|---|---|---|",
    ]
    for case in cases:
        for found in estimated_bars(case, target):
            row = (case.name, found.bar.words, found.figure, found.verdict or "–")
            table.append(f"| {' | '.join(row)} | *{NOT_MEASURED}* |")
    times = ["| case | estimated times | command that measures it |", "|---|---|---|"]
    for case in cases:
        seconds = case.estimates(target)
        told = ", ".join(f"{name} {s * 1e3:.3g} ms" for name, s in seconds.items()) or "–"
        times.append(f"| {case.name} | {told} | `{command(case, cases)}` |")
    return "\n".join([
        f"# GPU table, estimated: {target.title}", "",
        f"Written by `python benchmarks/gpu.py --estimate {target.name} --out benchmarks/results`. "
        "**Nothing here was measured**: no row was run on a GPU yet. `python benchmarks/gpu.py` on "
        "a machine with one checks all kernels, times all rows and writes "
        f"`gpu-{target.name}.json`.", "",
        "Times are the least arithmetic and memory traffic of each contender over the target's "
        "peaks, times these shares:", "",
        *(f"- {share}" for share in shares(target)), "",
        "Kernels and peers get the same shares. A ratio thus tells what is read and computed less, "
        "and nothing of how well either is written; where both do the same work it is 1 by "
        "construction, and answers nothing.", "",
        *table, "", "## Times, and how to measure a row", "", *times, "",
    ])  # fmt: skip


def command(case: Case, among: Sequence[Case]) -> str:
    """What measures the case, and as few others as a word without a comma can tell it from."""
    words = [word.strip() for word in case.name.split(",")]
    word = min(words, key=lambda word: sum(word in other.name for other in among))
    return f'python benchmarks/gpu.py --only "{word}"'
