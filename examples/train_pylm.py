"""Train pylm, this project's own small language model, on the Python standard library's source.

The model is a Llama of about five million parameters (6 layers, 256 wide, 8 query and 8 key/value
heads of width 32) over a byte-level BPE vocabulary of 2,048 tokens, with a context of 1,024 tokens.
Hidden matrices are updated by Muon (Jordan et al., 2024: momentum, then an approximate
orthogonalisation by a quintic Newton-Schulz iteration, here in float32), all else by AdamW. The
learning rate and the sequence length follow the share of the wall-clock budget that is spent, so
the run ends by itself, and a resumed run goes on where it stopped.

    python examples/train_pylm.py --minutes 75 --threads 2
    python examples/train_pylm.py --minutes 75 --threads 2 --resume   # after an interruption
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 1024
VOCAB = 2048
SEPARATOR = "<|endoftext|>"
CALIBRATION_BYTES = 250_000
SLICE_WINDOWS = 8
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
    "__pycache__ site-packages dist-packages test tests idle_test encodings pydoc_data "
    "ensurepip lib-dynload".split()
)
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
# (share of the budget at which the stage starts, tokens in a sequence)
STAGES = ((0.0, 256), (0.5, 512), (0.8, CONTEXT))


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


def build_model(layers: int = 6, hidden: int = 256, heads: int = 8) -> LlamaForCausalLM:
    """A freshly initialised Llama with one key/value head per query head (MHA)."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=True,
    )
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            # Each block starts as the identity, which lets Muon take large first steps.
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards U Vᵀ of each matrix, float32 [count, rows, cols].

    The quintic's coefficients are Jordan's (2024): singular values end within about [0.7, 1.2].
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; matrices of one shape are handled as one batch."""

    def __init__(
        self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.05
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                self._step_batch(matrices, group)

    def _step_batch(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        buffers = [self.state[m].setdefault("momentum", torch.zeros_like(m)) for m in matrices]
        grads = [m.grad for m in matrices]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        blended = torch.stack(grads).lerp(torch.stack(buffers), group["momentum"])
        update = orthogonalised(blended)
        rows, cols = matrices[0].shape
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        scale = -group["lr"] * math.sqrt(max(1.0, rows / cols))
        torch._foreach_add_(matrices, list(update.unbind()), alpha=scale)


def build_optimizers(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.01)
    optimizers = [Muon(hidden, muon_lr), adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def rate(progress: float, step: int, warmup: int = 60) -> float:
    """Share of the peak learning rate: linear warm-up, a plateau, linear decay to nothing."""
    return min((step + 1) / warmup, 1.0) * min(1.0, max(0.0, (1.0 - progress) / 0.7))


def sequence_length(progress: float) -> int:
    """Tokens in a training sequence at this share of the budget."""
    return [length for start, length in STAGES if progress >= start][-1]


@dataclass
class Sampler:
    """Draws sequences without replacement from one token stream, int64 [tokens].

    Each epoch cuts the stream at a new offset and shuffles the pieces; `epoch`, `length` and
    `cursor` are its whole state, so a resumed run draws what the interrupted one would have.
    """

    stream: Tensor
    seed: int
    epoch: int = 0
    length: int = 0
    cursor: int = 0

    def batch(self, length: int, count: int) -> Tensor:
        """int64 [count, length + 1]."""
        if length != self.length:
            self.epoch, self.length, self.cursor = self.epoch + 1, length, 0
        starts = self._starts()
        if self.cursor + count > len(starts):
            self.epoch, self.cursor = self.epoch + 1, 0
            starts = self._starts()
        taken = starts[self.cursor : self.cursor + count]
        self.cursor += count
        return self.stream[torch.from_numpy(taken)[:, None] + torch.arange(length + 1)]

    def _starts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        first = int(rng.integers(self.length))
        starts = np.arange(first, len(self.stream) - self.length - 1, self.length)
        return rng.permutation(starts)


def nll_sum(model: nn.Module, tokens: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats of tokens[:, 1:], for int64 [batch, length + 1]."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def held_out_loss(model: nn.Module, stream: Tensor, windows: int | None = None) -> float:
    """Mean nats per token over consecutive windows of `CONTEXT` tokens of int64 [tokens].

    Every token but the first is predicted once, from at most `CONTEXT` tokens before it in its
    own window; the last, shorter window counts too. `windows` limits it to the first few.
    """
    device = next(model.parameters()).device
    pieces = [stream[i : i + CONTEXT + 1] for i in range(0, len(stream) - 1, CONTEXT)][:windows]
    model.eval()
    total = sum(nll_sum(model, piece[None].to(device)).item() for piece in pieces)
    model.train()
    return total / sum(len(piece) - 1 for piece in pieces)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path` and move it there, so that no reader sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


@dataclass
class Run:
    """One training run: what it trains on, what it trains, and how far it is."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    sampler: Sampler
    held_out: Tensor
    seed: int
    layers: int
    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "sampler": (self.sampler.epoch, self.sampler.length, self.sampler.cursor),
            "counters": (self.step, self.tokens, self.elapsed),
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; raises ValueError if the corpus gives another tokenizer."""
        if state["tokenizer"] != self.tokenizer.backend_tokenizer.to_str():
            raise ValueError("the checkpoint was made from another corpus; start without --resume")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.sampler.epoch, self.sampler.length, self.sampler.cursor = state["sampler"]
        self.step, self.tokens, self.elapsed = state["counters"]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Store everything a resumed run needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def export(out: Path, run: Run, progress: dict[str, Any]) -> None:
    """Write model (float16), tokenizer, texts, metrics and README into `out`.

    The reported losses are measured on the exported weights, read back and computed in float32.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        half = build_model(run.layers)
        half.load_state_dict(run.model.state_dict())
        half.to(torch.float16).save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)
        for path in Path(folder).iterdir():
            os.replace(path, out / path.name)
    write_atomically(out / "eval.txt", joined(run.corpus.held_out))
    write_atomically(out / "calibration.txt", calibration_text(run.corpus, run.seed))
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if licence.is_file():
        shutil.copyfile(licence, out / "LICENSE-PSF.txt")
    metrics = measure(out, progress)
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_atomically(out / "README.md", readme(metrics))


