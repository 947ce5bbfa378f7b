"""What a rewrite cost: the candidate against the original on held-out data, with bounds.

Causal language models: perplexity (mean negative log-likelihood per real token, exponentiated),
KL(original || candidate) in nats per token and top-1 agreement; the drop is the relative rise of
perplexity. All others: the cosine similarity of the outputs of each sample, drop = 1 - cosine.
A metric of the user's own: the relative fall. Bounds are 95% paired bootstraps over the sequences.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnopt.autotune.place import facing
from attnopt.autotune.statistics import Interval, bootstrap, mean_of
from attnopt.autotune.teacher import Model, Scores, Teacher
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Batch

Verdict = Literal["pass", "fail", "inconclusive"]
Tier = Literal["exact", "near-lossless", "fast", "experimental"]
Metric = Callable[[Model], float]

LEAST_SEQUENCES = 8  # with fewer independent units a bound means little
LIMITS: dict[Tier, tuple[float, float, float]] = {  # drop, KL in nats per token, top-1 agreement
    "near-lossless": (0.01, 0.01, 0.98),
    "fast": (0.03, 0.03, 0.95),
}
_EXACT_KL = 1e-5


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a candidate against the original.

    `drop` is a fraction (0.01 is 1%), negative where the candidate is the better one; `drop_lower`
    and `drop_upper` are its one-sided 95% bounds, equal to it where the metric is a figure without
    samples (`bounded` is then False). `rounding` is the drop that arithmetic in the outputs' dtype
    may make without any change of the function. `kl` is in nats per token. Where `feasible` is
    False the `reason` says why, and no figure of this value may be compared. `worst` is the largest
    change of a sequence, for better or worse.
    """

    task: str
    drop: float
    drop_lower: float
    drop_upper: float
    feasible: bool = True
    reason: str = ""
    bounded: bool = True
    rounding: float = 0.0
    worst: float = math.inf
    perplexity: float | None = None
    perplexity_original: float | None = None
    kl: float | None = None
    kl_upper: float | None = None
    top1: float | None = None
    top1_lower: float | None = None
    cosine: float | None = None
    cosine_lower: float | None = None
    metric: float | None = None
    metric_original: float | None = None
    sequences: int = 0
    tokens: int = 0
    per_sequence: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)
    evidence: str = "measured"

    def verdict(self, max_drop: float) -> Verdict:
        """Whether the drop stays within `max_drop` (a fraction).

        *pass* when the upper bound does, *fail* when the lower bound does not, else *inconclusive*:
        too little data for either. Where no sequence differs by more than `rounding`, nothing has
        changed, and it is a *pass* however few they are.
        """
        if not self.feasible:
            return "fail"
        if self.bounded and self.worst <= self.rounding:
            return "pass"
        allowed = max(max_drop, self.rounding)
        enough = not self.bounded or self.sequences >= LEAST_SEQUENCES
        if enough and self.drop_upper <= allowed:
            return "pass"
        return "fail" if enough and self.drop_lower > allowed else "inconclusive"

    @property
    def tier(self) -> Tier:
        """The strictest tier whose limits the bounds meet."""
        return tier(self)

    def as_json(self) -> dict[str, Any]:
        """The accuracy as a JSON object; numbers that are not finite become null."""
        facts = {key: _jsonable(value) for key, value in asdict(self).items() if value is not None}
        return {**facts, "tier": self.tier}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Accuracy:
        """Read `as_json` back; a null drop is read as infinitely bad."""
        known = {item.name for item in fields(Accuracy)}
        values = {key: value for key, value in data.items() if key in known}
        missing = {"drop": math.inf, "drop_lower": -math.inf, "drop_upper": math.inf}
        values |= {key: bad for key, bad in missing.items() if values.get(key) is None}
        values["worst"] = math.inf if values.get("worst") is None else values["worst"]
        values["per_sequence"] = {k: tuple(v) for k, v in values.get("per_sequence", {}).items()}
        return Accuracy(**values)


def tier(accuracy: Accuracy) -> Tier:
    """*exact*, *near-lossless* (1% perplexity, KL 0.01, top-1 98%), *fast* (3%, 0.03, 95%), less.

    The 95% bounds have to pass, not the means. Without KL and top-1 (other tasks) the drop decides.
    """
    if not accuracy.feasible:
        return "experimental"
    kl = accuracy.kl_upper if accuracy.kl_upper is not None else 0.0
    top1 = accuracy.top1_lower if accuracy.top1_lower is not None else 1.0
    if accuracy.verdict(0.0) == "pass" and kl <= max(_EXACT_KL, accuracy.rounding):
        return "exact"
    for name, (drop, most_kl, least_top1) in LIMITS.items():
        if accuracy.verdict(drop) == "pass" and kl <= most_kl and top1 >= least_top1:
            return name
    return "experimental"


