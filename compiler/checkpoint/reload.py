"""Load a checkpoint as anybody would, and hold it against the optimized program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from attnopt.compiler.checkpoint.changes import Changes
from attnopt.compiler.errors import Problem
from attnopt.compiler.faithful import ROUNDING
from attnopt.compiler.intake.hf_directory import read_directory
from attnopt.compiler.intake.hf_inputs import longest
from attnopt.compiler.intake.hf_model import HFModel
from attnopt.compiler.intake.loaded import Loaded, describe
from attnopt.compiler.program import Batch
from attnopt.compiler.verify import RUN_ERRORS, difference, variations


class Reloaded:
    """A checkpoint as transformers reads it from `folder`; it will go to `out`."""

    def __init__(self, folder: Path, loaded: Loaded, out: Path) -> None:
        original: Any = getattr(loaded.module, "hf", None)
        attention = original.config._attn_implementation
        hf, _, self.notes = read_directory(folder, attention=attention)
        self.dtype = original.dtype
        self.model, self.out = HFModel(hf).eval(), out

    def holds(self, made: Changes, run: Callable[..., Any], batch: Batch) -> float:
        """The difference from the outputs of `run` for a batch, at its real tokens.

        The program is compared too, at several sizes and paddings, and beyond its windows. Raises
        `Problem` A522 where a difference is more than rounding.
        """
        with torch.no_grad():
            error = self._apart(run(*batch.args, **batch.kwargs), batch)
        for other in (*variations(made.program), *self._beyond(made)):
            outputs = None
            with suppress(*RUN_ERRORS):  # not a size that the program takes
                outputs = made.program.run(other)
            if outputs is not None:
                self._apart(outputs, other)
        return error

    def _apart(self, expected: Mapping[str, Any], batch: Batch) -> float:
        with torch.no_grad():
            actual = self.model(*batch.args, **batch.kwargs)
        mask = batch.kwargs.get("attention_mask")
        error = float("inf")
        if set(expected) == set(actual):
            valid = None if mask is None else mask.bool()
            error = difference([expected[n] for n in actual], list(actual.values()), valid)
        when = f"reloaded, on {describe(batch.args, dict(batch.kwargs))}"
        allow(error, ROUNDING.get(self.dtype, 1e-3), "; ".join((when, *self.notes)), self.out)
        return error

    def _beyond(self, made: Changes) -> list[Batch]:
        """Random tokens that reach beyond every window that the plan gave, for a model that takes
        tokens, alone or with a mask of the real ones."""
        text = self.model.hf.config.get_text_config()
        most = max((pair.window.left for pair in made.pairs if pair.window is not None), default=0)
        given = made.program.example.kwargs
        if not most or given.keys() - {"attention_mask"} != {"input_ids"}:
            return []
        length = min(most + 17, longest(text) or most + 17)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, int(text.vocab_size), (2, length), generator=draw)
        inputs = {"input_ids": ids}
        if (mask := given.get("attention_mask")) is not None:
            inputs["attention_mask"] = torch.ones_like(ids, dtype=mask.dtype)
        return [Batch((), inputs)]


def allow(error: float, bound: float, when: str, out: Path) -> None:
    """Raise `Problem` A522 for an error beyond its bound; `when` says where it was met."""
    if error <= bound:
        return
    raise Problem(
        "A522", "the checkpoint does not answer as the optimized model does", where=str(out),
        why=f"its outputs differ by {error:.1e} of their rms, {bound:.0e} is allowed ({when})",
        help="nothing was written; the optimized model itself is in the run's folder",
    )  # fmt: skip
