"""What transformers makes of checkpoints in a process where attnopt cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

STOCK = """
import sys

class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "attnopt":
            raise ImportError("attnopt is not here")

sys.meta_path.insert(0, Gone())
try:
    import attnopt
except ImportError:
    pass
else:
    raise SystemExit("attnopt can be imported")
import torch, transformers
torch.set_num_threads(1)
prompt, found = torch.load("prompt.pt"), {}
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                            max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        logits = model(tokens).logits
    found[folder] = (logits, tokens)
torch.save(found, "found.pt")
"""


def generated(
    folders: Iterable[str], prompt: Tensor, new: int, home: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """By folder, the tokens that greedy decoding of `new` tokens gives with a prompt `[batch, seq]`
    before them, and the logits for all of those tokens, in the order (logits, tokens).

    `home` is an empty folder to work in.
    """
    torch.save(prompt, home / "prompt.pt")
    script = STOCK.replace("NEW", str(new))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", script, *folders], cwd=home,
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found: dict[str, tuple[Tensor, Tensor]] = torch.load(home / "found.pt")
    return found
