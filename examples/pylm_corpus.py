"""What pylm learns from and is measured on: the Python standard library's source, as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

CONTEXT = 1024
VOCAB = 2048
SEPARATOR = "<|endoftext|>"
CALIBRATION_BYTES = 250_000
HELD_OUT = (
    "asyncio/locks.py",
    "csv.py",
    "email/header.py",
    "graphlib.py",
    "heapq.py",
    "http/cookies.py",
    "ipaddress.py",
    "json/decoder.py",
    "queue.py",
    "sched.py",
    "shelve.py",
    "statistics.py",
    "textwrap.py",
    "xml/sax/handler.py",
    "zipapp.py",
)
# Tests, vendored archives and generated tables teach a language model little about code.
SKIPPED_FOLDERS = frozenset(
    (
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idle_test",
        "lib-dynload",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    )
)
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Corpus:
    """Source texts: `train` and `held_out` map a module's path to its text."""

    train: dict[str, str]
    held_out: dict[str, str]


def read_corpus(stdlib: Path, held_out: tuple[str, ...] = HELD_OUT) -> Corpus:
    """Read every module below `stdlib`; raises FileNotFoundError if a held-out one is missing."""
    texts: dict[str, str] = {}
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib).as_posix()
        if SKIPPED_FOLDERS.intersection(name.split("/")) or name.startswith(SKIPPED_PREFIXES):
            continue
        texts[name] = path.read_text(encoding="utf-8", errors="replace").replace(SEPARATOR, "")
    missing = [name for name in held_out if name not in texts]
    if missing:
        raise FileNotFoundError(f"held-out modules not found below {stdlib}: {', '.join(missing)}")
    held = {name: texts.pop(name) for name in held_out}
    return Corpus({name: text for name, text in texts.items() if text.strip()}, held)


def joined(texts: dict[str, str]) -> str:
    """The texts in one string, each after a separator token, as the model saw them."""
    return "".join(SEPARATOR + text for text in texts.values())


def calibration_text(corpus: Corpus, seed: int, size: int = CALIBRATION_BYTES) -> str:
    """Whole training modules, drawn at random, of about `size` bytes together."""
    chosen: dict[str, str] = {}
    room = size
    names = list(corpus.train)
    for index in np.random.default_rng(seed).permutation(len(names)):
        text = corpus.train[names[index]]
        if not 2_000 <= len(text) <= min(room, 40_000):
            continue
        chosen[names[index]] = text
        room -= len(text)
    return joined(chosen)


def train_tokenizer(corpus: Corpus, vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """Byte-level BPE fitted to the training modules alone; lossless on every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus.train.values(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Token ids of `text`, int64 [tokens]."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids, dtype=torch.int64)
