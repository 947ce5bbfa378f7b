"""What the reports say, that they ask nothing of the network, and that no text becomes markup."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from attnopt.autotune import wording as say
from attnopt.autotune.charts import Bar, Point, bars, heatmap, interval, scatter
from attnopt.autotune.markup import Markup, join, tag
from attnopt.autotune.report import markdown
from attnopt.autotune.report_html import page
from attnopt.autotune.result import Number, Result, Speed
from attnopt.compiler.decode.phase_cost import Decoding, Phase, SitePhases
from attnopt.compiler.plan import Outcome
from tests.autotune.results import NASTY, full, least

SECTIONS = (
    "Speed",
    "Accuracy",
    "What was rewritten",
    "What was not, and why",
    "Ceiling",
    "Decoding",
    "Sensitivities",
    "Plans",
    "Healing",
    "Warnings",
    "Environment, and how to reproduce",
)
_VOID = {"meta"}


class _Page(HTMLParser):
    """Tags, attributes and headings of a page; fails on a tag that is closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID and tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_is_there(name: str) -> None:
    headings = [text for where, text in _Page(page(full())).texts if where == "h2"]
    assert any(heading.startswith(name) for heading in headings)
    assert f"\n## {name}" in markdown(full())


def test_the_page_loads_nothing() -> None:
    text = page(full(NASTY))
    seen = _Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(seen.tags)
    loads = [pair for pair in seen.attributes if pair[0] in ("src", "href", "action", "data")]
    assert loads == []
    assert not any(name.startswith("on") for name, _ in seen.attributes)
    style = "".join(data for where, data in seen.texts if where == "style")
    assert style and not re.search(r"url\(|@import|https?:", style)
    assert "default-src 'none'" in dict(seen.attributes)["content"] or "default-src 'none'" in text


def test_the_users_text_is_shown_and_never_markup() -> None:
    seen = _Page(page(full(NASTY)))
    assert "script" not in seen.tags
    assert sum(NASTY in data for _, data in seen.texts) >= 8
    assert "<script>" not in markdown(full(NASTY)).replace("`", "")[:200]
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", markdown(full(NASTY)), flags=re.S)
    assert "<script>" not in outside


def test_markdown_tables_keep_their_columns() -> None:
    lines = markdown(full(NASTY)).splitlines()
    heads = [at for at, line in enumerate(lines) if line.startswith("| ---")]
    assert len(heads) >= 8
    for at in heads:
        columns = lines[at].count("|")
        for line in lines[at + 1 :]:
            if not line.startswith("|"):
                break
            assert len(re.findall(r"(?<!\\)\|", line)) == columns, line


def test_a_result_with_nothing_in_it_still_makes_a_page() -> None:
    seen = _Page(page(least()))
    assert "svg" not in seen.tags and "table" in seen.tags
    assert "## Accuracy\n\nNot measured." in markdown(least())


def test_the_page_says_the_figures() -> None:
    said = " ".join(data for _, data in _Page(page(full())).texts)
    for text in (
        "Budget not met: 1.58× over torch.compile, 0.42% drop of perplexity (1% allowed)",
        "1.78× (1.73× to 1.83×)",
        "412 ms (400 ms to 424 ms)",
        "The smallest relaxation that would do:",
        "modeling_llama.py:257",
        "6 of 7 attentions understood",
        "9 (chosen)",
        "2.05 kB",
        "8e+06 FLOP, 2.5 MB: 3.2 FLOP/B",
        "0.034",
    ):
        assert text in said, text
    assert "Budget met" in page(full(met=True))
    assert "smallest relaxation" not in page(full(met=True))


def test_estimates_are_called_estimates() -> None:
    guess = Number(2.5, "estimated", note="roofline")
    result = full()
    told = page(
        type(result)(**{**vars(result), "speed": Speed({"eager": guess}, "eager", "faster")})
    )
    assert "estimated, roofline" in told and "2.50× (estimated)" in told
    assert say.times(guess) == "2.50× (estimated)"


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0%"), (0.01, "1%"), (0.0042, "0.42%"), (0.35, "35%"), (0.00042, "0.042%"),
     (2e-6, "2e-04%"), (-0.004, "-0.4%"), (float("inf"), "inf"), (1.0, "100%")],
)  # fmt: skip
def test_shares_in_words(value: float, said: str) -> None:
    assert say.share(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(1234.5, "1234 s"), (59.7, "59.7 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 µs"), (1.5, "1.5 s")],
)
def test_durations_in_words(value: float, said: str) -> None:
    assert say.duration(value) == said


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["*"], ""),
        (["s0", "s1", "s2", "s5"], "on s0..s2, s5"),
        (["b1.mlp", "b2.mlp", "b3.attention"], "on b1.mlp..b2.mlp, b3.attention"),
        (["whole"], "on whole"),
    ],
)
def test_targets_in_short(names: list[str], said: str) -> None:
    assert say.targets(names) == said


