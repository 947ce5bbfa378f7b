"""A model of Llama's build whose attentions were given latents, as transformers' DeepSeek-V3.

What the family has that the plan has not, and how it comes to nothing:

* a norm on the latent: one more number in the latent, a constant (see `unnormed`), that comes from
  the bias of the projection (`attention_bias`), and that carries the biases of keys and values;
* the softmax scale (nope + rope)^(-1/2): the quotient to the plan's is in the queries;
* queries without bias: where the model has one, they go through `q_a_proj` = (1, constant), and the
  biases are a column of `q_b_proj`;
* experts: none, all layers are dense (`first_k_dense_replace`);
* one rank and one list of frequencies for all layers: narrower layers are padded with zeros.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.checkpoint.changes import Changes, refusal
from attnopt.compiler.checkpoint.latents import Maps
from attnopt.compiler.checkpoint.names import Names
from attnopt.compiler.checkpoint.settings import Settings, settings
from attnopt.compiler.checkpoint.sizes import building
from attnopt.compiler.checkpoint.turns import model_frequencies, places, rope, together
from attnopt.compiler.checkpoint.unnormed import longest, unnormed
from attnopt.compiler.intake.weightless import weightless

_FAMILY = "deepseek_v3"
_BUILD = f"{_FAMILY} has pre-norm blocks with root-mean-square norms and gated MLPs"
_HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model")
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "id2label", "label2id",
    "problem_type", "dtype",
)  # fmt: skip


_NEEDED = (
    "hidden_act", "rms_norm_eps", "hidden_size", "num_hidden_layers", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is one for all layers: the width of the latent with its constant, the frequencies that
    turn, the dims of a head, and whether queries have a bias."""

    heads: int
    rank: int
    frequencies: Tensor
    dim: int
    v_dim: int
    biased: bool

    @property
    def scale(self) -> float:
        """The family's softmax scale."""
        return 1.0 / math.sqrt(self.dim + 2 * len(self.frequencies))


@dataclass(frozen=True)
class Converted:
    """The config of the new model, of class `kind`; `maps` are its attentions' by module."""

    settings: Settings
    kind: type
    maps: Mapping[str, Maps]
    sizes: Sizes

    def model(self, named: Mapping[str, Tensor]) -> Any:
        """The new model with its weights; `named` are the original's, with what the plan wrote
        under the same names.

        Raises `Problem` A521 for a weight that one of the two models has alone.
        """
        return _filled(self, named)


def converted(hf: Any, made: Changes, names: Names, maps: Mapping[str, Maps]) -> Converted:
    """What the original `hf` becomes with these maps.

    Raises `Problem` A521 for a model that is not of Llama's build, and for attentions of different
    sizes.
    """
    exact = {
        module: replace(found, frequencies=model_frequencies(hf, found.frequencies))
        for module, found in maps.items()
    }
    fields = settings(hf, replace(made, pairs=()), names)
    own = fields.config.get_text_config()
    sizes = _sizes(exact)
    family = importlib.import_module(f"transformers.models.{_FAMILY}.modeling_{_FAMILY}")
    config = _config(own, sizes, family)
    after = config.to_dict()
    before = own.to_dict()
    told = {
        name: (before.get(name), after[name])
        for name in (
            "model_type", "num_attention_heads", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim",
            "qk_rope_head_dim", "v_head_dim", "attention_bias", "rope_parameters",
        )
        if before.get(name) != after[name]
    }  # fmt: skip
    head = next((head for head in _HEADS if type(hf).__name__.endswith(head)), "")
    kind = getattr(family, f"DeepseekV3{head}", None)
    if kind is None:
        raise refusal(f"there is no {_FAMILY} of the kind of {type(hf).__name__}")
    return Converted(
        replace(fields, config=config, told={**fields.told, **told}), kind, exact, sizes
    )


def _sizes(maps: Mapping[str, Maps]) -> Sizes:
    first = next(iter(maps.values()))
    for module, found in maps.items():
        shape = (len(found.query), found.dim, found.v_dim)
        if shape != (len(first.query), first.dim, first.v_dim):
            raise refusal(
                f"its {shape[0]} heads have {shape[1]} and {shape[2]} dims", where=module,
                why="a config says one number for all layers",
            )  # fmt: skip
    every = together(found.frequencies for found in maps.values())
    every = every if len(every) else torch.ones(1, dtype=torch.float64)  # the family has one pair
    biased = any(
        bool(side[..., -1].any()) for found in maps.values()
        for side in (found.query, found.query_turn)
    )  # fmt: skip
    rank = 1 + max(len(found.down) for found in maps.values())
    return Sizes(len(first.query), rank, every, first.dim, first.v_dim, biased)