def evaluate(
    original: Model | Teacher,
    candidate: Model,
    batches: Sequence[Batch],
    task: str,
    progress: Callable[[str, float], None] | None = None,
    *,
    metric: str | Metric | None = None,
    seed: int = 0,
) -> Accuracy:
    """Measure a candidate against the original on held-out batches.

    `task` "causal-lm" compares next-token predictions, any other the outputs; a `metric` (callable,
    or text `module:function`) replaces both and is called with the model. Pass a `Teacher` as the
    original when several candidates are compared: the original then runs once, on the batches that
    the teacher was made with (`batches` is not used). Raises `Problem` A402 when the original
    itself gives NaN, and A406 when there is nothing to measure on.
    """
    teacher = original if isinstance(original, Teacher) else Teacher(original, batches, task)
    if metric is not None:
        return _by_metric(teacher, candidate, metric)
    scores = teacher.score(candidate, progress)
    if scores.reason:
        return _infeasible(task, scores.reason, len(scores.tokens))
    return (_language if teacher.language else _similarity)(task, scores, seed)


def load_metric(text: str) -> Metric:
    """The function named by `module:function`. Raises `Problem` A407 when it cannot be found."""
    module, _, name = text.partition(":")
    help = "give --metric package.module:function, called with the model, larger is better"
    if not module or not name:
        raise Problem("A407", f"`{text}` does not name a metric", help=help)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        what = f"the metric `{text}` was not found"
        raise Problem("A407", what, why=str(error), help=help) from error
    if not callable(found):
        raise Problem("A407", f"the metric `{text}` is not a function", help=help)
    return found  # type: ignore[no-any-return]


def _language(task: str, scores: Scores, seed: int) -> Accuracy:
    """Perplexity, KL and top-1 agreement from sums per sequence."""
    columns = ("nll_original", "nll", "kl", "agree")
    table = np.stack([scores.tokens, *(scores.columns[name] for name in columns)], -1)

    def change(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        total = rows.sum(-2)
        return np.asarray(np.expm1((total[..., 2] - total[..., 1]) / total[..., 0]))

    def per_token(column: int) -> Interval:
        def mean(rows: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.asarray(rows[..., column].sum(-1) / rows[..., 0].sum(-1))

        return bootstrap(table, mean, seed=seed)

    drop, kl, top1 = bootstrap(table, change, seed=seed), per_token(3), per_token(4)
    total = table.sum(0)
    if not math.isfinite(drop.value):
        return _infeasible(task, "its loss is not finite", len(table))
    return Accuracy(
        task, drop.value, drop.below, drop.above,
        rounding=scores.rounding, worst=float(np.abs(change(table[:, None])).max()),
        perplexity=float(np.exp(total[2] / total[0])),
        perplexity_original=float(np.exp(total[1] / total[0])),
        kl=kl.value, kl_upper=kl.above, top1=top1.value, top1_lower=top1.below,
        sequences=len(table), tokens=int(total[0]), per_sequence=scores.as_tuples(),
    )  # fmt: skip


def _similarity(task: str, scores: Scores, seed: int) -> Accuracy:
    """The mean of the samples' cosine similarities; a sample's worst output counts."""
    drop = bootstrap(1.0 - scores.columns["cosine"], mean_of, seed=seed)
    return Accuracy(
        task, drop.value, drop.below, drop.above,
        rounding=scores.rounding, worst=1.0 - float(scores.columns["cosine"].min()),
        cosine=1.0 - drop.value, cosine_lower=1.0 - drop.above,
        sequences=len(scores.tokens), tokens=int(scores.tokens.sum()),
        per_sequence=scores.as_tuples(),
    )  # fmt: skip


def metric_of_original(teacher: Teacher, metric: str | Metric) -> float:
    """What the user's metric says of the model as given, asked once.

    Raises `Problem` A407 where it fails and A402 where no relative fall can be taken from it.
    """
    function, name = _named(metric)
    before = teacher.metric(name, lambda model: _number_of(function, name, model))
    if not math.isfinite(before) or before == 0.0:
        raise Problem(
            "A402",
            f"the metric `{name}` is {before} for the model as given",
            why="a relative fall needs a finite number that is not zero",
            help="give a metric that is larger the better the model is, such as a share of hits",
        )
    return before


def _by_metric(teacher: Teacher, candidate: Model, metric: str | Metric) -> Accuracy:
    before = metric_of_original(teacher, metric)
    function, name = _named(metric)
    after = _number_of(function, name, candidate)
    if not math.isfinite(after):
        return _infeasible(name, f"the metric is {after}")
    drop = (before - after) / abs(before)
    return Accuracy(
        name, drop, drop, drop, bounded=False, worst=abs(drop), metric=after, metric_original=before
    )


def _named(metric: str | Metric) -> tuple[Metric, str]:
    if isinstance(metric, str):
        return load_metric(metric), metric
    return metric, getattr(metric, "__name__", "metric")


def _number_of(function: Metric, name: str, model: Model) -> float:
    """What the user's metric says of a model. Raises `Problem` A407 where it fails."""
    try:
        return float(function(facing(model)))
    except Exception as error:  # it is the user's code: whatever it raises is told as its own
        raise Problem(
            "A407", f"the metric `{name}` failed", why=f"{type(error).__name__}: {error}",
            help="it is called with the model and has to return a number, larger is better",
        ) from error  # fmt: skip


def _infeasible(task: str, reason: str, sequences: int = 0) -> Accuracy:
    return Accuracy(
        task, math.inf, -math.inf, math.inf, feasible=False, reason=reason, sequences=sequences
    )


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_jsonable(item) for item in value]
    return value
