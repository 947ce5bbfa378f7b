"""Which tile sizes a kernel runs with: searched without a device, decided on one.

The search (`kernel_search`) needs no device. It drops what does not compile, does not fit or
spills, and orders the rest by a static score. On a device, the best dozen, the default among them,
are checked and raced (`kernel_race`); the fastest replaces the default where its lead is sure, in
the race and again in a race of the two alone. Without a device the default stays, unless it does
not fit: a score is no speed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from attnopt.autotune import kernel_search
from attnopt.autotune.compile_pool import CompilePool
from attnopt.autotune.environment import environment
from attnopt.autotune.kernel_device import Device
from attnopt.autotune.kernel_race import Failing, Track, race
from attnopt.autotune.kernel_search import TRIALS, Candidate, Compile, Found
from attnopt.autotune.timing import Progress, Ratio
from attnopt.codegen.kernel import Kernel, Load
from attnopt.codegen.own_tiles import versions
from attnopt.codegen.target import Target
from attnopt.compiler import text
from attnopt.compiler.errors import Problem

DOZEN = 12
_SEARCHING, _RACING = 0.5, 0.25  # shares of the time; the rest is for the last race and for checks
_ROUNDS, _LAST_ROUNDS = 7, 25
_DEFAULT = "default"


@dataclass(frozen=True)
class Contended:
    """Tile sizes that were looked at closely: their static score, their median seconds on the
    device where they were timed, and otherwise why not."""

    tiles: Mapping[str, Any]
    static_score: float
    seconds: float | None = None
    why_not: str = ""


@dataclass(frozen=True)
class Tuned:
    """What tuning came to: `tiles` for a kernel, spec and sizes on a target.

    "measured" means that they were decided on `device`; `ratio` is then how many times as fast they
    are as the default, where they are not the default. "estimated" means that nothing ran.
    `dropped` counts, by reason, what of the `tried` was not worth timing or not right; `took` are
    the resources of the launches.
    """

    kernel: str
    tiles: Mapping[str, Any]
    default: Mapping[str, Any]
    spec: str
    load: Load
    target: str
    evidence: Literal["measured", "estimated"]
    why: str
    tried: int
    dropped: Mapping[str, int]
    took: tuple[Mapping[str, Any], ...]
    ratio: Ratio | None = None
    contenders: tuple[Contended, ...] = ()
    device: str = ""
    driver: str = ""
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    @property
    def changed(self) -> bool:
        """Whether other tile sizes than the default were taken."""
        return dict(self.tiles) != dict(self.default)


def tune(
    cls: type[Kernel[Any]],
    spec: Any,
    load: Load,
    target: Target,
    device: Device | None = None,
    *,
    trials: int = TRIALS,
    seconds: float = 300.0,
    seed: int = 0,
    compile: Compile | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Choose a kernel's tile sizes for a spec at these sizes on a target.

    Without a `device`, nothing is searched where the default fits the target. `compile` stands for
    the pool of compiling processes. Raises `Problem` A803 for the CPU, A838 for a spec that the
    kernel does not compute, a device that is not the target, and where no tile sizes fit, compile
    and are right; A836 where the device stops answering.
    """
    _check(cls, spec, target, device)
    if compile is None:
        with CompilePool() as pool:
            return tune(
                cls, spec, load, target, device, trials=trials, seconds=seconds, seed=seed,
                compile=pool, progress=progress,
            )  # fmt: skip
    default = cls.default(spec, target, load)
    searching = seconds if device is None else _SEARCHING * seconds

    def searched(most: int) -> Found:
        return kernel_search.search(
            cls, spec, load, target, compile, trials=most, seconds=searching, seed=seed,
            progress=progress,
        )  # fmt: skip

    found = searched(1 if device is None else trials)
    if device is None and found.default_misfit:
        found = searched(trials)
    if not found.candidates:
        told = ", ".join(f"{count} {why}" for why, count in found.dropped.items())
        raise Problem(
            "A838", f"no tile sizes of {cls.name} are right for {target.title}",
            why=f"of {found.tried} tried: {told}", help="try more of them, or another kernel",
        )  # fmt: skip
    about = _About(cls, spec, load, target, default, found, seed)
    if device is None:
        return _without_device(about)
    if progress is not None:
        progress(f"timing {cls.name}", 0.0)
    return _on_device(about, device, seconds)


@dataclass(frozen=True)
class _About:
    """What is tuned, and what the search found."""

    cls: type[Kernel[Any]]
    spec: Any
    load: Load
    target: Target
    default: Kernel[Any]
    found: Found
    seed: int

    def tuned(self, best: Candidate, evidence: Literal["measured", "estimated"], why: str) -> Tuned:
        here = environment()
        return Tuned(
            self.cls.name, tiles_of(best.kernel), tiles_of(self.default), spec_text(self.spec),
            self.load, self.target.name, evidence, why, self.found.tried, dict(self.found.dropped),
            tuple(dataclasses.asdict(s.resources) for s in best.statics),
            seed=self.seed, versions=versions(), date=str(here["date"]),
        )  # fmt: skip


