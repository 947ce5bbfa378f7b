"""Train pylm, this project's own small language model, on the Python standard library's source.

The model is a Llama of about five million parameters (6 layers, 256 wide, 8 query and 8 key/value
heads of width 32) over a byte-level BPE vocabulary of 2,048 tokens, with a context of 1,024 tokens.
Hidden matrices are updated by Muon (Jordan et al., 2024: momentum, then an approximate
orthogonalisation by a quintic Newton-Schulz iteration, here in float32), all else by AdamW. The
learning rate and the sequence length follow the share of the wall-clock budget that is spent, so
the run ends by itself, and a resumed run goes on where it stopped.

    python examples/train_pylm.py --minutes 60 --threads 2
    python examples/train_pylm.py --minutes 60 --threads 2 --resume   # after an interruption

Once the budget is spent, `--resume` trains no more and writes the model's folder anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pylm_card import SLICE_WINDOWS, card, held_out_nll, measure, token_nll
from pylm_corpus import (
    CONTEXT,
    VOCAB,
    Corpus,
    calibration_text,
    encode,
    joined,
    read_corpus,
    train_tokenizer,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Share of the budget at which a stage starts, tokens in a sequence, share of the batch: gradients
# agree so well at first that more steps are worth more than larger ones.
STAGES = ((0.0, 256, 0.5), (0.5, 512, 0.5), (0.8, CONTEXT, 1.0))


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
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
        )
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
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        buffers = [self.state[m]["momentum"] for m in matrices]
        grads = [m.grad for m in matrices]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        blended = torch.stack(grads).lerp(torch.stack(buffers), group["momentum"])
        update = orthogonalised(blended)
        rows, cols = matrices[0].shape
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        scale = -group["lr"] * math.sqrt(max(1.0, rows / cols))
        torch._foreach_add_(matrices, list(update.unbind()), alpha=scale)


def build_optimizers(
    model: nn.Module, muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
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


def stage(progress: float) -> tuple[int, float]:
    """Tokens in a training sequence, and the share of the batch, at this share of the budget."""
    return [(length, part) for start, length, part in STAGES if progress >= start][-1]


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
            path.chmod(0o644)
            os.replace(path, out / path.name)
    write_atomically(out / "eval.txt", joined(run.corpus.held_out))
    write_atomically(out / "calibration.txt", calibration_text(run.corpus, run.seed))
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if licence.is_file():
        shutil.copyfile(licence, out / "LICENSE-PSF.txt")
    metrics = measure(out, progress)
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    write_atomically(out / "README.md", card(metrics))


def prepare(args: argparse.Namespace, device: str) -> Run:
    """Corpus, tokenizer, model and optimizers, all determined by the seed."""
    torch.manual_seed(args.seed)
    corpus = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer = train_tokenizer(corpus)
    stream = encode(tokenizer, joined(corpus.train))
    held_out = encode(tokenizer, joined(corpus.held_out))
    model = build_model(args.layers).to(device)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{len(corpus.train)} modules, {len(stream):,} training tokens, "
        f"{len(held_out):,} held out, {size:,} parameters, on {device}",
        flush=True,
    )
    optimizers = build_optimizers(model, args.muon_lr, args.adam_lr)
    sampler = Sampler(stream, args.seed)
    return Run(corpus, tokenizer, model, optimizers, sampler, held_out, args.seed, args.layers)


def train_step(run: Run, progress: float, batch_tokens: int, device: str) -> float:
    """One update; returns the batch's loss in nats per token."""
    length, part = stage(progress)
    batch = run.sampler.batch(length, max(1, int(batch_tokens * part) // length)).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = token_nll(run.model, batch).mean()
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
            part = held_out_nll(run.model, run.held_out, SLICE_WINDOWS).mean()
            print(f"{'':10}held-out (first {SLICE_WINDOWS} windows) {part:.4f} nats", flush=True)
            run.elapsed = time.monotonic() - begun
            saved = run.elapsed
    save_checkpoint(args.checkpoint, run.state())


def facts(run: Run, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """What the metrics say about how the model was trained."""
    threads = "1 thread" if args.threads == 1 else f"{args.threads} threads"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads}"
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
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock budget")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=here / "models" / "pylm")
    parser.add_argument("--checkpoint", type=Path, default=scratch)
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    parser.add_argument("--batch-tokens", type=int, help="default: 4096, on a GPU 16384")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--muon-lr", type=float, default=0.007)
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
