"""`Result`: what one optimization found, as a frozen value. `report.json` holds it
(docs/report.md).

Every number that says how fast, how accurate or how large something is, is a `Number`: it carries
whether it was measured or estimated, and how sure it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attnopt.autotune import record
from attnopt.autotune.cache_entry import CacheEntry
from attnopt.autotune.number import Number
from attnopt.compiler.decode.phase_cost import Decoding
from attnopt.compiler.diagnostics.diagnosis import Diagnosis
from attnopt.compiler.errors import Problem
from attnopt.compiler.plan import Outcome, Plan

if TYPE_CHECKING:
    from attnopt.autotune.accuracy import Accuracy
    from attnopt.autotune.timing import Ratio, Timing

SCHEMA = 1


@dataclass(frozen=True)
class Workload:
    """What was timed: `batch` sequences of `length` positions, of which the fraction `fill` is
    real.
    """

    batch: int
    length: int
    fill: float = 1.0
    source: str = ""


@dataclass(frozen=True)
class Timed:
    """The time of one form of the model: median seconds for the workload, quartiles as low and
    high.

    `status` is "left out" for a form that could not be run; `reason` then says why.
    """

    name: str
    status: Literal["measured", "estimated", "left out"]
    seconds: Number | None = None
    rounds: int = 0
    reason: str = ""

    @staticmethod
    def of(timing: Timing, name: str, shown: str = "") -> Timed:
        """The time of a contender, measured."""
        spread = timing.spread(name)
        note = "low and high are the quartiles"
        seconds = Number(spread.median, "measured", spread.q1, spread.q3, "s", note)
        return Timed(shown or name, "measured", seconds, spread.count)


@dataclass(frozen=True)
class Speed:
    """How many times as fast the result is: `over` each baseline, and over `best`, the one it gains
    least over.
    """

    derived: ClassVar[tuple[str, ...]] = ("ratio",)
    over: Mapping[str, Number]
    best: str
    verdict: Literal["faster", "slower", "inconclusive"]

    @property
    def ratio(self) -> Number:
        """The ratio over the fastest baseline, which is what a budget asks for."""
        return self.over[self.best]

    @staticmethod
    def of(ratios: Mapping[str, Ratio]) -> Speed:
        """From measured ratios by baseline name."""
        best = min(ratios, key=lambda name: ratios[name].value)
        over = {
            name: Number(r.value, "measured", r.interval.low, r.interval.high)
            for name, r in ratios.items()
        }
        return Speed(over, best, ratios[best].verdict)

    def reaches(self, bound: float) -> bool:
        """Whether the median ratio is at least `bound`; more than 1x is reached only by what is
        surely faster."""
        return self.ratio.value >= bound and (bound <= 1.0 or self.verdict == "faster")

    def straddles(self, bound: float) -> bool:
        """Whether the interval of the ratio lies on both sides of `bound`."""
        low, high = self.ratio.low, self.ratio.high
        return low is not None and high is not None and low < bound < high


@dataclass(frozen=True)
class AccuracyEntry:
    """What the result costs: `metric` of the original and of the result, and the relative `drop`.

    `drop` has one-sided 95% bounds as low and high, and `bound` is the largest drop allowed, both
    fractions. `also` holds further figures by name (KL divergence, top-1 agreement).
    """

    metric: str
    drop: Number
    bound: float
    verdict: Literal["pass", "fail", "inconclusive"]
    tier: str
    original: Number | None = None
    optimized: Number | None = None
    also: Mapping[str, Number] = field(default_factory=dict)
    sequences: int = 0
    tokens: int = 0
    reason: str = ""

    @staticmethod
    def of(accuracy: Accuracy, max_drop: float, exact: bool) -> AccuracyEntry:
        """From an evaluation against the original; `exact` where only exact and guarded rewrites
        were made, which the tier "exact" takes."""
        metric, original, optimized = _metric(accuracy)
        tier = accuracy.tier
        if tier == "exact" and not exact:
            tier = "near-lossless"
        return AccuracyEntry(
            metric,
            _drop(accuracy),
            max_drop,
            accuracy.verdict(max_drop),
            tier if exact or accuracy.metric is None else "",
            original,
            optimized,
            _further(accuracy),
            accuracy.sequences,
            accuracy.tokens,
            accuracy.reason,
        )


@dataclass(frozen=True)
class Ceiling:
    """The most that `what` can gain: its `share` of the measured time, and 1 / (1 - share)
    (Amdahl).
    """

    what: str
    share: Number
    speedup: Number
    note: str = ""


@dataclass(frozen=True)
class SiteEntry:
    """One attention of the model: its facts, what was applied to it, and what was not and why.

    `facts` holds heads, kv_heads, head_dim, v_dim, scale, mask, position, exactness, and the shares
    of FLOPs and time where known. Where `raised` is False, `reason` and `node` say what was not
    understood.
    """

    id: str
    module: str
    source: str
    raised: bool
    reason: str = ""
    node: str = ""
    help: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    applied: tuple[str, ...] = ()
    refused: tuple[Outcome, ...] = ()


@dataclass(frozen=True)
class SublayerEntry:
    """One residual branch of the model, what was applied to it, and what was not and why."""

    id: str
    kind: str
    block: int
    module: str
    applied: tuple[str, ...] = ()
    refused: tuple[Outcome, ...] = ()


@dataclass(frozen=True)
class Sensitivity:
    """The drop that one rewrite costs at one target alone, measured on held-out data."""

    rewrite: str
    target: str
    drop: Number | None = None
    reason: str = ""


@dataclass(frozen=True)
class Trial:
    """One plan that the search tried. `front`: no other plan tried is both faster and closer."""

    number: int
    plan: str
    feasible: bool
    speed: Number | None = None
    drop: Number | None = None
    tier: str = ""
    front: bool = False
    chosen: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Refit:
    """The relative held-out error of one output before and after; reverted unless accepted."""

    target: str
    before: float
    after: float
    accepted: bool


@dataclass(frozen=True)
class HealingEntry:
    """What training `numbers` weights of `sites` sites on `tokens` did (`rank` 0: whole weights).
    The held-out loss decided what was kept of it; `reason` says why it is not in the result.
    `metric` is of the evaluation data, by which plans win: of the original, before and after."""

    accepted: bool
    rewrite: str
    reason: str = ""
    loss_before: Number | None = None
    loss_after: Number | None = None
    metric: str = ""
    original: Number | None = None
    before: Number | None = None
    after: Number | None = None
    drop_before: Number | None = None
    drop_after: Number | None = None
    tokens: int = 0
    numbers: int = 0
    sites: int = 0
    rank: int = 0
    seconds: Number | None = None


@dataclass(frozen=True)
class Relaxation:
    """The smallest change of the demands that would be met, in words and numbers."""

    words: str
    budget: float | None = None
    max_drop: float | None = None
    kv_bytes: float | None = None


@dataclass(frozen=True)
class Result:
    """What one optimization was asked for, what it found, and what that cost.

    `budget` is a ratio over the fastest baseline (2.0 is twice as fast), or None for "as fast as it
    gets"; `max_drop` a fraction. `environment` is where it was measured, `data` what on, in words.
    `decoding` is what decoding costs "before" and "after", empty where there is no cache; `cache`
    what was found under a budget of its bytes.
    """

    derived: ClassVar[tuple[str, ...]] = ("schema", "exit_code")
    model: str
    workload: Workload
    target: str
    budget: float | None
    max_drop: float
    met: bool
    plan: Plan
    environment: Mapping[str, Any] = field(default_factory=dict)
    baselines: tuple[Timed, ...] = ()
    optimized: Timed | None = None
    speed: Speed | None = None
    accuracy: AccuracyEntry | None = None
    ceiling: Ceiling | None = None
    ceilings: tuple[Ceiling, ...] = ()
    sites: tuple[SiteEntry, ...] = ()
    sublayers: tuple[SublayerEntry, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    sensitivities: tuple[Sensitivity, ...] = ()
    trials: tuple[Trial, ...] = ()
    relaxation: Relaxation | None = None
    refits: tuple[Refit, ...] = ()
    healing: HealingEntry | None = None
    diagnostics: Diagnosis | None = None
    decoding: Mapping[str, Decoding] = field(default_factory=dict)
    cache: CacheEntry | None = None
    warnings: tuple[str, ...] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    seed: int = 0
    seconds: float = 0.0
    model_sha256: str = ""
    device: str = "cpu"
    folder: str | None = field(default=None, repr=False, compare=False)

    @property
    def schema(self) -> int:
        """The version of the form of report.json."""
        return SCHEMA

    @property
    def exit_code(self) -> int:
        """0 when budget and bound are met, else 2."""
        return 0 if self.met else 2

    def as_json(self) -> dict[str, Any]:
        """The result as a JSON object; `Result.from_json` reads it back equal."""
        data: dict[str, Any] = record.dump(self)
        return {"schema": data.pop("schema"), **data}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Result:
        """Read a result. Raises `Problem` A504 on another schema or a field that does not fit."""
        if data.get("schema") != SCHEMA:
            raise Problem(
                "A504",
                f"report schema {data.get('schema')!r} is not known",
                help=f"this version reads schema {SCHEMA}; run optimize again",
            )
        return record.read(Result, dict(data))

    def files(self) -> dict[str, bytes]:
        """The reports by file name: report.json, report.md and report.html."""
        from attnopt.autotune.report import markdown
        from attnopt.autotune.report_html import page

        text = json.dumps(self.as_json(), indent=1, ensure_ascii=False, allow_nan=False)
        return {
            "report.json": text.encode() + b"\n",
            "report.md": markdown(self).encode(),
            "report.html": page(self).encode(),
        }

    def evidence(self) -> dict[str, Any]:
        """What a plan file says beside its steps: what was measured, where, and with which
        versions.
        """
        return {
            "model": self.model,
            "model_sha256": self.model_sha256,
            "workload": record.dump(self.workload),
            "target": self.target,
            "device": self.device,
            "max_drop": self.max_drop,
            "speed": record.dump(self.speed),
            "accuracy": record.dump(self.accuracy),
            "environment": record.dump(self.environment),
            "data": record.dump(self.data),
            "seed": self.seed,
        }


def _metric(accuracy: Accuracy) -> tuple[str, Number | None, Number | None]:
    if accuracy.perplexity is not None:
        return "perplexity", _number(accuracy.perplexity_original), _number(accuracy.perplexity)
    if accuracy.metric is not None:
        return accuracy.task, _number(accuracy.metric_original), _number(accuracy.metric)
    low = accuracy.cosine_lower
    cosine = None if accuracy.cosine is None else Number(accuracy.cosine, "measured", low)
    return "cosine similarity", Number(1.0, "measured"), cosine


def _drop(accuracy: Accuracy) -> Number:
    if not accuracy.bounded:
        return Number(accuracy.drop, "measured")
    note = "low and high are one-sided 95% bounds"
    low, high = accuracy.drop_lower, accuracy.drop_upper
    return Number(accuracy.drop, "measured", low, high, note=note)


def _number(value: float | None, **more: Any) -> Number | None:
    return None if value is None else Number(value, "measured", **more)


def _further(accuracy: Accuracy) -> dict[str, Number]:
    found = {
        "KL divergence": _number(accuracy.kl, high=accuracy.kl_upper, unit="nats/token"),
        "top-1 agreement": _number(accuracy.top1, low=accuracy.top1_lower),
    }
    return {name: number for name, number in found.items() if number is not None}
