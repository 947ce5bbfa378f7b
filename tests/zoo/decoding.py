"""`make decoders`: derives a decoder of every causal language model of the zoo and writes
`docs/decoders.md`.

    python -m tests.zoo.decoding [--only TEXT] [--out docs/decoders.md] [--jobs 2]

What is compared is a prompt and single tokens after it with the model as given, on all of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.generate import inputs_of
from attnopt.compiler.errors import Problem
from tests.programs import rewritten
from tests.zoo.architecture import Architecture
from tests.zoo.survey import (
    ALL,
    ALLOWED,
    DECODERS,
    NOT_INSTALLED,
    X_TRANSFORMERS,
    read,
    versions,
)

ROWS, PROMPT, STEPS = 2, 7, 24
MIXED = "float64, float32 within"
NARROW = ("Llama 4 (text)", "Gemma 2", "MPT (ALiBi)", "BLOOM (ALiBi)")
"""Models that compute scores or their bias in float32 whatever their dtype: held to float32."""


@dataclass(frozen=True)
class Row:
    """What became of one architecture; `error` is the largest difference of its logits relative to
    their rms, `padding` empty or why left padding is refused."""

    name: str
    library: str
    caches: tuple[str, ...] = ()
    bytes: int = 0
    error: float = 0.0
    dtype: str = "float64"
    padding: str = ""
    refused: str = ""
    failed: str = ""

    @property
    def exact(self) -> bool:
        """Whether the decoder gives what the model gives."""
        allowed = ALLOWED[torch.float64 if self.dtype == "float64" else torch.float32]
        return not self.refused and not self.failed and self.error <= allowed


def survey(architecture: Architecture) -> Row:
    """Derive a decoder of an architecture and hold it against the model."""
    dtype = "float64" if architecture.double else "float32"
    bare = Row(architecture.name, architecture.library, dtype=dtype)
    try:
        model, program = read(architecture, architecture.spellings[0])
        decoder = derive(rewritten(program))
    except Problem as problem:
        return replace(bare, refused=_said(problem))
    except ImportError as missing:
        return replace(bare, refused=f"{NOT_INSTALLED}: {missing.name}")
    ids = torch.randint(3, 50, (ROWS, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))
    if architecture.name in NARROW:
        bare = replace(bare, dtype=MIXED)
    return replace(
        bare, caches=_caches(decoder), bytes=decoder.bytes_per_token(),
        padding=_padding(decoder, ids), error=_error(model, decoder, ids),
    )  # fmt: skip


def _error(model: nn.Module, decoder: Decoder, ids: Tensor) -> float:
    """Of the logits of all positions, the last ones read token by token, from the model's."""
    at = torch.arange(ids.shape[1]).expand_as(ids)
    names = (*decoder.split.tokens, *decoder.split.masks)
    masks = [torch.full_like(ids, decoder.split.real) for _ in decoder.split.masks]
    with torch.no_grad():
        given = dict(zip(names, (*inputs_of(decoder, ids, at), *masks), strict=True))
        out = model(**given)
    expected = next(x for x in pytree.tree_leaves(out) if isinstance(x, Tensor) and x.dim() == 3)
    state = decoder.state(len(ids), ids.shape[1])
    parts = [slice(0, PROMPT), *(slice(i, i + 1) for i in range(PROMPT, ids.shape[1]))]
    made = [decoder.step(state, *inputs_of(decoder, ids[:, p], at[:, p])) for p in parts]
    wrong = (torch.cat(made, 1) - expected).abs().max()
    return float(wrong / expected.square().mean().sqrt())


def _padding(decoder: Decoder, ids: Tensor) -> str:
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    try:
        decoder.taking(mask)
    except Problem as problem:
        return _said(problem)
    return ""


def _said(problem: Problem) -> str:
    return f"{problem.what}{f': {problem.why}' if problem.why else ''}"


def _caches(decoder: Decoder) -> tuple[str, ...]:
    kinds = Counter(type(cache).__name__.lower() for cache in decoder.caches.values())
    kinds.update({"convolution": len(decoder.convolutions)})
    return tuple(f"{count} {kind}" for kind, count in kinds.items() if count)


def _one(at: int) -> Row:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    architecture = ALL[at]
    try:
        return survey(architecture)
    except Exception as error:  # noqa: BLE001  (a library may fail in any way; the table tells it)
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return Row(architecture.name, architecture.library, failed=said)


def table(rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    there = [row for row in rows if not row.refused.startswith(NOT_INSTALLED)]
    lines = [
        "# Decoders",
        "",
        "Written by `make decoders`: a decoder derived from each causal model, a prompt of",
        f"{PROMPT} tokens and {STEPS} single ones. *Difference* is the largest one between its",
        "logits and the model's, relative to their rms. *Bytes* are those of a token of the random",
        "tiny model. Left padding is taken, or the reason says why not.",
        "",
        f"{versions()}. **{sum(r.exact for r in there)} of {len(there)}** give what the model"
        " gives.",
        "",
        "| architecture | library | caches | bytes | difference | what is refused, and why |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        failed = f"FAILED: {row.failed}" if row.failed else ""
        wrong = "" if row.exact else "DIFFERS"
        said = row.refused or failed or wrong or (f"padding: {row.padding}" if row.padding else "")
        error = f"{row.error:.0e} ({row.dtype})" if row.caches else ""
        cells = (row.name, row.library, ", ".join(row.caches), str(row.bytes or ""), error, said)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Survey the decoders; exit code 1 where one fails, or gives something else than its model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="architectures whose name holds this")
    parser.add_argument("--out", type=Path, help="the page to write; printed when left out")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args(arguments)
    named = [
        i for i, a in enumerate(ALL)
        if a in (*DECODERS, *X_TRANSFORMERS) and chosen.only.lower() in a.name.lower()
    ]  # fmt: skip
    if not named:
        parser.error(f"no decoder has {chosen.only!r} in its name")
    rows: list[Row] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(chosen.jobs, mp_context=context) as pool:
        for row in pool.map(_one, named):
            rows.append(row)
            flag = "  " if row.exact else "! "
            print(f"{flag}{row.name}: {', '.join(row.caches)} | {row.error:.0e}", row.padding,
                  row.refused, row.failed, sep=" | ", file=sys.stderr, flush=True)  # fmt: skip
    page = table(rows)
    if chosen.out is None:
        print(page)
    else:
        chosen.out.write_text(page, encoding="utf-8")
    return int(any(not row.refused and not row.exact for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
