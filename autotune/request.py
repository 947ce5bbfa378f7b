"""What a run is asked for, checked before any work starts; needs no torch, so that mistakes are
answered at once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from attnopt.compiler.errors import Problem

Effort = Literal["none", "quick", "full"]
EFFORTS: dict[str, tuple[int, float]] = {  # trials, default seconds
    "none": (0, 0.0),
    "quick": (24, 600.0),
    "full": (120, 3600.0),
}


@dataclass(frozen=True)
class Wanted:
    """What the user said about data; None where nothing was said.

    `batch` and `length` are of one timed call. Raises `Problem` A405 for sizes beside tensors
    alone, which have their own.
    """

    text: Path | None = None
    calibration: Path | None = None
    inputs: Path | None = None
    batch: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        sizes = [name for name in ("batch", "length") if getattr(self, name) is not None]
        if self.inputs is not None and self.text is None and sizes:
            raise Problem(
                "A405", f"--{sizes[0]} cannot be used with --inputs",
                where=str(self.inputs), why="tensors are timed at the size they were saved in",
                help="save batches of the size you want, or give text with --text FILE",
            )  # fmt: skip


@dataclass(frozen=True)
class HealBudget:
    """How long to heal: `seconds`, or `tokens` where these are given, and the `rank` of what is
    trained (0: whole weights). Raises `Problem` A410."""

    seconds: float = 0.0
    tokens: int = 0
    rank: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.seconds) or self.seconds + self.tokens <= 0:
            raise Problem(
                "A410", "a healing has to take more than 0 seconds or tokens",
                help="for example --heal 5m, or --heal 200ktok",
            )  # fmt: skip
        if self.rank < 0:
            raise Problem(
                "A410", f"a healing cannot have the rank {self.rank}",
                help="0 trains whole weights; 8 or 32 is usual for changes of a rank",
            )  # fmt: skip


@dataclass(frozen=True)
class Request:
    """The demands on a run.

    `budget` is a factor over the fastest baseline, `max_drop` a fraction, `timeout` seconds;
    `kv_bytes` the share of a decoder's cache that may be kept, where that is what is asked for.
    `target` is what speeds are of, and `device` where the model runs, as torch calls it; left out,
    each is the other where that is here, and the CPU where neither is said.
    """

    budget: float | None = None
    max_drop: float = 0.01
    target: str | None = None
    effort: Effort = "quick"
    trials: int | None = None
    timeout: float | None = None
    out: Path | None = None
    seed: int = 0
    resume: bool = False
    metric: str | None = None
    data: Wanted = field(default_factory=Wanted)
    command: str = ""
    heal: HealBudget | None = None
    kv_bytes: float | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.heal is not None and not isinstance(self.heal, HealBudget):
            raise Problem(
                "A410", f"{self.heal!r} does not say how long to heal",
                help='give a text such as "5m" or "200ktok", or a HealBudget',
            )  # fmt: skip
        if self.budget is not None and not (math.isfinite(self.budget) and self.budget > 0):
            raise Problem(
                "A410", f"a budget of {self.budget:g}x cannot be met by any model",
                help="a budget is how many times as fast the result has to be, e.g. --budget 2x",
            )  # fmt: skip
        if not 0 <= self.max_drop < 1:
            raise Problem(
                "A410", f"a largest drop of {self.max_drop:g} is not between 0 and 1",
                help="give a percentage, e.g. --max-drop 1%, or 0 for exact rewrites only",
            )  # fmt: skip
        self._check_kv_bytes()
        if self.effort not in EFFORTS:
            raise Problem(
                "A410", f"unknown effort `{self.effort}`", help=f"known: {', '.join(EFFORTS)}"
            )
        for name in ("trials", "timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise Problem("A410", f"--{name} has to be more than 0, not {value:g}")
        if not 0 <= self.seed < 2**32:
            raise Problem("A410", f"--seed has to lie between 0 and 2**32 - 1, not {self.seed}")
        if self.resume and self.out is None:
            raise Problem(
                "A410", "--resume needs the folder of the interrupted run", help="give --out DIR"
            )

    def _check_kv_bytes(self) -> None:
        if self.kv_bytes is None:
            return
        example = "give the share of the cache to keep, e.g. --kv-bytes 50%"
        if not 0 < self.kv_bytes < 1:
            what = f"{self.kv_bytes:.4g} is no share of a cache to keep"
            raise Problem("A410", what, why="it lies between 0 and 1 (100%)", help=example)
        if self.budget is not None:
            raise Problem(
                "A410", "--kv-bytes and --budget cannot be asked for at once",
                why="one looks for the least loss at a size, the other for speed of whole "
                "sequences", help="give one of them",
            )  # fmt: skip
        if not self.searches:
            said = "--max-drop 0" if self.max_drop <= 0 else f"--effort {self.effort}"
            raise Problem(
                "A410", f"--kv-bytes finds nothing with {said}",
                why="only approximate rewrites keep less of a cache, and none would be tried",
                help="allow some loss, e.g. --max-drop 1%, and an effort of quick or full",
            )  # fmt: skip

    @property
    def most_trials(self) -> int:
        """How many plans the search may try."""
        return EFFORTS[self.effort][0] if self.trials is None else self.trials

    @property
    def seconds(self) -> float:
        """How long the search may take."""
        return EFFORTS[self.effort][1] if self.timeout is None else self.timeout

    @property
    def searches(self) -> bool:
        """Whether anything approximate may be tried."""
        return self.max_drop > 0 and self.effort != "none"


def parse_budget(text: str) -> float:
    """`2x`, `1.5` or `150%` as a factor.

    Raises `Problem` A410.
    """
    match = re.fullmatch(r"\s*([-+]?\d*\.?\d+)\s*(x|%)?\s*", text, re.IGNORECASE)
    if match is None:
        raise Problem("A410", f"cannot read the budget `{text}`", help="for example --budget 2x")
    return float(match.group(1)) / (100.0 if match.group(2) == "%" else 1.0)


def parse_share(text: str) -> float:
    """`1%` or `0.01` as a fraction.

    Raises `Problem` A410.
    """
    match = re.fullmatch(r"\s*([-+]?\d*\.?\d+)\s*(%)?\s*", text)
    if match is None:
        raise Problem("A410", f"cannot read the share `{text}`", help="for example --max-drop 1%")
    return float(match.group(1)) / (100.0 if match.group(2) else 1.0)


def parse_kv_bytes(text: str) -> float:
    """`50%` or `0.5` as a share of the cache.

    Raises `Problem` A410.
    """
    try:
        return parse_share(text)
    except Problem as problem:
        what = f"cannot read the share of the cache `{text}`"
        raise Problem("A410", what, help="for example --kv-bytes 50%, or 0.5") from problem


def parse_coverage(text: str) -> float:
    """`100%` or `0.9` as a fraction from 0 to 1.

    Raises `Problem` A410.
    """
    share = parse_share(text)
    if not 0.0 <= share <= 1.0:
        raise Problem("A410", f"{text} is no share of all attentions", help="at most 100%")
    return share


def parse_healing(text: str, rank: int = 0) -> HealBudget:
    """`90s`, `5m`, `200ktok` or `1.5Mtok` as a `HealBudget`.

    Raises `Problem` A410.
    """
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*(k|M)?tok\s*", text)
    if match is not None:
        times = {"k": 1_000, "M": 1_000_000}.get(match.group(2) or "", 1)
        return HealBudget(tokens=round(float(match.group(1)) * times), rank=rank)
    if re.fullmatch(r"\s*(\d*\.?\d+)\s*(s|m|h)\s*", text) is None:
        raise Problem(
            "A410", f"cannot read how long to heal, `{text}`",
            help="a time such as --heal 5m, or tokens such as --heal 200ktok",
        )  # fmt: skip
    return HealBudget(seconds=parse_seconds(text), rank=rank)


def parse_seconds(text: str) -> float:
    """`90`, `90s`, `10m` or `1.5h` in seconds.

    Raises `Problem` A410.
    """
    match = re.fullmatch(r"\s*(\d*\.?\d+)\s*(s|m|h)?\s*", text)
    if match is None:
        raise Problem("A410", f"cannot read the time `{text}`", help="for example --timeout 10m")
    return float(match.group(1)) * {"s": 1.0, "m": 60.0, "h": 3600.0}[match.group(2) or "s"]