def measure(folder: Path, progress: dict[str, Any]) -> dict[str, Any]:
    """Held-out loss of the model saved in `folder`, with what is needed to interpret it."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (folder / "eval.txt").read_text(encoding="utf-8")
    tokens = encode(PreTrainedTokenizerFast.from_pretrained(folder), text)
    loss = held_out_loss(model, tokens)
    size = len(text.replace(SEPARATOR, "").encode())
    return {
        "loss_nats_per_token": round(loss, 4),
        "perplexity": round(math.exp(loss), 3),
        "bits_per_byte": round(loss * (len(tokens) - 1) / math.log(2) / size, 4),
        "slice_windows": SLICE_WINDOWS,
        "slice_loss_nats_per_token": round(held_out_loss(model, tokens, SLICE_WINDOWS), 4),
        "context": CONTEXT,
        "eval_tokens": len(tokens),
        "eval_bytes": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": model.config.num_hidden_layers,
        **progress,
        "held_out": list(HELD_OUT),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def readme(m: dict[str, Any]) -> str:
    """The model card, every number of it taken from the metrics `m`."""
    modules = ", ".join(f"`{name}`" for name in m["held_out"])
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    return f"""# pylm

A small language model of Python source, trained for this project's tests and examples.

| | |
|---|---|
| architecture | `LlamaForCausalLM`, {m["layers"]} layers, 256 wide, 8 query and 8 key/value heads of width 32 (MHA), SwiGLU 640 wide, rotary positions, tied embeddings |
| parameters | {m["parameters"]:,} (float16 safetensors) |
| tokenizer | byte-level BPE, {VOCAB:,} tokens; token 0, `{SEPARATOR}`, precedes every module |
| context | {m["context"]:,} tokens |
| held-out loss | **{m["loss_nats_per_token"]:.4f} nats per token** (perplexity {m["perplexity"]:.2f}, {m["bits_per_byte"]:.4f} bits per byte) |
| trained | {m["tokens_seen"]:,} tokens ({m["epochs"]:.1f} passes over {m["train_tokens"]:,}), {m["steps"]:,} steps, {m["minutes"]:.0f} minutes of wall-clock time |
| device | {m["device"]} |
| versions | {versions} |

The loss is measured on the weights in this folder, computed in float32 over all of `eval.txt`
({m["eval_tokens"]:,} tokens, {m["eval_bytes"]:,} bytes) in consecutive windows of {m["context"]:,} tokens;
every token is predicted from what precedes it in its window. `metrics.json` holds the same numbers.

## Data

The source of the standard library of Python {m["versions"]["python"]}, without its tests, its character
tables and its bundled archives. These modules are held out: neither the model nor its tokenizer
saw them. {modules}.

- `eval.txt`: the held-out modules, each after a `{SEPARATOR}`.
- `calibration.txt`: training modules, drawn at random, for passes that need activations.

