"""`load`: what the user typed, as a `Loaded` model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.callable_model import is_callable_path, load_callable
from attnopt.compiler.intake.detect import Kind, detect
from attnopt.compiler.intake.export_model import load_export
from attnopt.compiler.intake.hf_directory import read_directory, read_tokenizer
from attnopt.compiler.intake.hf_inputs import from_text, made_up, task_of, varying_dims
from attnopt.compiler.intake.hf_model import (
    HFModel,
    check_attention,
    is_hf,
    named_dtype,
    set_attention,
)
from attnopt.compiler.intake.inputs import Batch, as_batch, load_batches, missing, varying
from attnopt.compiler.intake.loaded import Kind as Source
from attnopt.compiler.intake.loaded import Loaded, check_finite, check_runs
from attnopt.compiler.intake.pickle_model import read_module


def load(
    source: str,
    *,
    inputs: Path | None = None,
    text: Path | None = None,
    batch: int | None = None,
    length: int | None = None,
    allow_globals: Sequence[str] = (),
    trust: bool = False,
    dtype: torch.dtype | str | None = None,
    attention: str | None = None,
) -> Loaded:
    """Read a model safely, find example inputs for it, and run it once on them.

    `source` is a `.pt`, a `.pt2`, an ONNX model, a directory of `save_pretrained`, or
    `module.path:callable`; files are told apart by their content. `allow_globals` and `trust` widen
    what a pickle may restore. `attention` picks the spelling of a transformers model (eager, sdpa),
    `dtype` what it computes in. `batch` and `length` size inputs made from a config, from a graph's
    inputs or from `text`. Raises `Problem` A101 to A129.
    """
    check_attention(attention)
    dtype = named_dtype(dtype)
    given = load_batches(inputs)[0] if inputs is not None else None
    request = _Request(given, text, batch, length, attention, dtype)
    path = Path(source)
    if not path.exists() and is_callable_path(source):
        module, own = load_callable(source)
        request.batch = given or own
        return _checked(
            request.finish(module, source.rpartition(":")[2], "callable", source), source
        )
    kind = detect(path)
    if kind is Kind.ONNX:
        return _checked(request.onnx(path), source)
    if kind is Kind.EXPORT:
        return _checked(request.exported(path, allow_globals, trust=trust), source)
    if kind is Kind.HF:
        module, real, notes = read_directory(path, dtype, attention, trust=trust)
        request.tokenizer = read_tokenizer(path)
        loaded = request.finish(module, path.resolve().name, "hf", source, notes)
        return _checked(replace(loaded, weights="real" if real else "meta"), source)
    module, notes = read_module(path, allow_globals, trust=trust)
    return _checked(request.finish(module, path.stem, "pickle", source, notes), source)


def from_module(module: nn.Module, example_inputs: Any) -> Loaded:
    """A module in memory with its example inputs: a tensor, a tuple, a dict, or (args, kwargs).

    A transformers model needs none: they are made from its config. Raises `Problem` A110 to A113
    as `load` does.
    """
    name = type(module).__name__
    given = None if example_inputs is None else as_batch(example_inputs, name)
    request = _Request(given, None, None, None, None, None)
    loaded = request.finish(module.eval(), name, "callable", name)
    if not is_hf(module):
        with torch.no_grad():
            outputs = module(*loaded.args, **loaded.kwargs)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if logits is not None and "input_ids" in loaded.kwargs and logits.dim() == 3:
            loaded.task = "causal-lm"
    return _checked(loaded, name)


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Give a module in memory its training flags back at the end; anything else is left alone."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [module.training for module in modules]
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def _checked(loaded: Loaded, source: str) -> Loaded:
    check_finite(loaded, source)
    check_runs(loaded, source)
    return loaded


class _Request:
    """What the user asked for besides the model itself."""

    def __init__(
        self,
        batch: Batch | None,
        text: Path | None,
        rows: int | None,
        length: int | None,
        attention: str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.batch, self.text, self.rows, self.length = batch, text, rows, length
        self.attention, self.dtype = attention, dtype
        self.tokenizer: object | None = None

    def exported(self, path: Path, allow_globals: Sequence[str], *, trust: bool) -> Loaded:
        """Load a `.pt2`."""
        self._refuse_choices(path)
        return load_export(path, self.batch, allow_globals, trust=trust)

    def onnx(self, path: Path) -> Loaded:
        """Load an ONNX model."""
        from attnopt.compiler.intake.onnx_model import load_onnx  # most models are none

        self._refuse_choices(path)
        return load_onnx(path, self.batch, self.rows, self.length)

    def _refuse_choices(self, path: Path) -> None:
        """A graph is fixed, so neither dtype nor attention can be chosen."""
        if self.attention or self.dtype:
            raise Problem(
                "A114",
                "an exported program has its attention and its dtype built in",
                where=str(path),
                help="export it with the ones you want",
            )
        self._refuse_text(str(path))

    def finish(
        self, module: nn.Module, name: str, kind: Source, where: str, notes: tuple[str, ...] = ()
    ) -> Loaded:
        """Wrap a transformers model, choose the inputs, and put it all together."""
        if self.dtype is not None:
            module = module.to(self.dtype)
        if is_hf(module):
            return self._hf(module, name, kind, where, notes)
        if self.attention is not None:
            raise Problem("A114", "--attention is for models of transformers", where=where)
        self._refuse_text(where)
        if self.batch is None:
            raise missing(where)
        args, kwargs = self.batch
        dims = varying(module, args, kwargs)
        return Loaded(module, None, args, kwargs, name, kind, sequence_dims=dims, notes=notes)

    def _hf(
        self, hf: nn.Module, name: str, kind: Source, where: str, notes: tuple[str, ...]
    ) -> Loaded:
        set_attention(hf, self.attention)
        task = task_of(hf)
        if self.batch is not None:
            made, note = self.batch, ""
        elif self.text is not None:
            made, note = from_text(hf, task, self.tokenizer, self.text, self.rows, self.length)
        else:
            made, note = made_up(hf, task, self.rows, self.length, where)
        args, kwargs = made
        module = HFModel(hf).eval()
        dims = varying_dims(kwargs) if not args else varying(module, args, kwargs)
        notes = (*notes, note) if note else notes
        return Loaded(
            module, None, args, kwargs, name, kind, task, self.tokenizer, "hf.",
            sequence_dims=dims, notes=notes,
        )  # fmt: skip

    def _refuse_text(self, where: str) -> None:
        if self.text is not None:
            raise Problem(
                "A117",
                "--text needs a transformers model with its tokenizer beside it",
                where=where,
                help="use --inputs",
            )
