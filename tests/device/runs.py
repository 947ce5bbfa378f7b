"""Whole runs on a device beside the CPU, what they leave behind, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.autotune.accuracy import evaluate
from attnopt.autotune.check import check
from attnopt.autotune.place import Place, device_of, facing
from attnopt.codegen.target import target
from attnopt.compiler.device import CPU, usable
from attnopt.compiler.errors import Problem
from tests.device import twin
from tests.families import FAMILIES, VOCABULARY
from tests.tolerance import assert_close

ROWS, LENGTH = 2, 12


@pytest.fixture(scope="module")
def there() -> torch.device:
    """The device beside the CPU."""
    return torch.device(twin(), 0)


class _Logits(nn.Module):
    """A language model that names its output."""

    def __init__(self) -> None:
        super().__init__()
        family = next(family for family in FAMILIES if family.name == "llama")
        self.model = family.build("sdpa")

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(input_ids)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of batches."""
    path = tmp_path_factory.mktemp("data") / "inputs.pt"
    torch.manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (48, LENGTH))
    torch.save([{"input_ids": part} for part in ids.split(ROWS)], path)
    return path


@pytest.fixture(scope="module")
def run(
    there: torch.device, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[attnopt.Result, nn.Module]]:
    """A whole run on the device: searched, healed and saved, with speeds of a GPU estimated."""
    torch.manual_seed(0)
    given = _Logits().eval().to(there)
    made = attnopt.optimize(
        given, {"input_ids": torch.randint(3, VOCABULARY, (ROWS, LENGTH), device=there)},
        inputs=data, target="a100", max_drop=0.9, trials=2, timeout=20, heal="2ktok",
        kv_bytes=0.5, out=tmp_path_factory.mktemp("out") / "run",
    )  # fmt: skip
    yield made, given


def test_a_whole_run_fits_heals_and_judges_on_the_device(
    run: tuple[attnopt.Result, nn.Module], there: torch.device
) -> None:
    result, given = run
    assert result.met and result.device == str(there) and result.target == "a100"
    assert result.healing is not None and result.healing.accepted, result.warnings
    assert result.speed is not None and result.speed.ratio.kind == "estimated"
    assert device_of(given) == there


def test_its_folder_opens_on_the_cpu_and_on_the_device(
    run: tuple[attnopt.Result, nn.Module], there: torch.device
) -> None:
    folder = run[0].folder
    assert folder is not None
    here, away = attnopt.load(folder), attnopt.load(folder, device=there)
    ids = torch.randint(3, VOCABULARY, (ROWS, 7))
    assert_close(away(input_ids=ids.to(there))["logits"], here(input_ids=ids)["logits"])
    made = away.generate(ids.to(there), max_new_tokens=5)
    assert made.device == there
    assert torch.equal(made.cpu(), here.generate(ids, max_new_tokens=5))
    weights = dict(away.module.named_parameters())  # type: ignore[attr-defined]
    held = {p.data_ptr() for p in away.decoder.program.module.parameters()}
    assert {p.data_ptr() for p in weights.values()} <= held  # they are there once
    away.draft()  # on the batches that the run kept, which are on the CPU; it may find none


def test_inputs_elsewhere_are_refused(
    run: tuple[attnopt.Result, nn.Module], there: torch.device
) -> None:
    assert run[0].folder is not None
    away, ids = attnopt.load(run[0].folder, device=there), torch.ones(1, 4, dtype=torch.int64)
    for call in (lambda: away(input_ids=ids), lambda: away.generate(ids, max_new_tokens=1)):
        with pytest.raises(Problem, match=r"A411.*on cpu, the model is on twin:0"):
            call()


