"""Write a raised program as an ONNX file whose attentions are the standard `Attention` operator."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import mmap
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.compiler.errors import Problem
from attnopt.compiler.lower import export
from attnopt.compiler.onnx.express import expressed
from attnopt.compiler.onnx.package import package
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.verify import BOUND, own_dtype

OPSETS = (23, 24)  # those that have the operator
_INLINE = 1 << 30  # bytes of weights: more go to a file beside the model


@dataclass(frozen=True)
class Written:
    """What was written: `attentions` nodes of the operator; `spelled` says of other attentions why
    they are written out in other operators.

    `error` is the largest difference between ONNX Runtime's outputs and the program's, over their
    root mean square; None where ONNX Runtime is not installed.
    """

    path: Path
    opset: int
    attentions: int
    spelled: tuple[str, ...]
    error: float | None

    def as_json(self) -> dict[str, Any]:
        """The same as a JSON object."""
        return {
            "file": str(self.path),
            "opset": self.opset,
            "attentions": self.attentions,
            "spelled": list(self.spelled),
            "error": self.error,
        }


def write_onnx(program: Program, path: Path, opset: int = OPSETS[0]) -> Written:
    """Write the program to a file in one step, and run it in ONNX Runtime where that is installed.

    Raises `Problem` A124 (packages that are missing), A517 (an opset without the operator), A518
    (what ONNX has no operator for), A519 (a file that cannot be written) and A520 (ONNX Runtime
    answers otherwise, or refuses the file).
    """
    package(path, "onnx", "onnxscript")
    if opset not in OPSETS:
        raise Problem(
            "A517",
            f"the operator Attention is not written for opset {opset}",
            help=f"--opset {' or '.join(map(str, OPSETS))}",
        )
    _refuse_packed(program)
    made = _exported(program, opset)
    spelled = tuple(f"{u.module or u.node}: {u.reason}" for u in program.unraised)
    count = sum(node.op_type == "Attention" for node in made.model_proto.graph.node)
    with _beside(path) as fresh:
        size = sum(p.nbytes for p in program.module.state_dict().values())
        made.save(str(fresh), external_data=size > _INLINE)
        _name_weights(fresh)
        error = _compared(program, fresh)
    return Written(path, opset, count, spelled, error)


def _refuse_packed(program: Program) -> None:
    own = [
        node
        for node in program.graph.nodes
        if getattr(node.target, "namespace", "") == "attnopt" and node.target is not ATTENTION
    ]
    if own:
        sites = [node.name for node in own if "attention" in node.name]
        raise Problem(
            "A518",
            "the plan packs real tokens together (unpad), which ONNX has no operator for",
            where=", ".join(sites or [own[0].name]),
            help="take the unpad step out of plan.json, then export what attnopt apply makes",
        )


def _exported(program: Program, opset: int) -> Any:
    """The program as torch's `ONNXProgram`."""
    import onnxscript.optimizer

    exported = export(program, expressed)
    outputs = program.run(program.example)
    names = [str(name) for name in outputs] if _flat(outputs) else None
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made: Any = torch.onnx.export(
                exported, dynamo=True, opset_version=opset, output_names=names, verbose=False,
                optimize=False,
            )  # fmt: skip
            # Constants alone are folded: the exporter's own rules fuse rotary positions into an
            # operator whose tables ONNX Runtime then refuses.
            onnxscript.optimizer.optimize_ir(made.model)
            return made
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            cause = error.__cause__ or error
            raise Problem(
                "A518",
                f"{program.name} holds what ONNX has no operator for",
                why=f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}",
                help="the optimized model itself is in the folder, as model.pt2",
            ) from error


def _flat(outputs: Any) -> bool:
    return isinstance(outputs, dict) and all(isinstance(x, Tensor) for x in outputs.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress, which goes to stdout and to the log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path of the same name in a new folder beside it; what is written there is moved to its
    place when all went well, the model itself last. Weights that no model reads any more go."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=path.parent) as folder:
            fresh = Path(folder) / path.name
            yield fresh
            for made in sorted(Path(folder).iterdir(), key=lambda file: file == fresh):
                with made.open("rb") as stream:
                    os.fsync(stream.fileno())
                os.replace(made, path.parent / made.name)
        with contextlib.suppress(OSError):  # what is left over harms nobody
            _drop_weights(path)
    except OSError as error:
        raise Problem(
            "A519",
            "the ONNX file cannot be written",
            where=str(path),
            why=error.strerror or str(error),
            help="give another --onnx FILE, or make room",
        ) from error


def _name_weights(fresh: Path) -> None:
    """Give the weights beside a new model a name after what they hold, so that they never take the
    place of those that an older model reads."""
    import onnx

    data = fresh.with_name(f"{fresh.name}.data")
    if not data.exists():
        return
    with data.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    name = f"{fresh.name}.{digest}.data"
    model = onnx.load(str(fresh), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    fresh.write_bytes(model.SerializeToString())
    data.rename(fresh.with_name(name))


def _drop_weights(path: Path) -> None:
    """Remove weights that an earlier export left here under this model's name, where no model of
    the folder names them."""
    own = re.compile(re.escape(path.name) + r"(\.[0-9a-f]{16})?\.data")
    models = [file for file in path.parent.iterdir() if file.suffix == ".onnx" and file.is_file()]
    for file in list(path.parent.iterdir()):
        if own.fullmatch(file.name) and not any(_names(model, file.name) for model in models):
            file.unlink()


def _names(model: Path, name: str) -> bool:
    """Whether the name stands anywhere in a file."""
    if not model.stat().st_size:
        return False
    with model.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as held:
        return held.find(name.encode()) >= 0


def _compared(program: Program, path: Path) -> float | None:
    """How far ONNX Runtime's outputs on the example are from the program's."""
    try:
        import onnxruntime
    except ImportError:
        return None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        given = feeds(session, program.example)
        answers = session.run(None, given)
    # Its errors are classes of a compiled module, without a base of their own.
    except Exception as error:
        raise Problem(
            "A520",
            "ONNX Runtime does not run the exported model",
            why=(str(error).splitlines() or [""])[0],
            help="a newer onnxruntime may; nothing was written",
        ) from error
    wanted = [x for x in pytree.tree_leaves(program.run(program.example)) if isinstance(x, Tensor)]
    apart = [_apart(torch.from_numpy(a), b) for a, b in zip(answers, wanted, strict=True)]
    worst = max(apart, default=0.0)
    if not worst <= 10 * BOUND[own_dtype(program)]:
        raise Problem(
            "A520",
            "the exported model computes something else",
            why=f"its outputs in ONNX Runtime differ by {worst:.1e} of their rms",
            help="nothing was written; please report the model",
        )
    return worst


def feeds(session: Any, batch: Batch) -> dict[str, Any]:
    """A batch as ONNX Runtime takes it: arrays by the names of the session's inputs."""
    leaves = pytree.tree_leaves((batch.args, dict(batch.kwargs)))
    names = [item.name for item in session.get_inputs()]
    given = dict(batch.kwargs)
    values = [given[name] for name in names] if set(names) <= set(given) else leaves
    return {name: value.numpy() for name, value in zip(names, values, strict=False)}


def _apart(found: Tensor, wanted: Tensor) -> float:
    if not wanted.is_floating_point():
        return float((found != wanted).any())
    rms = wanted.double().square().mean().sqrt().clamp_min(1e-30)
    return float((found.double() - wanted.double()).abs().max() / rms) if wanted.numel() else 0.0