def _config(own: Any, sizes: Sizes, family: Any) -> Any:
    given = own.to_dict()
    missing = [name for name in _NEEDED if given.get(name) is None]
    if missing:
        raise refusal(
            f"the config of {own.model_type} has no {missing[0]}",
            why=_BUILD,
        )
    kept = {name: given[name] for name in _KEPT if name in given}

    def made(parameters: dict[str, Any]) -> Any:
        return family.DeepseekV3Config(
            **kept, kv_lora_rank=sizes.rank, qk_nope_head_dim=sizes.dim, v_head_dim=sizes.v_dim,
            q_lora_rank=own.hidden_size + 1 if sizes.biased else None,
            qk_rope_head_dim=2 * len(sizes.frequencies), attention_bias=True,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads, rope_interleave=False,
            first_k_dense_replace=own.num_hidden_layers, num_mtp_layers=0,
            rope_parameters=dict(parameters),
        )  # fmt: skip

    def table(parameters: dict[str, Any]) -> Tensor:
        found: Tensor = family.DeepseekV3RotaryEmbedding(made(parameters)).inv_freq
        return found

    given_rope = getattr(own, "rope_parameters", None) or {}
    with building(own):
        return made(rope(given_rope, sizes.frequencies, own.max_position_embeddings, table))


def _filled(made: Converted, named: Mapping[str, Tensor]) -> Any:
    fields, maps = made.settings, made.maps
    with weightless(), building(fields.config):
        model = made.kind(fields.config)
    found, used = dict[str, Tensor](), set[str]()
    for module in sorted(_attentions(model)):
        old = fields.place(module)
        norm = f"{old.rpartition('.')[0]}.input_layernorm.weight"
        taken = {name for name in named if name.startswith(f"{old}.")}
        if not taken or norm not in named:
            raise refusal(
                f"the original has no attention {old} with its norm", where=old, why=_BUILD
            )
        like = named[min(taken)]
        weights = _weights(maps.get(old), made.sizes, fields.config, named[norm], like.dtype)
        found |= {f"{module}.{name}": value.to(like.dtype) for name, value in weights.items()}
        used |= taken
    for name, like in model.state_dict().items():
        if name in found:
            continue
        old = fields.place(name)
        if old not in named or named[old].shape != like.shape:
            raise refusal(
                f"the new model has a weight {name} that the old one has not", where=name,
                why=_BUILD,
            )  # fmt: skip
        found[name] = named[old]
        used.add(old)
    for name in named:
        if name not in used and not fields.drops(name):
            raise refusal(f"{_FAMILY} has no place for {name}", where=name)
    model.load_state_dict(found, strict=True, assign=True)
    model.tie_weights()
    for part in model.modules():
        if getattr(part, "rope_type", "") == "longrope":
            part.rope_type = "default"  # else it writes its table, the same one, at every call
    return model.eval()


def _attentions(model: Any) -> set[str]:
    last = ".kv_a_proj_with_mqa.weight"
    return {name.removesuffix(last) for name in model.state_dict() if name.endswith(last)}


def _weights(
    maps: Maps | None, sizes: Sizes, config: Any, norm: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The weights of one attention, float64; zeros for one that was deleted."""
    width, heads = config.hidden_size, sizes.heads
    turning = len(sizes.frequencies)
    if maps is None:
        dims = sizes.dim + sizes.v_dim
        empty = torch.zeros(heads, 0, width + 1, dtype=torch.complex128)
        zero = torch.zeros(heads, sizes.dim, width + 1, dtype=torch.float64)
        maps = Maps(
            zero, zero[0, :0, 1:], zero.new_zeros(heads, dims, 1), empty, empty[0],
            zero.new_zeros(0), zero.new_zeros(width, heads * sizes.v_dim), None, frozenset(),
        )  # fmt: skip
    at = places(maps.frequencies, sizes.frequencies)
    query, key = (
        torch.zeros(*side.shape[:-2], 2 * turning, width + 1, dtype=torch.float64)
        for side in (maps.query_turn, maps.key_turn)
    )
    for side, numbers in ((query, maps.query_turn), (key, maps.key_turn)):
        side[..., at, :], side[..., turning + at, :] = numbers.real, numbers.imag
    queries = torch.cat((maps.query, query), 1).flatten(0, 1) / sizes.scale
    latent = unnormed(maps.down, maps.up.flatten(0, 1), sizes.rank, longest(maps.down, norm), dtype)
    found = {
        "kv_a_proj_with_mqa.weight": torch.cat((latent.weight, key[:, :-1])),
        "kv_a_proj_with_mqa.bias": torch.cat((latent.bias, key[:, -1])),
        "kv_a_layernorm.weight": latent.gamma,
        "kv_b_proj.weight": latent.after,
        "o_proj.weight": maps.out,
        "o_proj.bias": maps.out.new_zeros(width) if maps.bias is None else maps.bias,
    }
    if not sizes.biased:
        return {**found, "q_proj.weight": queries[:, :-1]}
    largest = math.sqrt(width) * float(norm.abs().max())
    through = unnormed(torch.eye(width).double(), queries, width + 1, largest, dtype)
    return {
        **found, "q_a_proj.weight": through.weight, "q_a_proj.bias": through.bias,
        "q_a_layernorm.weight": through.gamma, "q_b_proj.weight": through.after,
    }  # fmt: skip