def test_a_model_of_a_function_is_put_back(
    there: torch.device, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = _Logits().eval()
    example = {"input_ids": torch.randint(3, VOCABULARY, (ROWS, LENGTH))}
    monkeypatch.setattr(sys.modules[__name__], "kept", lambda: (given, example), raising=False)
    more = {"inputs": data, "target": "a100", "max_drop": 0}
    result = attnopt.optimize(f"{__name__}:kept", device=there, **more)
    assert result.device == str(there) and device_of(given) == CPU
    given.to(there)
    away = {"input_ids": example["input_ids"].to(there)}
    monkeypatch.setattr(sys.modules[__name__], "kept", lambda: (given, away))
    del more["inputs"]  # these are on the CPU
    result = attnopt.optimize(f"{__name__}:kept", **more)
    assert result.device == str(there) == str(device_of(given))


def test_packing_is_left_out_of_estimates() -> None:
    """What it leaves to compute is known when it runs, and not before."""
    family = next(family for family in FAMILIES if family.name == "bert")
    result = attnopt.optimize(
        family.build("sdpa"), family.inputs(3, LENGTH), target="a100", max_drop=0
    )
    assert any("unpad was left out" in line for line in result.warnings)
    assert not any(o.rewrite.startswith("unpad") and o.applied for o in result.outcomes)


def test_speeds_of_the_device_at_hand_are_measured_there(
    there: torch.device, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Place, "of", staticmethod(lambda device, wanted: Place(usable(device), "a100", True))
    )
    torch.save(_Logits().eval(), tmp_path / "model.pt")
    source = str(tmp_path / "model.pt")
    waited = list[object]()
    module = torch.get_device_module(there)
    monkeypatch.setattr(module, "synchronize", waited.append)
    result = attnopt.optimize(
        source, inputs=data, device=there, max_drop=0, out=tmp_path / "run", trust=True
    )
    assert result.speed is not None and result.speed.ratio.kind == "measured"
    assert len(waited) > 20 and set(waited) == {there}  # around each sample
    found = check(tmp_path / "run", source, inputs=data, seconds=1.0, min_speed=0.01, trust=True)
    assert found.ok and found.drop is not None


def agreement(model: Any) -> float:
    """A metric that knows of no device: the share of tokens that follow themselves."""
    ids = torch.arange(3, 3 + 2 * LENGTH).reshape(2, LENGTH)
    out = model(input_ids=ids)
    return 1.0 + float((out["logits"].argmax(-1) == ids).float().mean())


def test_a_metric_takes_tensors_of_the_cpu(
    run: tuple[attnopt.Result, nn.Module], there: torch.device
) -> None:
    result, given = run
    assert result.folder is not None
    away = attnopt.load(result.folder, device=there)
    found = evaluate(given, away, (), "other", metric=agreement)
    here = attnopt.load(result.folder)
    assert found.metric == agreement(here) and found.metric_original == agreement(facing(given))


@pytest.mark.parametrize("name", ("nope", "meta", "cuda:77"))
def test_a_device_that_cannot_be_used_is_refused(name: str) -> None:
    with pytest.raises(Problem, match="A411"):
        usable(name)


def test_a_place_is_what_was_asked_for(
    there: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Place.of("cpu", None) == Place(CPU, "cpu", True) == Place.of("cpu", "cpu")
    assert Place.of("cpu", "a100") == Place(CPU, "a100", False)
    assert Place.of(str(there), "a100") == Place(there, "a100", False)
    with pytest.raises(Problem, match=r"A411.*--target cpu"):
        Place.of(str(there), "cpu")
    with pytest.raises(Problem, match=r"A411.*no figures"):
        Place.of(str(there), None)
    monkeypatch.setattr("attnopt.autotune.place.usable", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr("attnopt.autotune.place.at_hand", lambda number: target("h100"))
    assert Place.of("cuda", None) == Place(torch.device("cuda", 0), "h100", True)
    assert not Place.of("cuda", "a100").timed


def test_a_target_that_is_here_is_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Place.of(None, None) == Place() and Place.of(None, "cpu") == Place()
    assert Place.of(None, "h100") == Place(CPU, "h100", False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("attnopt.autotune.place.at_hand", lambda number=0: target("h100"))
    monkeypatch.setattr("attnopt.autotune.place.usable", torch.device)
    assert Place.of(None, "h100") == Place(torch.device("cuda"), "h100", True)
    assert Place.of(None, "a100") == Place(CPU, "a100", False)
    assert Place.of("cpu", "h100") == Place(CPU, "h100", False)
    assert Place.of(None, None) == Place()


def test_a_model_on_two_devices_is_refused(there: torch.device) -> None:
    spread = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(there))
    with pytest.raises(Problem, match=r"A411.*cpu and twin:0"):
        device_of(spread)
