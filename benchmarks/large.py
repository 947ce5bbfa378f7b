"""Tracing, raising and inspecting a Llama-7B-shaped model whose weights are not there: time and
peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.run import Row

SECONDS, GIB = 60.0, 4.0
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
_CHILD = """
import json, resource, sys, time
begun = time.monotonic()
from attnopt.compiler.inspect import inspect
found = inspect(sys.argv[1], time=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
seconds = time.monotonic() - begun
sites = {"raised": found.raised, "found": len(found.sites)}
print(json.dumps({"seconds": seconds, "gib": peak, **sites}))
"""


def rows() -> list[Row]:
    """One row, measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, folder], capture_output=True, text=True, check=True
        )
    numbers = json.loads(done.stdout.strip().splitlines()[-1])
    figure = (
        f"{numbers['seconds']:.0f} s, {numbers['gib']:.1f} GiB, "
        f"{numbers['raised']} of {numbers['found']} raised"
    )
    met = numbers["seconds"] < SECONDS and numbers["gib"] < GIB and numbers["raised"] == 32
    return [
        Row(
            "Llama-7B-shaped, trace, raise and inspect",
            figure,
            f"under {SECONDS:.0f} s and {GIB:.0f} GiB",
            met,
            numbers,
        )
    ]
