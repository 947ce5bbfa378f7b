"""The folder of a finished optimization: `save` writes it in one step, `load` gives its model back.

model.pt2        the optimized program; plain `torch.export.load` opens it when it holds aten only
decode.pt2       the same with its attentions as they were recognised and without weights, where it
                 can be decoded with a cache
plan.json        the rewrites as text, and the evidence for them
report.*         what it cost and why (docs/report.md)
calibration.pt   the batches that rewrites were fitted on, so that the plan replays without the text

The folder is replaced whole; see `attnopt.compiler.folder`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.compiler import folder as folders
from attnopt.compiler.device import CPU, usable
from attnopt.compiler.errors import Problem
from attnopt.compiler.folder import check_writable, work_folder, write
from attnopt.compiler.intake.export_model import load_export
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.optimized import DECODE, Optimized
from attnopt.compiler.plan import Plan
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.signature import Signature
from attnopt.compiler.verify import RUN_ERRORS
from attnopt.compiler.whole_file import write_whole

__all__ = [
    "check_writable",
    "load",
    "load_calibration",
    "program_of",
    "read_plan",
    "read_report",
    "remember_draft",
    "save",
    "source_sha256",
    "work_folder",
    "write",
]

MODEL, PLAN, REPORT, CALIBRATION = "model.pt2", "plan.json", "report.json", "calibration.pt"
_OPS = ("attnopt.compiler.ops", "attnopt.compiler.packed_ops")


class Reports(Protocol):
    """What is said about a run: the report files by name, and the evidence that a plan carries."""

    def files(self) -> Mapping[str, bytes]: ...

    def evidence(self) -> Mapping[str, Any]: ...


def save(
    folder: str | Path,
    program: Program,
    plan: Plan,
    result: Reports,
    calibration: Mapping[str, Sequence[Batch]] | Sequence[Batch] = (),
) -> Path:
    """Write the folder of a run and return its path: model, plan with evidence, reports, batches.

    `calibration` is the batches that the plan needs to replay, by role ("calibration", "heldout"),
    or those of the first role alone. Raises `Problem` A502 or A508 when the folder cannot be
    written.
    """
    from attnopt.compiler.lower import export  # loading a run needs no lowering

    check_writable(folder)
    exported = export(program)
    decoding, graph = _decoding(program)
    document = {
        **plan.as_json(),
        "inputs": Signature.of(exported).as_json(),
        "decode": decoding,
        "evidence": dict(result.evidence()),
    }
    files: dict[str, folders.Content] = {
        MODEL: lambda path: torch.export.save(exported, path),
        **graph,
        PLAN: json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n",
        **result.files(),
    }
    roles = calibration if isinstance(calibration, Mapping) else {"calibration": calibration}
    if any(roles.values()):
        plain = {role: [_plain(batch) for batch in batches] for role, batches in roles.items()}
        files[CALIBRATION] = lambda path: torch.save(plain, path)
    return write(folder, files)


def _decoding(program: Program) -> tuple[dict[str, Any], dict[str, folders.Content]]:
    """What the plan tells of decoding with a cache, and the file for it where it can be done."""
    from attnopt.compiler.decode import derive
    from attnopt.compiler.decode.stored import unweighted

    try:
        decoder = derive(program)
        made = unweighted(program)
    except Problem as problem:
        return {"why_not": ": ".join(filter(None, (problem.what, problem.why)))}, {}
    except RUN_ERRORS as error:  # a finished run is not lost for want of a cache
        return {"why_not": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}, {}
    told = {"cache_bytes_per_token": decoder.bytes_per_token()}
    if decoder.convolutions:
        told["convolution_bytes"] = decoder.convolution_bytes()
    return told, {DECODE: lambda path: torch.export.save(made, path)}


def load(folder: str | Path, device: str | torch.device = CPU) -> Optimized:
    """The optimized model of a finished run, callable like the model it was made from, on a device
    ("cuda", "cuda:1").

    The file is looked through before it is opened. Raises `Problem` A505 when the folder holds no
    run, A102 to A107 when its model cannot be trusted or read, and A411 for a device that cannot be
    used.
    """
    there = usable(device)
    home = _home(folder)
    plan = _document(home / PLAN)
    exported = _opened(home, ((), {})).exported
    assert exported is not None
    report = _document(home / REPORT) if (home / REPORT).is_file() else {}
    return Optimized(exported, plan, report, home, there)


def program_of(folder: str | Path) -> Loaded:
    """The optimized model of a finished run, to be traced and raised again, with the example
    inputs that it was saved with. Raises `Problem` as `load` does.
    """
    home = _home(folder)
    return replace(_opened(home, None), name=home.resolve().name)


def _opened(home: Path, batch: tuple[tuple[Any, ...], dict[str, Any]] | None) -> Loaded:
    for name in _OPS:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    return load_export(home / MODEL, batch=batch)


def read_plan(path: str | Path) -> Plan:
    """The plan in a plan.json, or in the folder that holds one. Raises `Problem` A501 or A505."""
    return Plan.from_json(_document(_plan_file(path)))


def read_inputs(path: str | Path) -> tuple[str, ...]:
    """The inputs of a plan's model in words, in the order of a call; empty where it tells none.

    Raises `Problem` A505.
    """
    return tuple(map(str, _document(_plan_file(path)).get("inputs", ())))


def _plan_file(path: str | Path) -> Path:
    file = Path(path)
    return _home(file, PLAN) / PLAN if file.is_dir() else file


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report.json of a folder as JSON data. Raises `Problem` A505 when there is none."""
    return _document(_home(folder, REPORT) / REPORT)


