"""What a transformers model does, and example inputs for it: from its configuration, or from real
text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.data import lm_batches, read_text, sentence_batches
from attnopt.compiler.intake.inputs import Batch, missing
from attnopt.compiler.intake.loaded import Task, describe

BATCH, LENGTH, SENTENCES = 2, 64, 8
_SEED = 0
_DECODERS = ("CausalLM", "LMHeadModel", "DoubleHeadsModel")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def task_of(hf: Any) -> Task:
    """What kind of work the model does, from its class and its configuration."""
    name = type(hf).__name__
    if hf.main_input_name == "pixel_values":
        return "vision"
    if hf.main_input_name != "input_ids":
        return "other"
    if getattr(hf.config, "is_encoder_decoder", False) and not name.endswith("EncoderModel"):
        return "seq2seq"
    causal = name.endswith(_DECODERS) or getattr(hf.config, "is_decoder", False)
    return "causal-lm" if causal or _is_bare_decoder(hf) else "encoder"


def _is_bare_decoder(hf: Any) -> bool:
    """A base model (LlamaModel) whose type is known to transformers as a causal language model
    only.
    """
    import transformers

    kind = hf.config.model_type
    masked = getattr(
        transformers.models.auto.modeling_auto, "MODEL_FOR_MASKED_LM_MAPPING_NAMES", {}
    )
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return kind in causal and kind not in masked


def made_up(
    hf: Any, task: Task, batch: int | None, length: int | None, where: str
) -> tuple[Batch, str]:
    """Random inputs that fit the configuration (fixed seed), and a sentence that says so.

    Raises `Problem` A111 where the configuration does not tell enough, A116 for sizes that do not
    fit.
    """
    rows = BATCH if batch is None else batch
    if rows < 1 or (length is not None and length < 1):
        raise Problem("A116", f"batch {rows} and length {length} must be at least 1")
    if task == "vision":
        kwargs = _pixels(hf, rows, where)
    elif task == "other":
        raise missing(where)
    else:
        kwargs = _tokens(hf, task, rows, length)
    random = "random pixels" if task == "vision" else "random tokens without padding"
    return ((), kwargs), f"example inputs made from the config: {describe((), kwargs)}, {random}"


def _tokens(hf: Any, task: Task, rows: int, length: int | None) -> dict[str, torch.Tensor]:
    config = hf.config.get_text_config()
    columns = _fit(config, length)
    draw = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(0, int(config.vocab_size), (rows, columns), generator=draw)
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and task != "causal-lm":
        ids[ids == pad] = (int(pad) + 1) % int(config.vocab_size)
    if task == "causal-lm":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    if task == "seq2seq":
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.clone()}
    return {"input_ids": ids, "attention_mask": mask}


def longest(config: Any) -> int | None:
    """The most positions a configuration allows, or None where it sets no limit."""
    limits = [getattr(config, name, None) for name in _POSITIONS]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    if not known:
        return None
    # RoBERTa's kind starts counting positions behind the padding token.
    offset = config.pad_token_id + 1 if "roberta" in str(config.model_type) else 0
    return known[0] - offset


def _fit(config: Any, length: int | None) -> int:
    limit = longest(config)
    if limit is not None and length is not None and length > limit:
        raise Problem(
            "A116",
            f"length {length} is more than the {limit} positions of the model",
            help=f"--length {limit}",
        )
    wanted = LENGTH if length is None else length
    return wanted if limit is None else min(wanted, limit)


def _pixels(hf: Any, rows: int, where: str) -> dict[str, torch.Tensor]:
    config = hf.config
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    if size is None:
        raise missing(where)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    draw = torch.Generator().manual_seed(_SEED)
    shape = (rows, int(getattr(vision, "num_channels", 3)), int(height), int(width))
    return {"pixel_values": torch.rand(shape, generator=draw).to(hf.dtype)}


def from_text(
    hf: Any, task: Task, tokenizer: Any, text: Path, batch: int | None, length: int | None
) -> tuple[Batch, str]:
    """The first batch of a text file, tokenized, and a sentence that says so.

    Language models get contiguous chunks, encoders one line per row. Raises `Problem` A113 and A117
    (no tokenizer, or a model that takes no text).
    """
    if tokenizer is None:
        raise Problem(
            "A117",
            "--text needs a tokenizer beside the model",
            help="copy its tokenizer files there, or use --inputs",
        )
    content = read_text(text)
    config = hf.config.get_text_config()
    if task == "causal-lm":
        made = lm_batches(tokenizer, content, _fit(config, length), batch or BATCH, 1)
    elif task == "encoder":
        limit = longest(config) if length is None else _fit(config, length)
        made = sentence_batches(tokenizer, content.splitlines(), batch or SENTENCES, 1, limit)
    else:
        raise Problem("A117", f"--text is not built yet for a {task} model", help="use --inputs")
    return made[0], f"example inputs from {text}: {describe(*made[0])}"


def varying_dims(kwargs: dict[str, Any]) -> dict[str, dict[int, str]]:
    """Batch and sequence dimensions of a transformers model's inputs."""
    words = {0: "batch", 1: "seq"}
    known = {"pixel_values": {0: "batch"}, "decoder_input_ids": {0: "batch", 1: "decoder_seq"}}
    return {name: dict(known.get(name, words)) for name in kwargs}
