"""Progress is shown after its patience on a terminal; elsewhere it is a line now and then."""

from __future__ import annotations

import io
import logging
import time

import pytest
from rich.console import Console

from attnopt.cli import progress
from attnopt.cli.progress import Progress


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal that keeps what was drawn on it."""
    kept = io.StringIO()
    made = Console(file=kept, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "console", lambda *, stderr: made)
    return kept


def _until(shown: Progress, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not shown.shown:
        time.sleep(0.01)
    return shown.shown


def test_a_long_job_shows_what_is_done_and_the_time_left(screen: io.StringIO) -> None:
    with Progress("searching", total=4, patience=0.01) as step:
        step("layer [3]")
        assert _until(step)
        step("layer 4")
        time.sleep(0.2)
    assert not step.shown
    drawn = screen.getvalue()
    assert "searching: layer 4" in drawn and "50%" in drawn and "left" in drawn


def test_fractions_set_the_bar(screen: io.StringIO) -> None:
    with Progress("profiling", patience=0.01) as step:
        step("timing", 0.25)
        assert _until(step)
        step("timing", 1.7)
        time.sleep(0.2)
    assert "100%" in screen.getvalue() and "170%" not in screen.getvalue()


def test_a_short_job_draws_nothing(screen: io.StringIO) -> None:
    with Progress("reading", total=2, patience=60.0) as step:
        step("one")
        step("two")
    assert screen.getvalue() == ""


def test_a_quiet_job_draws_nothing(screen: io.StringIO) -> None:
    with Progress("reading", total=2, quiet=True, patience=0.0) as step:
        step("one", 0.5)
        time.sleep(0.1)
    assert screen.getvalue() == "" and not step.active


def test_without_a_terminal_nothing_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("reading", total=2, patience=0.0) as step:
        step("one")
        time.sleep(0.1)
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "") and not step.active


def test_without_a_terminal_a_line_is_told_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Progress("optimize") as step:
        for later, what in ((0, "tracing"), (16, "timing"), (20, "searching"), (31, "building")):
            now = 100.0 + later
            step(what, 0.4)
    with Progress("optimize", quiet=True) as step:
        now += 60
        step("timing", 0.4)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "optimize: timing (after 16 s)\noptimize: building (after 31 s)\n"


def test_an_error_passes_and_the_bar_is_gone(screen: io.StringIO) -> None:
    with pytest.raises(KeyboardInterrupt), Progress("searching", patience=0.01) as step:
        assert _until(step)
        raise KeyboardInterrupt
    assert not step.shown


def test_what_is_logged_is_told_without_a_terminal_too(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("attnopt")
    with Progress("optimize"):
        logger.info("ceiling: at most %.2fx", 1.7)
    logger.info("afterwards")
    with Progress("optimize", quiet=True):
        logger.info("with --json")
    told = capsys.readouterr()
    assert told.err.strip() == "ceiling: at most 1.70x" and told.out == ""