def remember_draft(folder: str | Path, told: Mapping[str, Any]) -> None:
    """Write into a run's plan.json which draft it decodes with; see `decode.draft.told`.

    Raises `Problem` A505 when the folder holds no run, and A502 when it cannot be written.
    """
    path = _home(folder, PLAN) / PLAN
    document = _document(path)
    document["decode"] = {**(document.get("decode") or {}), "speculate": dict(told)}
    write_whole(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def load_calibration(folder: str | Path) -> dict[str, list[Batch]]:
    """The batches that a plan was fitted on, by role; empty when the run kept none."""
    path = _home(folder, PLAN) / CALIBRATION
    if not path.is_file():
        return {}
    try:
        roles = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise Problem(
            "A505",
            "cannot read the calibration batches",
            where=str(path),
            why=str(error).split("\n")[0],
            help="run optimize again",
        ) from error
    return {role: [Batch(**batch) for batch in batches] for role, batches in roles.items()}


def source_sha256(path: str | Path) -> str:
    """The SHA-256 of a model file, or of a folder's files in order of their names, in
    hexadecimal.
    """
    root = Path(path)
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if not file.is_file():
            continue
        if root.is_dir():
            digest.update(file.relative_to(root).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _home(folder: str | Path, needed: str = MODEL) -> Path:
    home = Path(folder)
    folders.recover(home)
    if not (home / needed).is_file():
        raise Problem(
            "A505",
            f"no finished run in {folder}",
            why=f"there is no {needed}" if home.is_dir() else "there is no such folder",
            help="give the folder that optimize wrote (--out), or run optimize first",
        )
    return home


def _document(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Problem(
            "A505",
            f"cannot read {path.name}",
            where=str(path),
            why=str(error),
            help="run optimize again, or give a folder or plan that it wrote",
        ) from error
    if not isinstance(found, dict):
        raise Problem("A505", f"{path.name} does not hold a JSON object", where=str(path))
    return found


def _plain(batch: Batch) -> dict[str, Any]:
    """A batch as tuples, dicts and tensors, which open without running code."""

    def compact(leaf: Any) -> Any:
        return leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf

    valid = None if batch.valid is None else compact(batch.valid)
    args, kwargs = pytree.tree_map(compact, (tuple(batch.args), dict(batch.kwargs)))
    return {"args": args, "kwargs": kwargs, "valid": valid}
