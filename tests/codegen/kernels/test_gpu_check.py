"""Random specs and sizes that kernels are checked on before they are timed, here with small ones in
triton's interpreter; and that what is wrong turns red."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from attnopt.codegen.kernel import Load, kernels
from attnopt.codegen.kernels.latent_prefill import LatentPrefill
from attnopt.codegen.kernels.merge_partials import MergePartials
from attnopt.codegen.kernels.rope_qk import RopeQK
from attnopt.codegen.target import target
from tests.tree import benchmarks

benchmarks()

from benchmarks import gpu, gpu_check  # noqa: E402
from benchmarks.gpu_case import Case  # noqa: E402
from benchmarks.gpu_cases import cases  # noqa: E402
from benchmarks.gpu_check import Checked, check_random  # noqa: E402
from benchmarks.gpu_draws import HOOKS, Most, draw  # noqa: E402

H100 = target("h100")
SMALL = Most(40, 40, ("float32",))
QUICK = ("flash_prefill", "latent_prefill", "merge_partials", "rope_qk", "split_decode")


def _checked(name: str, seed: int = 3, count: int = 1, most: Most = SMALL) -> list[Checked]:
    return list(check_random(H100, "cpu", seed, count, (name,), most))


@pytest.fixture(autouse=True)
def twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "REPEATS", 2)


@pytest.mark.parametrize("name", sorted(kernels()))
def test_something_is_drawn_for_every_kernel_and_follows_from_the_seed(name: str) -> None:
    def drawn(seed: int) -> list[str]:
        dice = Random(f"{seed} {name}")
        made = [draw(name, dice) for _ in range(40)]
        assert all(one is not None for one in made)
        return [f"{one.text} {one.load}" for one in made if one is not None]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 30


def test_what_is_drawn_is_wide() -> None:
    dice = Random(0)
    made = [one for _ in range(300) if (one := draw("flash_prefill", dice)) is not None]
    assert {bool(d.spec.head_dim & (d.spec.head_dim - 1)) for d in made} == {False, True}
    assert any(d.spec.head_dim % 2 for d in made) and any(d.spec.group == 3 for d in made)
    assert {d.spec.mask.kind for d in made} == {"full", "causal", "window"}
    assert {hook for d in made for hook in d.plain} == {"keep_hook", "score_hook"}
    assert {extra for d in made for extra in d.spec.extras} == {"bias", "keep", "padding", "sinks"}
    assert any(d.load.queries != d.load.keys for d in made)
    assert {d.load.dtype for d in made} == {"bfloat16", "float16", "float32"}
    assert all(d.load.queries <= 1200 and d.spec.head_dim <= 256 for d in made)


@pytest.mark.parametrize("name", QUICK)
def test_random_specs_are_right(name: str) -> None:
    (found,) = _checked(name)
    assert not found.wrong and not found.skipped and found.error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(kernels()))
def test_more_random_specs_are_right(name: str) -> None:
    most = Most(16, 33, ("float32",)) if name.startswith("linear") else SMALL
    found = _checked(name, seed=11, count=2, most=most)
    assert len(found) == 2
    for one in found:
        assert one.skipped or (not one.wrong and one.error < 1e-5), one


@pytest.mark.parametrize("name", ["keep", "score"])
def test_hooks_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reference does not know of is an error."""
    also, plain = HOOKS[name]
    dice = Random(5)
    while (made := draw("flash_prefill", dice, SMALL)) is None or made.plain is not plain:
        pass
    assert not gpu_check.check(kernels()["flash_prefill"], made, H100, "cpu").wrong
    blind = type(made)(made.spec, Load(1, 40, 40, "float32"), also)
    assert "error" in gpu_check.check(kernels()["flash_prefill"], blind, H100, "cpu").wrong