Both texts are copied from Python and licensed under the PSF License Agreement, version 2
(Copyright Python Software Foundation; see `LICENSE-PSF.txt`).

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("examples/models/pylm", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("examples/models/pylm")
```

## Reproduce

    python examples/train_pylm.py --minutes {m["budget_minutes"]:g} --threads {m["threads"]} --seed {m["seed"]}

Stages: sequences of 256, then 512, then {m["context"]:,} tokens from 0, 50 and 80% of the budget on;
{m["batch_tokens"]:,} tokens per step; Muon (float32 Newton-Schulz) for the matrices of the blocks, AdamW for the
rest; linear warm-up, plateau, linear decay. The budget is wall-clock time, so another machine, or
this one under another load, takes a different number of steps and ends at a different loss.
"""


def prepare(args: argparse.Namespace, device: str) -> Run:
    """Corpus, tokenizer, model and optimizers, all determined by the seed."""
    torch.manual_seed(args.seed)
    corpus = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer = train_tokenizer(corpus)
    stream = encode(tokenizer, joined(corpus.train))
    held_out = encode(tokenizer, joined(corpus.held_out))
    model = build_model(args.layers).to(device)
    print(
        f"{len(corpus.train)} modules, {len(stream):,} training tokens, {len(held_out):,} held out, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, on {device}",
        flush=True,
    )
    optimizers = build_optimizers(model, args.muon_lr, args.adam_lr)
    sampler = Sampler(stream, args.seed)
    return Run(corpus, tokenizer, model, optimizers, sampler, held_out, args.seed, args.layers)


def train_step(run: Run, progress: float, batch_tokens: int, device: str) -> float:
    """One update; returns the batch's loss in nats per token."""
    length = sequence_length(progress)
    batch = run.sampler.batch(length, max(1, batch_tokens // length)).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = nll_sum(run.model, batch) / batch[:, 1:].numel()
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    factor = rate(progress, run.step)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.tokens += batch[:, 1:].numel()
    return loss.item()


def train(run: Run, args: argparse.Namespace, device: str) -> None:
    """Update until the wall-clock budget is spent, with reports and checkpoints on the way."""
    budget = args.minutes * 60
    begun = time.monotonic() - run.elapsed
    saved = reported = run.elapsed
    tokens = run.tokens
    while run.elapsed < budget:
        loss = train_step(run, run.elapsed / budget, args.batch_tokens, device)
        run.elapsed = time.monotonic() - begun
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {run.step}; lower --muon-lr")
        if run.elapsed - reported >= args.report_every:
            speed = (run.tokens - tokens) / (run.elapsed - reported)
            print(
                f"{run.elapsed / 60:6.1f} min  step {run.step}  length {run.sampler.length}  "
                f"train {loss:.3f} nats  {speed:.0f} tokens/s",
                flush=True,
            )
            reported, tokens = run.elapsed, run.tokens
        if run.elapsed - saved >= args.save_every:
            save_checkpoint(args.checkpoint, run.state())
            part = held_out_loss(run.model, run.held_out, SLICE_WINDOWS)
            print(f"{'':10}held-out (first {SLICE_WINDOWS} windows) {part:.4f} nats", flush=True)
            run.elapsed = time.monotonic() - begun
            saved = run.elapsed
    save_checkpoint(args.checkpoint, run.state())


def facts(run: Run, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """What the metrics say about how the model was trained."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} threads"
    return {
        "tokens_seen": run.tokens,
        "train_tokens": len(run.sampler.stream),
        "epochs": round(run.tokens / len(run.sampler.stream), 2),
        "steps": run.step,
        "minutes": round(run.elapsed / 60, 2),
        "budget_minutes": args.minutes,
        "batch_tokens": args.batch_tokens,
        "threads": args.threads,
        "seed": args.seed,
        "device": name,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    here = Path(__file__).resolve().parent
    scratch = Path(tempfile.gettempdir()) / "pylm-checkpoints" / "last.pt"
    parser = argparse.ArgumentParser(description="Train the small Python language model pylm.")
    parser.add_argument("--minutes", type=float, default=75.0, help="wall-clock budget")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=here / "models" / "pylm")
    parser.add_argument("--checkpoint", type=Path, default=scratch)
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    parser.add_argument("--batch-tokens", type=int, help="default: 4096, on a GPU 16384")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--report-every", type=float, default=20.0, help="seconds")
    parser.add_argument("--save-every", type=float, default=120.0, help="seconds")
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error("--minutes must be more than 0")
    if args.resume and not args.checkpoint.is_file():
        parser.error(f"--resume: there is no checkpoint at {args.checkpoint}")
    return args


def main() -> None:
    """Train within the budget, then export and report."""
    args = arguments()
    torch.set_num_threads(args.threads)
    cuda = torch.cuda.is_available() and args.device != "cpu"
    device = "cuda" if cuda or args.device == "cuda" else "cpu"
    args.batch_tokens = args.batch_tokens or (16384 if device == "cuda" else 4096)
    run = prepare(args, device)
    if args.resume:
        run.restore(torch.load(args.checkpoint, map_location=device, weights_only=True))
    train(run, args, device)
    export(args.out, run, facts(run, args, device))
    print((args.out / "metrics.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