def test_refusals_are_told_once_with_all_their_targets() -> None:
    def miss(target: str, reason: str) -> Outcome:
        return Outcome("p{}", target, "exact", False, reason)

    told = say.refusals([miss("s0", "a"), miss("s1", "b"), miss("s2", "a"),
                         Outcome("p{}", "s3", "exact", True)])  # fmt: skip
    assert [(outcome.reason, where) for outcome, where in told] == [
        ("a", ["s0", "s2"]),
        ("b", ["s1"]),
    ]


def test_markup_escapes_all_but_markup() -> None:
    assert tag("p", NASTY, title=NASTY).count("<") == 2
    assert join(["<", Markup("<b>"), None]) == "&lt;<b>"


def _numbers(svg: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf'\b{name}="(-?[\d.]+)"', svg)]


def test_a_longer_time_is_a_longer_bar_and_all_stays_inside() -> None:
    drawn = bars([Bar("a", 2.0, 1.9, 2.3, "2 s"), Bar("b", 1.0, 0.9, 1.1, "1 s")], "t")
    first, second = _numbers(drawn, "width")
    assert first == pytest.approx(2 * second, rel=0.01)
    assert max(_numbers(drawn, "x2")) < 760


def test_charts_stand_extreme_values() -> None:
    inf = float("inf")
    shown = [
        interval(Bar("d", 0.0, -inf, inf, "0%", "pass"), 0.0, "t", say.share),
        heatmap({"r": {"0": (0.0, "tip"), "1": (inf, "tip")}}, ["0", "1"], "t", say.share),
        scatter([Point(1.0, 0.0, "only")], "t", ("x", "y"), (str, str), (None, 0.0)),
        scatter(
            [Point(1.0, inf, "", "miss"), Point(1.2, 0.1, "")], "t", ("", ""), (str, str), (2, 0)
        ),
    ]  # fmt: skip
    for drawn in shown:
        assert "nan" not in drawn and '="inf' not in drawn
        _Page(drawn)


def test_thirty_two_layers_fit_the_width() -> None:
    columns = [str(at) for at in range(32)]
    drawn = heatmap({"r": dict.fromkeys(columns, (0.01, "tip"))}, columns, "t", say.share)
    boxes = re.findall(r'<rect[^>]* x="([\d.]+)"[^>]* width="([\d.]+)"', drawn)
    assert len(boxes) == 32
    assert max(float(x) + float(width) for x, width in boxes) <= 760


def decoded(before: Sequence[int], after: Sequence[int]) -> Result:
    """A run on attentions whose steps read these numbers of kB."""
    told = {
        name: Decoding(
            1, 8, 8,
            tuple(
                SitePhases(f"s{at}", Phase(5e6, 1e6), Phase(2e6, 1e3 * size), 16 * size, 128 * size)
                for at, size in enumerate(sizes)
            ),
            10, 20,
        )
        for name, sizes in (("before", before), ("after", after))
    }  # fmt: skip
    return replace(full(), decoding=told)


def test_each_attention_has_its_phases() -> None:
    """Attentions alike share a row; what changed has one before and one after."""
    result = decoded((8, 8, 8, 8), (8, 8, 4, 2))
    rows = say.phase_rows(result)
    assert [row[:3] for row in rows] == [
        ("s0..s1", "before and after", "128 B"),
        ("s2", "before", "128 B"), ("s2", "after", "64 B"),
        ("s3", "before", "128 B"), ("s3", "after", "32 B"),
    ]  # fmt: skip
    assert rows[2][3:] == ("5e+06", "1 MB", "5", "2e+06", "4 kB", "500")
    assert "| s2 | after | 64 B | 5e+06 | 1 MB | 5 | 2e+06 | 4 kB | 500 |" in markdown(result)
    cells = [text for _, text in _Page(page(result)).texts]
    assert {"s0..s1", "before and after", "4 kB", "500"} <= set(cells)
    assert "<details><summary>all 5" not in page(result)
    assert say.phase_rows(replace(result, decoding={})) == []


def test_many_attentions_are_folded() -> None:
    result = decoded([8] * 40, list(range(1, 41)))
    assert len(say.phase_rows(result)) == 2 * 39 + 1
    assert "<summary>all 79 rows of attentions</summary>" in page(result)
    told = markdown(result)
    assert "55 more rows are in report.html." in told
    assert "| s11 | after |" in told and "| s30 | after |" not in told
