"""Small models and files that the intake tests share."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

STRANGER = """
from pathlib import Path
from torch import nn
Path("imported").touch()

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, x):
        return self.linear(x)

def build():
    return Block()

def build_with_inputs():
    import torch
    return Block(), (torch.ones(2, 4),)

def number():
    return 7

def broken():
    raise LookupError("from the user's own code")
"""


class Command:
    """Pickles as a call of os.system that would leave a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that exists only if a malicious pickle was run."""
    return tmp_path / "it-was-run"


@pytest.fixture
def command(marker: Path) -> Command:
    """An object whose pickle runs a command."""
    return Command(marker)


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """A saved linear layer of width 4."""
    path = tmp_path / "linear.pt"
    torch.save(nn.Linear(4, 4), path)
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Saved inputs for it, `[2, 4]`."""
    path = tmp_path / "inputs.pt"
    torch.save(torch.ones(2, 4), path)
    return path


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An exported linear layer whose batch is open."""
    path = tmp_path / "linear.pt2"
    shapes = ({0: torch.export.Dim("rows")},)
    torch.export.save(
        torch.export.export(nn.Linear(4, 4), (torch.ones(2, 4),), dynamic_shapes=shapes), path
    )
    return path


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A saved module of a package that nobody knows, importable from the current directory only."""
    (tmp_path / "strangers.py").write_text(STRANGER)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "stranger.pt"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path), *sys.path])
        torch.save(importlib.import_module("strangers").Block(), path)
    del sys.modules["strangers"]
    (tmp_path / "imported").unlink()
    monkeypatch.setattr(sys, "path", list(sys.path))  # what intake adds goes away with the test
    yield path
    sys.modules.pop("strangers", None)
