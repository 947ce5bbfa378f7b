"""Read a directory written by `save_pretrained`, and wrap a transformers model so that tensors go
in and come out.

Nothing is fetched, no code from the directory is run, and `.bin` weights are scanned before they
are opened.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake import allow
from attnopt.compiler.intake.checkpoint import LOAD_ERRORS, first_line, scan_stream

BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


class HFModel(nn.Module):
    """A transformers model as `hf`, with a forward that takes tensors and returns a plain dict of
    tensors.

    Inputs: `input_ids`, `attention_mask`, `token_type_ids`, `decoder_input_ids` int64 `[batch,
    seq]`, `pixel_values` `[batch, channels, height, width]`. Outputs, where the model has them:
    `logits`, `last_hidden_state`, `pooler_output`, and other tensors of the model's result by their
    names. There is no cache.
    """

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf
        takes = inspect.signature(hf.forward).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
        self._fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        if "return_dict" in takes or open_ended:
            self._fixed["return_dict"] = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run the model; see the class for shapes."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "decoder_input_ids": decoder_input_ids,
            "pixel_values": pixel_values,
        }
        inputs = {name: value for name, value in given.items() if value is not None}
        outputs = self.hf(**inputs, **self._fixed)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def is_hf(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, told by its base class and without importing the
    library.
    """
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def set_attention(hf: Any, attention: str | None) -> None:
    """Choose the model's attention spelling, and replace a foreign one that would be fetched over
    the network.

    Raises `Problem` A114 for a name that is not known or that the model does not have.
    """
    if attention is not None and attention not in BACKENDS:
        raise Problem(
            "A114",
            f"unknown attention implementation {attention!r}",
            help=f"known: {', '.join(BACKENDS)}",
        )
    current = getattr(hf.config, "_attn_implementation", None)
    wanted = attention or (current if current in BACKENDS else "eager")
    if wanted == current:
        return
    try:
        hf.set_attn_implementation(wanted)
    except (ValueError, ImportError) as error:
        raise Problem(
            "A114", f"{type(hf).__name__} has no {wanted} attention", why=first_line(error)
        ) from error


def read_directory(
    path: Path,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    *,
    trust: bool = False,
) -> tuple[nn.Module, bool, tuple[str, ...]]:
    """The model in the directory, whether its weights are real, and notes for the user.

    Weights keep the dtype they are stored in unless `dtype` says otherwise. Without weight files
    the model is built on the meta device. Raises `Problem` A102 (unsafe `.bin`), A103 (damaged),
    A106, A107 or A115 (no transformers).
    """
    transformers = require_transformers(str(path))
    settings = _settings(path / "config.json")
    weights = [file for pattern in _WEIGHT_PATTERNS for file in sorted(path.glob(pattern))]
    for file in weights:
        _scan_weights(file, trust=trust)
    model_class, notes = _model_class(transformers, settings, path)
    try:
        with _quiet(transformers), _default_dtype(dtype):
            hf = (
                _build(model_class, path, dtype, attention)
                if weights
                else _empty(model_class, path)
            )
    except LOAD_ERRORS as error:
        raise Problem(
            "A107",
            f"transformers {transformers.__version__} could not load the directory",
            where=str(path),
            why=first_line(error),
        ) from error
    set_attention(hf, attention)
    if not weights:
        notes += ("the directory has no weights: built without them, for inspection only",)
    return hf.eval(), bool(weights), notes


def _build(model_class: Any, path: Path, dtype: torch.dtype | None, attention: str | None) -> Any:
    options = {"attn_implementation": attention} if attention else {}
    return model_class.from_pretrained(
        path, local_files_only=True, trust_remote_code=False, dtype=dtype or "auto", **options
    )


def _empty(model_class: Any, path: Path) -> Any:
    config = model_class.config_class.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        return model_class(config)


def require_transformers(where: str) -> Any:
    """The transformers library. Raises `Problem` A115 where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise Problem(
            "A115",
            "reading this model needs transformers",
            where=where,
            why=str(error),
            help="pip install 'attnopt[hf]'",
        ) from error


def read_tokenizer(path: Path) -> Any | None:
    """The tokenizer beside the model, or None where there is none that loads."""
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    transformers = require_transformers(str(path))
    try:
        with _quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
        return None


def _settings(path: Path) -> dict[str, Any]:
    """The config as JSON, refused where it asks for something that is fetched or not built yet."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Problem("A103", "config.json is damaged", where=str(path), why=str(error)) from error
    if not isinstance(settings, dict):
        raise Problem("A103", "config.json is not a JSON object", where=str(path))
    if "quantization_config" in settings:
        raise Problem(
            "A106",
            "quantised weights cannot be read yet",
            where=str(path),
            help="give the model in bf16 or fp16",
        )
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        if settings.get(key) not in (None, *BACKENDS):
            raise Problem(
                "A106",
                f"the config asks for attention code that would be fetched: {settings[key]!r}",
                where=str(path),
                help=f"remove {key} from it",
            )
    if (path.parent / "adapter_config.json").is_file():
        raise Problem(
            "A106",
            "adapters cannot be read yet",
            where=str(path.parent),
            help="merge the adapter into the model and save that",
        )
    return settings


def _model_class(
    transformers: Any, settings: dict[str, Any], path: Path
) -> tuple[Any, tuple[str, ...]]:
    """The class named in `architectures`, which must be one of the library's own; else the type's
    base model.
    """
    names = settings.get("architectures") or []
    found = getattr(transformers, str(names[0]), None) if names else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found, ()
    remote = "auto_map" in settings
    kind = str(settings.get("model_type", ""))
    if names or kind not in transformers.CONFIG_MAPPING:
        missing = str(names[0]) if names else kind or "model without a type"
        raise Problem(
            "A106",
            f"transformers {transformers.__version__} has no {missing}",
            where=str(path / "config.json"),
            why="the directory brings code of its own, which is never run" if remote else "",
            help="give the model as module.path:callable"
            if remote
            else "install the version it was saved with",
        )
    base = transformers.AutoModel._model_mapping[transformers.CONFIG_MAPPING[kind]]
    return base, (f"config.json names no architecture: read as {base.__name__}",)


def _scan_weights(path: Path, *, trust: bool) -> None:
    """Refuse pickled weights that import more than tensors; safetensors files hold no code."""
    if path.suffix != ".bin" or trust:
        return
    with path.open("rb") as stream:
        scan = scan_stream(stream, path.stat().st_size, str(path))
    refused = allow.check(scan, tensors_only=True)[1]
    if refused:
        raise allow.refusal(refused, str(path))


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
def _quiet(transformers: Any) -> Iterator[None]:
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
