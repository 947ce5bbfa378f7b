"""Read a directory written by `save_pretrained`.

Nothing is fetched, no code from the directory is run, and `.bin` weights are scanned before they
are opened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake import allow
from attnopt.compiler.intake.checkpoint import LOAD_ERRORS, first_line, scan_stream
from attnopt.compiler.intake.hf_config import model_class, read_settings, require_transformers
from attnopt.compiler.intake.hf_model import set_attention
from attnopt.compiler.intake.weightless import weightless

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


def read_directory(
    path: Path,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    *,
    trust: bool = False,
) -> tuple[nn.Module, bool, tuple[str, ...]]:
    """The model in the directory, whether its weights are real, and notes for the user.

    Weights keep the dtype they are stored in unless `dtype` says otherwise. Without weight files
    the model is built with parameters that take no memory. Raises `Problem` A102 (unsafe `.bin`),
    A103 (damaged), A106, A107 or A115 (no transformers).
    """
    transformers = require_transformers(str(path))
    settings = read_settings(path / "config.json")
    weights = [file for pattern in _WEIGHT_PATTERNS for file in sorted(path.glob(pattern))]
    for file in weights:
        _scan_weights(file, trust=trust)
    built, notes = model_class(transformers, settings, path)
    try:
        with quiet(transformers), _default_dtype(dtype):
            hf, missing = _build(built, path, dtype, attention) if weights else _empty(built, path)
    except LOAD_ERRORS as error:
        raise Problem(
            "A107",
            f"transformers {transformers.__version__} could not load the directory",
            where=str(path),
            why=first_line(error),
        ) from error
    set_attention(hf, attention)
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        notes += (f"{len(missing)} weights are in no file and were drawn at random: {shown}",)
    if (path / "modules.json").is_file():
        notes += ("a sentence encoder: its transformer is read, pooling stays with the caller",)
    if not weights:
        notes += ("the directory has no weights: built without them, for inspection only",)
    return hf.eval(), bool(weights), notes


def _build(
    model_class: Any, path: Path, dtype: torch.dtype | None, attention: str | None
) -> tuple[Any, list[str]]:
    """The model with its weights, and the names of those that no file holds."""
    options = {"attn_implementation": attention} if attention else {}
    hf, report = model_class.from_pretrained(
        path,
        local_files_only=True,
        trust_remote_code=False,
        dtype=dtype or "auto",
        output_loading_info=True,
        **options,
    )
    return hf, sorted(report["missing_keys"])


def _empty(model_class: Any, path: Path) -> tuple[Any, list[str]]:
    """The model with parameters that take no memory, and true buffers."""
    config = model_class.config_class.from_pretrained(path, local_files_only=True)
    with weightless():
        return model_class(config), []


def read_tokenizer(path: Path) -> Any | None:
    """The tokenizer beside the model, or None where there is none that loads."""
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    transformers = require_transformers(str(path))
    try:
        with quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
        return None


def _scan_weights(path: Path, *, trust: bool) -> None:
    """Refuse damaged weights, and pickled ones that import more than tensors."""
    if path.suffix == ".safetensors":
        _check_safetensors(path)
    if path.suffix != ".bin" or trust:
        return
    with path.open("rb") as stream:
        scan = scan_stream(stream, path.stat().st_size, str(path))
    refused = allow.check(scan, tensors_only=True)[1]
    if refused:
        raise allow.refusal(refused, str(path))


def _check_safetensors(path: Path) -> None:
    """Raise `Problem` A103 unless the header covers the file; such files hold no code."""
    try:
        with safe_open(path, framework="pt"):
            return
    except SafetensorError as error:
        raise Problem(
            "A103",
            "the weights are damaged or cut short",
            where=str(path),
            why=str(error),
            help="download or save them again",
        ) from error


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Modules built inside take this dtype; None leaves torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Keep the library's progress bars and notes off the user's terminal."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