def _check(cls: type[Kernel[Any]], spec: Any, target: Target, device: Device | None) -> None:
    if target.measured:
        raise Problem(
            "A803", f"Triton has no code for {target.title}", help="name a GPU: --target h100"
        )
    missed = cls.supports(spec, target)
    if missed is not None:
        raise Problem("A838", f"{cls.name} does not compute this", why=missed.reason)
    other = device.misfit(target) if device is not None else ""
    if device is not None and other:
        raise Problem(
            "A838", f"{device.name} is not {target.title}", why=other,
            help="tune for the device that is here, or without a device",
        )  # fmt: skip


def _without_device(about: _About) -> Tuned:
    found = about.found
    if not found.default_misfit:
        own = next(c for c in found.candidates if c.kernel == about.default)
        return about.tuned(own, "estimated", "the default fits the target, and nothing was timed")
    best = found.candidates[0]
    made = about.tuned(
        best, "estimated",
        f"the default {found.default_misfit}; of those that fit, these have the best static score",
    )  # fmt: skip
    seen = tuple(
        Contended(tiles_of(c.kernel), c.score.value) for c in found.shortlist(about.default, DOZEN)
    )
    return replace(made, contenders=seen)


def _on_device(about: _About, device: Device, seconds: float) -> Tuned:
    short = about.found.shortlist(about.default, DOZEN)
    track = Track(about.cls, about.spec, about.load, about.target, device, about.seed)
    ordered = sorted(short, key=lambda c: c.kernel != about.default)  # the default is checked first
    outcomes: dict[Kernel[Any], Failing | None] = {c.kernel: track.wrong(c.kernel) for c in ordered}
    right = {_name(c, about.default): c for c in ordered if outcomes[c.kernel] is None}
    if not right:
        said = next(f"{f.why}: {f.said}" for f in outcomes.values() if f is not None)
        raise Problem(
            "A838", f"no tile sizes of {about.cls.name} are right on {device.name}",
            why=f"{about.default.text} {said}", help="this is a mistake in the kernel: report it",
        )  # fmt: skip
    samplers = {name: track.sampler(c.kernel) for name, c in right.items()}
    timing = race(samplers, seconds=_RACING * seconds, rounds=_ROUNDS)
    fastest = timing.fastest()
    winner, why, ratio = fastest, "the fastest of those that are right; the default is not", None
    if _DEFAULT in right:
        winner, why, ratio = _DEFAULT, "the default is the fastest, or nothing surely faster", None
        if fastest != _DEFAULT and timing.ratio(fastest, _DEFAULT).verdict == "faster":
            pair = {name: samplers[name] for name in (_DEFAULT, fastest)}
            again = race(pair, seconds=(1 - _SEARCHING - _RACING) * seconds, rounds=_LAST_ROUNDS)
            last = again.ratio(fastest, _DEFAULT, seed=about.seed)
            if last.verdict == "faster":
                winner, why, ratio = fastest, "surely faster than the default, in two races", last
    seen = tuple(_contended(c, outcomes[c.kernel], _name(c, about.default), timing) for c in short)
    dropped = Counter(about.found.dropped) + Counter(f.why for f in outcomes.values() if f)
    return replace(
        about.tuned(right[winner], "measured", why), ratio=ratio, contenders=seen,
        dropped=dict(dropped), device=device.name, driver=device.driver,
    )  # fmt: skip


def _name(candidate: Candidate, default: Kernel[Any]) -> str:
    return _DEFAULT if candidate.kernel == default else candidate.kernel.text


def _contended(candidate: Candidate, failing: Failing | None, name: str, timing: Any) -> Contended:
    tiles, score = tiles_of(candidate.kernel), candidate.score.value
    if failing is not None:
        said = f"{failing.why}: {failing.said}" if failing.said else failing.why
        return Contended(tiles, score, None, said)
    return Contended(tiles, score, timing.median(name))


def tiles_of(kernel: Kernel[Any]) -> dict[str, Any]:
    """All fields of a kernel that the tuner may choose."""
    return {key: getattr(kernel, key) for key in type(kernel).space()}


def spec_text(spec: Any) -> str:
    """A spec as one line."""
    if not dataclasses.is_dataclass(spec) or isinstance(spec, type):
        return repr(spec)
    return text.dump(spec) if hasattr(spec, "name") else repr(spec)


def told(tuned: Tuned) -> Sequence[str]:
    """What tuning came to, in lines for a terminal. A static score is not shown: it is no speed."""
    lines = [f"{tuned.kernel} on {tuned.target}, {tuned.spec}, {tuned.load}"]
    sizes = " ".join(f"{key}={text.dump_value(value)}" for key, value in tuned.tiles.items())
    lines.append(f"  {sizes} ({tuned.evidence}{', on ' + tuned.device if tuned.device else ''})")
    lines.append(f"  {tuned.why}")
    if tuned.ratio is not None:
        low, high = tuned.ratio.interval.low, tuned.ratio.interval.high
        lines.append(f"  {tuned.ratio.value:.3f}x the default's speed ({low:.3f} to {high:.3f})")
    dropped = "; ".join(f"{count} {why}" for why, count in tuned.dropped.items())
    lines.append(f"  {tuned.tried} tried" + (f", dropped: {dropped}" if dropped else ""))
    return lines
