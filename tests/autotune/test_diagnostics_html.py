"""What the diagnostics show: everything measured, nothing loaded, no text that becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from attnopt.autotune import diagnose as runs
from attnopt.autotune.curves import energy
from attnopt.autotune.data import Data
from attnopt.autotune.diagnostic_figures import SHARE, figures
from attnopt.autotune.diagnostics_html import between
from attnopt.autotune.diagnostics_page import page
from attnopt.autotune.heat_grid import grid, matrix
from attnopt.autotune.report_html import page as report
from attnopt.autotune.request import Request, Wanted
from attnopt.compiler.diagnostics.diagnose import diagnose
from attnopt.compiler.diagnostics.diagnosis import Diagnosis
from attnopt.compiler.program import Batch
from tests.autotune.results import NASTY, full
from tests.decoder import decoder


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    """Of the two-block decoder: four query heads, two key/value heads."""
    program = decoder(2, 24)
    return diagnose(program, [program.example])


def test_every_figure_that_was_measured_is_drawn(found: Diagnosis) -> None:
    text = page("decoder", found)
    for figure in figures(found):
        drawn = f"<h3>{figure.heading.replace(chr(39), '&#x27;')}</h3>" in text
        assert drawn is (figure.name in found.sites[0].per_head), figure.name
    for heading in ("Similarity of heads", "Spectra", "Influence of sublayers"):
        assert f"<h3>{heading}</h3>" in text
    assert text.count('name="similarity"') == 2 and text.count('open=""') == 1
    measured = set(found.sites[0].per_head) - {f.name for f in figures(found)}
    assert all(re.match(r"local_|entropy$|.*rank99$|vo_weights_rank$", name) for name in measured)


def test_the_page_loads_nothing_and_keeps_text_as_text(found: Diagnosis) -> None:
    site = replace(found.sites[0], id=NASTY, module=NASTY, missing={"qk_weights": NASTY})
    text = page(NASTY, replace(found, sites=(site,), notes=(NASTY,)))
    assert "<script" not in text and "default-src 'none'" in text.replace("&#x27;", "'")
    assert not re.search(r"\b(src|href)=|url\(|@import", text)
    assert text.count("&lt;script&gt;") >= 5


def test_the_report_holds_them_where_they_were_measured(found: Diagnosis) -> None:
    assert "<h2>Diagnostics</h2>" not in report(replace(full(), diagnostics=None))
    assert "<h2>Diagnostics</h2>" in report(replace(full(), diagnostics=found))
    left = report(replace(full(), diagnostics=Diagnosis(skipped="it takes too long")))
    assert "Not measured: it takes too long." in left and "<h3>Spectra</h3>" not in left


def test_many_heads_and_layers_stay_inside(found: Diagnosis) -> None:
    rows = [(f"s{at}", [0.5] * 128) for at in range(48)]
    for drawn in (grid(rows, "t", SHARE), matrix([[0.5] * 128] * 128, "t", SHARE)):
        boxes = re.findall(r'<rect[^>]* x="([\d.]+)"[^>]* width="([\d.]+)"', drawn)
        assert max(float(x) + float(width) for x, width in boxes) <= 760
        assert "nan" not in drawn
    assert 'height="-' not in matrix([[1.0]], "t", SHARE)
    assert "nan" not in grid([("s0", [float("nan")])], "t", SHARE).replace('">nan', "").replace(
        ": nan", ""
    )


def test_energy_ends_at_the_whole() -> None:
    drawn = energy([("s0", [0.8, 0.6]), ("s1", [1.0])], "t")
    ends = [line.split()[-1] for line in re.findall(r'points="([^"]+)"', drawn)]
    assert ends == ["630.0,14.0", "345.0,14.0"]


def test_similarity_between_different_heads() -> None:
    assert between([[1.0, 0.2], [0.4, 1.0]]) == pytest.approx(0.3)
    assert between([[1.0]]) is None


def _data(real: bool = True) -> Data:
    batch = decoder(2, 24).example
    return Data((batch,), (batch,), real=real)


@pytest.mark.parametrize(
    ("request_", "real", "measured"),
    [
        (Request(timeout=6000.0), True, True),
        (Request(effort="none"), True, False),
        (Request(timeout=6000.0), False, False),
    ],
)
def test_a_run_is_diagnosed_on_real_data_only(
    request_: Request, real: bool, measured: bool
) -> None:
    found = runs.within(decoder(2, 24), _data(real), request_)
    assert (found is not None) is measured
    if found is not None:
        assert len(found.sites) == 2 and not found.skipped


def test_what_would_take_more_than_its_share_is_skipped_with_the_reason() -> None:
    found = runs.within(decoder(2, 24), _data(), Request(timeout=1e-6))
    assert found is not None and not found.sites
    assert "a twentieth of the run's time" in found.skipped


def test_a_batch_for_every_role_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Batch((torch.full((1, 3), at),)) for at in range(3)]
    made = Data(tuple(parts[2:]), (parts[0],), (parts[1],), (parts[2],), real=True)
    monkeypatch.setattr(runs, "gather", lambda *more: made)
    loaded = cast(Any, SimpleNamespace(weights="real"))
    assert runs.calibration(loaded, Wanted(inputs=Path("x")), "") == tuple(parts)


def test_diagnostics_that_fail_do_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **more: Any) -> None:
        raise IndexError("index 1 is out of bounds\nand more")

    monkeypatch.setattr(runs, "diagnose", fails)
    found = runs.within(decoder(2, 24), _data(), Request())
    assert found is not None and not found.sites
    assert found.skipped == "they failed: IndexError: index 1 is out of bounds"
