"""Random tiny models of each attention layout, raised: for tests of the passes on heads."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.contract import Edit, Miss, Notes, Pass, read_pass
from attnopt.compiler.gauge import complex_scalars
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.pipeline import apply_edit
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.site import Path, Site
from attnopt.compiler.site_weights import read_weight
from attnopt.compiler.trace import trace

VOCABULARY, LAYERS = 40, 1
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_SIZES, "num_key_value_heads": 4}),
    "grouped": ("Llama", {**_SIZES, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "biased": ("Llama", {**_SIZES, "num_key_value_heads": 4, "attention_bias": True}),
    "normed": ("Qwen3", {**_SIZES, "num_key_value_heads": 4, "head_dim": 8}),
    "partial": ("GPTNeoX", {**_SIZES, "rotary_pct": 0.5, "hidden_size": 48}),
    "learned": (
        "GPT2",
        {
            "n_embd": 32,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 256,
            "vocab_size": VOCABULARY,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "alibi": (
        "Mpt",
        {
            "d_model": 32,
            "n_layers": LAYERS,
            "n_heads": 4,
            "vocab_size": VOCABULARY,
            "max_seq_len": 256,
        },
    ),
    # Its views join the batch and the heads in one axis; its softmax is in float32, always.
    "bloom": (
        "Bloom",
        {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCABULARY},
    ),
    # No positions at all.
    "none": (
        "SmolLM3",
        {**_SIZES, "num_key_value_heads": 4, "no_rope_layers": [0], "pad_token_id": 0},
    ),
    # One product, split by groups of queries with their key and value, which it then repeats.
    "by groups": (
        "Falcon",
        {
            "hidden_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 8,
            "num_kv_heads": 4,
            "new_decoder_architecture": True,
            "alibi": False,
            "vocab_size": VOCABULARY,
        },
    ),
    # A norm over all heads of a projection together, and one per head with weights of its own.
    "norm of all": ("Olmo2", {**_SIZES, "num_key_value_heads": 4, "pad_token_id": 0}),
    "own norms": ("StableLm", {**_SIZES, "num_key_value_heads": 4, "qk_layernorm": True}),
}
KINDS = tuple(sorted(_MODELS))
# These are traced in the eager spelling, the others as SDPA.
EAGER = ("alibi", "bloom", "grouped", "learned")


class _Logits(nn.Module):
    """Tokens in, `{"logits": ...}` out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(input_ids=input_ids, use_cache=False).logits}


@lru_cache(maxsize=16)
def raised(kind: str, dtype: torch.dtype = torch.float64) -> Program:
    """A model as a raised program with both dims dynamic. It is made once: work on a copy."""
    transformers = pytest.importorskip("transformers")
    family, settings = _MODELS[kind]
    config = getattr(transformers, f"{family}Config")(**settings)
    config._attn_implementation = "eager" if kind in EAGER else "sdpa"
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, head)(config).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(0, VOCABULARY, (2, 11))
    loaded = Loaded(_Logits(model).eval(), None, (), {"input_ids": ids}, kind, "callable")
    program = raise_program(trace(loaded))
    assert len(program.sites) == LAYERS, program.unraised
    return program


def tokens(batch: int, seq: int, seed: int = 0, valid: Tensor | None = None) -> Batch:
    """Random tokens as one call."""
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (batch, seq), generator=made)
    return Batch((), {"input_ids": ids}, valid)


def notes(program: Program, seq: int = 24) -> Notes:
    """Calibration and held-out tokens for a program that is its own original."""
    calibration = [tokens(4, seq, seed) for seed in (1, 2, 3)]
    return Notes(program, calibration, [tokens(4, seq, 9)])


def logits(program: Program, batch: Batch) -> Tensor:
    """The logits for one batch."""
    return cast(Tensor, program.run(batch)["logits"])


def distance(a: Program, b: Program, batch: Batch | None = None) -> float:
    """Relative difference of two programs' logits."""
    given = tokens(3, 19, 7) if batch is None else batch
    expected = logits(b, given)
    return float((logits(a, given) - expected).norm() / expected.norm())


def applied(program: Program, rewrite: Pass, known: Notes) -> tuple[Program, list[Edit]]:
    """The program with a pass applied at every site; fails where it misses."""
    edits = []
    for id in [site.id for site in program.sites]:
        site = program.site(id)
        edit = rewrite.rewrite(site, program, known)
        assert isinstance(edit, Edit), edit
        program = apply_edit(program, site, edit)
        edits.append(edit)
    return program, edits


@lru_cache(maxsize=32)
def rewritten(kind: str, line: str) -> tuple[Program, Edit]:
    """A model of `raised` after a pass on its one attention, with the edit."""
    program = raised(kind)
    edit = read_pass(line).rewrite(program.sites[0], program, notes(program))
    assert isinstance(edit, Edit), edit
    return apply_edit(program, program.sites[0], edit), edit


def missed(program: Program, rewrite: Pass, known: Notes) -> Miss:
    """What a pass says at the first site, where it must miss."""
    answer = rewrite.rewrite(program.sites[0], program, known)
    assert isinstance(answer, Miss), answer
    return answer


def redundant(program: Program, factor: int, turns: bool = True) -> Program:
    """A copy in which the key/value heads of a group are images of its first head.

    Keys differ by a complex number per rotary pair and by a matrix on the other dims, values by a
    matrix. Without `turns` they are equal.
    """
    made = program.copy()
    for site in made.sites:
        for which in ("k", "v"):
            _tie(made, site, which, factor, turns)
    return made


def _tie(program: Program, site: Site, which: str, factor: int, turns: bool) -> None:
    path = cast(Path, getattr(site, which))
    weight, bias = read_weight(program, path)
    dim = weight.shape[1]
    pairs = site.rotary.pairs if site.rotary and which == "k" else torch.empty(0, 2).long()
    maps = torch.eye(dim, dtype=torch.float64).repeat(len(weight), 1, 1)
    if turns:
        free = torch.tensor([d for d in range(dim) if d not in set(pairs.reshape(-1).tolist())])
        for h in range(len(weight)):
            maps[h] = complex_scalars(dim, pairs, torch.randn(len(pairs), dtype=torch.complex64))
            if len(free):
                mixer = torch.randn(len(free), len(free), dtype=torch.float64)
                maps[h][free[:, None], free[None, :]] = mixer
    first = torch.arange(len(weight)) // factor * factor
    put(program, path, maps @ weight[first], None if bias is None else maps @ bias[first, :, None])


def put(program: Program, path: Path, weight: Tensor, bias: Tensor | None) -> None:
    """Write a projection `[heads, dim, width]` and its bias `[heads, dim]` in place."""
    old = program.weight(path.weight).detach()
    new = old.clone()
    rows = new if path.layout == "out_in" else new.T
    rows[path.channels.reshape(-1)] = weight.reshape(-1, weight.shape[-1]).to(old.dtype)
    program.set_weight(path.weight, new)
    if bias is not None and path.bias is not None:
        new_bias = program.weight(path.bias).detach().clone()
        new_bias[path.channels.reshape(-1)] = bias.reshape(-1).to(old.dtype)
        program.set_weight(path.bias, new_bias)


def fused(program: Program) -> Program:
    """A copy whose sites say that nothing is known of their projections."""
    bare = [replace(site, k=None, missing={"k": "made so"}) for site in program.sites]
    return program.copy().with_sites(bare)
