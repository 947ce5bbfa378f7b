"""What the commands draw: every fact is there, user text stays text, and stdout stays clean."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from attnopt.autotune.record import dump
from attnopt.cli import draw
from attnopt.compiler.errors import Notice, Problem
from attnopt.compiler.plan import Outcome
from tests.autotune.results import full, least

NASTY = "[bold red]x[/] :warning:"


def _row(**changes: Any) -> dict[str, Any]:
    row = {
        "module": "model.layers.0.self_attn",
        "source": "modeling_llama.py:257",
        "raised": True,
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 64,
        "scale": 0.125,
        "mask": "causal",
        "position": "rotary",
        "parameters": 262144,
        "flops_share": 0.034,
        "time_share": 0.051,
    }
    return {**row, **changes}


def test_a_site_is_one_row_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    draw.sites([_row(), _row(module=NASTY)])
    told = capsys.readouterr()
    first = told.out.splitlines()[1]
    for fact in ("model.layers.0.self_attn", "modeling_llama.py:257", "8/2 × 64", "0.125", "causal",
                 "rotary", "262.1k", "3.4%", "5.1%"):  # fmt: skip
        assert fact in first, fact
    assert NASTY in told.out
    assert told.out.splitlines()[-1] == "2 found, 2 understood"
    assert told.err == ""


def test_what_was_not_understood_says_why_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "module": "blocks.1",
        "source": "net.py:9",
        "raised": False,
        "reason": "scores are sorted",
        "node": "sort_2",
        "help": "remove the sort",
    }
    draw.sites([_row(), row])
    told = capsys.readouterr()
    assert "left alone" in told.out and "2 found, 1 understood" in told.out
    assert "warning[A210]: attention left alone" in told.err
    assert "--> blocks.1   net.py:9" in told.err
    assert "= reason: scores are sorted (at node sort_2)" in told.err
    assert "= help: remove the sort" in told.err


def test_a_narrow_terminal_keeps_every_fact(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Console(width=80, highlight=False, markup=False)
    monkeypatch.setattr(draw, "console", lambda: made)
    draw.sites([_row()])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("model.layers.0.self_attn") and "5.1%" in lines[1]
    assert lines[2].strip() == "modeling_llama.py:257"


def test_columns_that_were_not_measured_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    draw.sites([_row(time_share=None)])
    head = capsys.readouterr().out.splitlines()[0]
    assert "FLOPs" in head and "time" not in head


def test_facts_that_were_not_found_say_why_once(capsys: pytest.CaptureFixture[str]) -> None:
    row = _row(missing={"rotary": "the angle is learned"})
    draw.sites([row, {**row, "module": "other"}, _row()])
    told = capsys.readouterr().out
    assert told.count("the angle is learned") == 1
    assert "not found at model.layers.0.self_attn and 1 more: the angle is learned" in told


def test_sublayers_are_summed_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"kind": "mlp", "parameters": 1000, "flops_share": 0.25, "time_share": None}
    draw.sublayers([row, row, {**row, "kind": "attention", "flops_share": 0.1}])
    head, mlp, attention = capsys.readouterr().out.splitlines()
    assert "time" not in head
    assert mlp.split() == ["2", "mlp", "2.0k", "50.0%"]
    assert attention.split() == ["1", "attention", "1.0k", "10.0%"]
    draw.sublayers([])
    assert capsys.readouterr().out == ""


def test_the_model_as_a_whole(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"model": NASTY, "inputs": "input_ids int64 [2, 64]", "parameters": 5_200_000,
             "flops": {"value": 3.1e9, "kind": "counted"}, "notes": ["made up"],
             "seconds": {"value": 0.0123, "kind": "measured"}}  # fmt: skip
    draw.model(found)
    told = capsys.readouterr().out
    for text in (
        NASTY,
        "input_ids int64 [2, 64]",
        "5.2M",
        "3.1G",
        "12.3 ms per call, measured",
        "made up",
    ):
        assert text in told, text
    draw.model({**found, "seconds": None})
    assert "per call" not in capsys.readouterr().out


def test_a_problem_is_told_on_stderr_in_the_compilers_form(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = Problem("A101", f"bad {NASTY}", where="model.pt", why="cut short", help="download again")
    draw.problem(said)
    told = capsys.readouterr()
    assert told.out == "" and told.err.rstrip() == str(said)
    draw.problem(Notice("A203", "left alone"))
    assert capsys.readouterr().err == "warning[A203]: left alone\n"


def test_outcomes_are_grouped_and_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    draw.outcomes(
        [
            Outcome("fuse{}", "s0", "exact", True, error=2e-7),
            Outcome("fuse{}", "s1", "exact", True, error=3e-7),
            Outcome("fuse{}", "s2", "exact", False, "has a soft cap", help="none"),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "s0..s1" in lines[1] and "applied" in lines[1] and "3.0e-07" in lines[1]
    assert "s2" in lines[2] and "left alone" in lines[2] and "has a soft cap; none" in lines[2]


def test_the_verdict_says_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    draw.verdict(replace(full(NASTY), folder="out"))
    told = capsys.readouterr().out
    for text in ("✗ Budget not met: 1.58× over torch.compile", "1.78× (1.73× to 1.83×) over eager",
                 "0.42% (0.31% to 0.56%) drop of perplexity, 1% allowed: pass, near-lossless",
                 "without all of it at most 1.69× more", f"--budget 1.55x, {NASTY}",
                 "saved     out"):  # fmt: skip
        assert text in told, text
    draw.verdict(full(met=True))
    met = capsys.readouterr().out
    assert "✓ Budget met" in met and "would do" not in met
    draw.verdict(least())
    assert capsys.readouterr().out == "✓ Best plan found: accuracy not measured\n"


def test_a_result_that_is_not_faster_is_not_offered_as_faster(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = full()
    assert result.speed is not None
    draw.verdict(replace(result, speed=replace(result.speed, verdict="inconclusive")))
    assert "inconclusive: not offered as faster than torch.compile" in capsys.readouterr().out


def test_the_document_is_one_json_value(capsys: pytest.CaptureFixture[str]) -> None:
    draw.document({"a": [1.5, math.nan, math.inf], "b": NASTY, "long": "x" * 500})
    found = json.loads(capsys.readouterr().out)
    assert found == {"a": [1.5, None, None], "b": NASTY, "long": "x" * 500}


def test_drawing_imports_no_torch() -> None:
    code = "import sys, attnopt.cli.draw, attnopt.cli.progress; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


def test_decoding_is_one_row_per_kind_of_attention(capsys: pytest.CaptureFixture[str]) -> None:
    found = full().decoding["before"]
    alike = tuple(replace(found.sites[0], site=f"s{i}") for i in range(3))
    other = replace(found.sites[0], site="s3", cache_bytes_per_token=512)
    draw.decoding(dump(replace(found, sites=(*alike, other))))
    told = capsys.readouterr().out.splitlines()
    assert "decoding, estimated" in told[0]
    assert told[1].split()[:3] == ["s0..s2", "2.05", "kB"] and told[2].split()[:2] == ["s3", "512"]
    assert "6.66 kB per token" in told[3]
    assert "at most 1.70× faster without the cache" in told[4]
    draw.decoding({"why_not": "it is an encoder"})
    assert capsys.readouterr().out == ""