@pytest.mark.parametrize("cls", [LatentPrefill, MergePartials, RopeQK])
def test_a_broken_kernel_is_red(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that no line of the table has: each is checked all the same."""
    right = cls.run

    def off(*given: Any) -> Any:
        made = right(*given)
        return made * 1.01 if isinstance(made, torch.Tensor) else (made[0] * 1.01, *made[1:])

    monkeypatch.setattr(cls, "run", off)
    (found,) = _checked(cls.name)
    assert found.wrong.startswith("an error of")


def test_a_broken_reference_and_a_crash_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MergePartials.reference
    monkeypatch.setattr(MergePartials, "reference", lambda *given: right(*given) * 1.01)  # type: ignore[operator]
    assert _checked("merge_partials")[0].wrong.startswith("an error of")
    monkeypatch.setattr(MergePartials, "reference", lambda *given: given[9])
    assert _checked("merge_partials")[0].wrong.startswith("IndexError")


def test_an_output_among_the_inputs_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MergePartials, "run", lambda self, spec, given: given["out"])
    assert _checked("merge_partials")[0].wrong == "an error of inf"


def test_an_infinity_has_to_be_one() -> None:
    none = torch.tensor([1.0, float("-inf")], dtype=torch.float64)
    assert gpu_check._error(torch.tensor([1.0, float("-inf")]), none) == 0
    for other in (float("nan"), float("inf"), 0.0):
        assert gpu_check._error(torch.tensor([1.0, other]), none) == float("inf")


def _run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What the command hands to its checks, where there is a GPU."""
    given: dict[str, Any] = {"gradients": 0}

    def examples(device: Any, names: tuple[str, ...]) -> Iterator[Checked]:
        given["examples"] = set(names)
        yield from (Checked(name, "spec", Load(), 0.0) for name in names)

    def drawn(device: Any, **asked: Any) -> Iterator[Checked]:
        given.update(asked)
        yield from ()

    monkeypatch.setattr(gpu, "check_all", examples)
    monkeypatch.setattr(gpu, "check_random", drawn)
    monkeypatch.setattr(
        gpu, "check_shipped", lambda device, names: given.update(shipped=names) or ()
    )
    monkeypatch.setattr(gpu, "check_gradients", lambda device: given.update(gradients=1) or ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "at_hand", lambda: H100)
    monkeypatch.setattr(gpu, "environment", dict)
    given["code"] = gpu.main(["--check-only", "--out", str(tmp_path), *arguments])
    return given


def test_every_kernel_is_checked_unless_lines_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = _run(monkeypatch, tmp_path, "--seed", "7", "--draws", "5")
    assert given["code"] == 0 and given["gradients"] == 1
    assert given["examples"] == set(given["names"]) == set(given["shipped"]) == set(kernels())
    assert (given["seed"], given["count"]) == (7, 5)
    assert "--seed 7" in capsys.readouterr().out
    assert '"seed": 7' in (tmp_path / "gpu-h100.json").read_text()
    given = _run(monkeypatch, tmp_path, "--only", "linear chunk")
    assert {"linear_chunk", "linear_chunk_backward"} <= given["examples"] < set(kernels())
    seeds = {_run(monkeypatch, tmp_path)["seed"] for _ in range(3)}
    assert len(seeds) > 1  # where none is given, one is drawn


def test_a_kernel_that_was_not_checked_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "kernels", lambda: {"flash_prefill": None, "other": None})
    monkeypatch.setattr(gpu, "environment", dict)
    monkeypatch.setattr(gpu, "check_all", lambda *given, **asked: ())
    monkeypatch.setattr(gpu, "check_random", lambda *given, **asked: ())
    monkeypatch.setattr(gpu, "check_shipped", lambda *given: ())
    monkeypatch.setattr(gpu, "check_gradients", lambda device: ())
    asked = argparse.Namespace(only="", seed=1, draws=1, out=tmp_path, check_only=True)
    lines: list[Case] = cases()[:1]
    assert gpu._measured(lines, H100, asked) == 0
    assert "NOT CHECKED other" in capsys.readouterr().out
