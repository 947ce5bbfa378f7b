"""`Progress`: a bar with the time left for whatever takes longer than two seconds.

It draws on stderr. Where that is no terminal (a log of CI), what is done next is a line there, at
most every quarter of a minute; when it is told to be quiet (`--json`), nothing is. What attnopt
logs while the work goes on is printed on stderr above the bar, on a terminal or not.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

from attnopt.cli.draw import console

PATIENCE = 2.0
BETWEEN_LINES = 15.0  # seconds, where there is no terminal


class _Log(logging.Handler):
    """Prints what is logged, above the bar where one is drawn."""

    def __init__(self, bar: Bar) -> None:
        super().__init__(logging.INFO)
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        self._bar.console.print(record.getMessage(), style="dim", markup=False, highlight=False)


class Progress:
    """Progress of one piece of work, to be passed on as a callback.

    Calling it says what is being done now: `progress("layer 3")` counts one more of `total` steps,
    `progress("layer 3", 0.4)` says which fraction is done. Without a total or a fraction it shows
    the time taken instead of the time left.
    """

    def __init__(
        self,
        what: str,
        total: float | None = None,
        *,
        quiet: bool = False,
        patience: float = PATIENCE,
    ) -> None:
        target = console(stderr=True)
        self.active = target.is_terminal and not quiet
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=target,
            transient=True,
        )
        self._what, self._fraction = what, False
        self._lines = not quiet and not target.is_terminal
        self._begun = self._told = time.monotonic()
        self._task = self._bar.add_task(what, total=total)
        self._timer = threading.Timer(patience, self._bar.start)
        self._timer.daemon = True
        self._log = None if quiet else _Log(self._bar)

    @property
    def shown(self) -> bool:
        """Whether the bar is on the screen now."""
        return bool(self._bar.live.is_started)

    def __enter__(self) -> Progress:
        if self.active:
            self._timer.start()
        if self._log is not None:
            logger = logging.getLogger("attnopt")
            logger.setLevel(logging.INFO)
            logger.addHandler(self._log)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._log is not None:
            logging.getLogger("attnopt").removeHandler(self._log)
        if not self.active:
            return
        self._timer.cancel()
        self._timer.join()  # a bar that started in the meantime is stopped below
        self._bar.stop()

    def __call__(self, message: str, fraction: float | None = None) -> None:
        """One more step, or this fraction of the whole, is done."""
        said = f"{self._what}: {message}" if message else self._what
        if self._lines:
            self._line(said)
        if not self.active:
            return
        if fraction is None:
            self._bar.update(self._task, description=said, advance=0 if self._fraction else 1)
            return
        self._fraction = True
        done = min(1.0, max(0.0, fraction))
        self._bar.update(self._task, description=said, total=1.0, completed=done)

    def _line(self, said: str) -> None:
        """A line of what is being done, where the last one was long ago."""
        now = time.monotonic()
        if now - self._told >= BETWEEN_LINES:
            self._told = now
            after = f"{said} (after {now - self._begun:.0f} s)"
            self._bar.console.print(after, markup=False, highlight=False)
