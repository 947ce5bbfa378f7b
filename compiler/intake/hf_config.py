"""Read a `config.json`: which class of transformers it stands for, and what in it is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.hf_model import BACKENDS


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


def read_settings(path: Path) -> dict[str, Any]:
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


def model_class(
    transformers: Any, settings: dict[str, Any], path: Path
) -> tuple[Any, tuple[str, ...]]:
    """The library's own class that `architectures` names, else the base model of the type.

    Raises `Problem` A106 where the library has neither.
    """
    names = settings.get("architectures")
    names = names if isinstance(names, list) else []
    found = getattr(transformers, str(names[0]), None) if names else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found, ()
    remote = "auto_map" in settings
    kind = str(settings.get("model_type", ""))
    if not names and not kind:
        raise Problem(
            "A106",
            "the config is not one of a transformers model: it names neither class nor type",
            where=str(path / "config.json"),
        )
    if names or kind not in transformers.CONFIG_MAPPING:
        missing = str(names[0]) if names else kind
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
