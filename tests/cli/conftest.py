"""Running a command line inside the test process, and small models for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attnopt.cli.main import commands, optimizer, run

WIDTH, LENGTH, ROWS = 16, 12, 4


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document on stdout; fails when there is anything else."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, str]:
        """The problem in the document."""
        found: dict[str, str] = self.json["error"]
        return found


Command = Callable[..., Ended]


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Run `optimize ...` or `attnopt ...` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(name: str, *argv: object) -> Ended:
        app = optimizer if name == "optimize" else commands
        code = run(app, name, [str(word) for word in argv])
        told = capsys.readouterr()
        return Ended(code, told.out, told.err)

    return invoke


def encoder() -> nn.Module:
    """A transformer encoder of two layers with two heads, on `[batch, seq, 16]`."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def save_encoder(folder: Path, batches: int = 6) -> tuple[Path, Path]:
    """The encoder and a list of batches for it, as files."""
    model, inputs = folder / "encoder.pt", folder / "inputs.pt"
    torch.save(encoder(), model)
    torch.save([torch.randn(ROWS, LENGTH, WIDTH) for _ in range(batches)], inputs)
    return model, inputs
