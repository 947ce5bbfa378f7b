"""Every target file is complete and plausible; unknown names and broken files are explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnopt.codegen.target import known, target
from attnopt.compiler.errors import Problem

GPUS = [name for name in known() if name != "cpu"]
DATASHEET = {  # dense bfloat16 (float16 on the T4) in TFLOP/s, bandwidth in GB/s
    "a100": (312, 2039), "h100": (989.5, 3350), "h200": (989.5, 4800), "b200": (2250, 8000),
    "l4": (121, 300), "l40s": (362.05, 864), "rtx4090": (165.2, 1008), "rtx5090": (209.5, 1792),
    "t4": (65, 320), "mi250": (181.05, 1638), "mi300x": (1307.4, 5300),
}  # fmt: skip


def test_the_known_names_are_all_there() -> None:
    assert set(known()) == {*DATASHEET, "cpu"}


@pytest.mark.parametrize("name", GPUS)
def test_figures_are_those_of_the_datasheet(name: str) -> None:
    got = target(name)
    peak, bandwidth = DATASHEET[name]
    assert got.peak["float16"] == pytest.approx(peak * 1e12)
    assert got.bandwidth == pytest.approx(bandwidth * 1e9)
    assert ("bfloat16" in got.peak) == (name != "t4")
    assert "datasheet" in got.source or "whitepaper" in got.source


@pytest.mark.parametrize("name", GPUS)
def test_figures_hang_together(name: str) -> None:
    got = target(name)
    assert got.peak["float32"] <= got.peak["float16"] <= got.peak["int8"]
    assert got.shared_per_block <= got.shared_per_unit <= 256 * 1024
    assert 20 < got.peak["float16"] / got.bandwidth < 500
    assert 16e9 <= got.memory <= 200e9 and got.units >= 40
    assert bool(got.achievable) == bool(got.achievable_source)
    assert 4 << 20 <= got.l2 <= 256 << 20  # timing rotates among inputs that exceed it
    with_float8 = got.capability in ("8.9", "9.0", "10.0", "12.0", "gfx942")
    assert ("float8" in got.peak) == with_float8
    if with_float8:
        assert got.peak["float8"] == pytest.approx(2 * got.peak["float16"], rel=0.02)


def test_shared_memory_limits_are_those_of_the_architecture() -> None:
    limits = {name: target(name).shared_per_block // 1024 for name in GPUS}
    assert limits["a100"] == 163 and limits["h100"] == limits["b200"] == 227
    assert limits["l4"] == limits["rtx5090"] == 99 and limits["mi300x"] == 64


def test_names_are_read_in_any_case() -> None:
    assert target("A100") == target("a100")


def test_the_cpu_has_no_figures_of_its_own() -> None:
    got = target("cpu")
    assert got.measured and not got.peak and not target("a100").measured


def test_an_unknown_name_lists_the_known_and_says_how_to_add_one() -> None:
    with pytest.raises(Problem) as caught:
        target("h1000")
    problem = caught.value
    assert problem.code == "A401" and "a100" in problem.why
    assert "did you mean h100?" in problem.help and "--target" in problem.help
    with pytest.raises(Problem):
        target("../targets/a100")


def _copy(tmp_path: Path, old: str = "", new: str = "") -> Path:
    import attnopt.codegen.targets as folder

    text = (Path(folder.__file__).parent / "a100.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "Mine.toml"
    path.write_text(text.replace(old, new, 1) if old else text, encoding="utf-8")
    return path


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    got = target(str(_copy(tmp_path)))
    assert got.name == "mine" and got.peak == target("a100").peak


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("units = 108", "units = 0", "units"),
        ("bandwidth = 2.039e12", "bandwidth = nan", "bandwidth"),
        ("bandwidth = 2.039e12", "", "bandwidth"),
        ("bfloat16 = 312e12", "bfloat16 = 'fast'", "bfloat16"),
        ("attention = 0.6", "attention = 1.6", "attention"),
        ('vendor = "nvidia"', "", "vendor"),
        ('vendor = "nvidia"', 'vendor = "nvdia"', "`vendor` must be nvidia or amd, not nvdia"),
        ('vendor = "nvidia"', 'vendor = "amd"', "one like gfx942"),
        ('capability = "8.0"', 'capability = "abc"', "one like 9.0, not abc"),
        ("bfloat16 = 312e12", "bfloat61 = 312e12", "`peak` has no bfloat61"),
        ("bfloat16 = 312e12", "bfloat16 = 312e12\nsource = 'x'", "`peak` has no source"),
        ("units = 108", "cores = 108", "cores"),
        ("units = 108", "units = true", "units"),
        ("l2 = 41943040", "l2 = 'big'", "l2"),
        ("units = 108", "units = 108\nnote = 3", "note"),
        ("bfloat16 = 312e12", "bfloat16 = true", "bfloat16"),
        ("attention = 0.6", "atention = 0.6", "`achievable` has no atention"),
        ("units = 108", "units = = 108", "line"),
    ],
)
def test_a_broken_file_names_what_is_wrong(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(Problem) as caught:
        target(str(_copy(tmp_path, old, new)))
    assert caught.value.code == "A401" and said in caught.value.why


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="cannot read"):
        target(str(tmp_path / "none.toml"))
