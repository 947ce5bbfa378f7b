"""What the GPU benchmark says without a GPU: estimates beside the bars, and no more than that."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnopt.codegen.target import known, target
from tests.tree import ROOT, benchmarks

benchmarks()

from benchmarks import gpu  # noqa: E402
from benchmarks.gpu_case import Bar  # noqa: E402
from benchmarks.gpu_cases import cases  # noqa: E402
from benchmarks.gpu_estimate import (  # noqa: E402
    Estimated,
    command,
    estimated_bars,
    page,
    shares,
)

H100 = target("h100")


def _found(name: str, bar: str) -> Estimated:
    (found,) = (
        one
        for case in cases()
        if name in case.name
        for one in estimated_bars(case, H100)
        if bar in one.bar.words
    )
    return found


def test_every_bar_of_every_line_is_told_and_none_is_said_to_be_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gpu.main(["--estimate", "h100"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "not measured" in said[0]
    bars = [line for line in said if line.startswith("    ")]
    assert len(bars) == sum(len(case.bars) for case in cases())
    assert all(line.endswith("not yet measured") and "estimated" in line for line in bars)
    assert all(any(line.startswith(case.name) for line in said) for case in cases())


def test_ratios_are_those_of_the_work() -> None:
    scattered = _found("95% block-sparse", "13.7x")
    assert scattered.value == pytest.approx(1 / 0.05, rel=0.03)
    assert scattered.figure == "19.7x" and scattered.verdict == "above the bar"
    even = _found("20% block-sparse", "attnopt, dense")
    assert even.value == pytest.approx(1 / 0.8, rel=0.01) and "cuDNN is not estimated" in even.said
    assert _found("selected pages", "5x").value == pytest.approx(32 / 2, rel=0.02)
    assert _found("decode 100k, 8 of 32", "2.18x").value == pytest.approx(4, rel=0.02)


def test_what_an_estimate_cannot_answer_says_so() -> None:
    dense = _found("16k, B·H 64", "1.1x")
    assert dense.value == pytest.approx(1) and not dense.answers
    assert "by construction" in dense.verdict and "the bar" not in dense.verdict
    assert _found("grouped decode", "FlashInfer").figure == "–"
    assert "by construction" in _found("grouped decode", "80%").verdict
    assert _found("16k, B·H 64", "0.75x").value is None


def test_an_estimate_below_its_bar_says_so() -> None:
    latent = _found("128 heads", "400 TFLOP/s")
    assert latent.figure == "336 TFLOP/s"
    assert latent.verdict == "**below the bar**; 34% of the peak, where the bar asks for 40%"
    bar = Bar(2.0, ("slow",))
    assert Estimated(bar, 2.0).verdict == "above the bar"
    assert Estimated(bar, 1.99).verdict == "**below the bar**"


def test_a_bar_beyond_the_device_says_so() -> None:
    (case,) = (case for case in cases() if "128 heads" in case.name)
    (rate, *_) = estimated_bars(case, target("l4"))
    assert "more than the device has" in rate.said
    (missing, *_) = estimated_bars(case, target("t4"))
    assert missing.value is None and missing.said.startswith("not here: ")


def test_shares_say_what_is_published_and_what_is_assumed() -> None:
    attention, bandwidth = shares(H100)
    assert "34%" in attention and "calibrated" in attention and "FlashAttention-3" in attention
    assert "80%" in bandwidth and "ASSUMED" in bandwidth
    assert all("ASSUMED" in share for share in shares(target("l4")))


@pytest.mark.parametrize("name", [name for name in known() if name != "cpu"])
def test_every_gpu_has_estimates(name: str) -> None:
    for case in cases():
        found = estimated_bars(case, target(name))
        assert len(found) == len(case.bars)
        assert all(one.value is not None or one.said for one in found)


def test_the_command_of_a_line_runs_it() -> None:
    names = [case.name for case in cases()]
    for case in cases():
        word = command(case, cases()).split('"')[1]
        assert word and word in case.name and "," not in word
        assert sum(word in name for name in names) <= 2


def test_the_committed_page_is_what_the_command_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = "python benchmarks/gpu.py --estimate h100 --out benchmarks/results"
    assert gpu.main(["--estimate", "h100", "--out", str(tmp_path)]) == 0
    name = "gpu-h100-estimated.md"
    committed = ROOT / "benchmarks" / "results" / name
    assert committed.read_text(encoding="utf-8") == (tmp_path / name).read_text(encoding="utf-8"), (
        how
    )
    text = page(cases(), H100)
    assert text.count("*not yet measured*") == sum(len(case.bars) for case in cases())
    assert f"written: {tmp_path / name}" in capsys.readouterr().out
