"""Plans with `latent_kv` as checkpoints of DeepSeek-V3: the function of the optimized program where
attnopt is not there, and a reason wherever the family has no place for something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.compiler.checkpoint import write_checkpoint
from attnopt.compiler.checkpoint.changes import Changes, changes
from attnopt.compiler.checkpoint.deepseek import Converted, converted
from attnopt.compiler.checkpoint.latents import read_latents
from attnopt.compiler.checkpoint.names import Names
from attnopt.compiler.checkpoint.turns import places, rope, together
from attnopt.compiler.checkpoint.unnormed import longest, unnormed
from attnopt.compiler.checkpoint.weights import by_name
from attnopt.compiler.contract import Notes
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.intake.source import load
from attnopt.compiler.pipeline import apply_plan, read
from attnopt.compiler.plan import Plan, Step
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.spec import Mask
from tests.families import VOCABULARY
from tests.stock_transformers import generated
from tests.tolerance import assert_close

transformers = pytest.importorskip("transformers")
LENGTH, PROMPT, NEW = 12, 6, 64
_SIZES: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
}  # fmt: skip
# Keys and values are 64 numbers made of 24: 32 with rotary and 24 without hold all of them.
WHOLE = Step("latent_kv{keep=0.875 rotary=0.5715}")
CUT, EVEN = Step("latent_kv{}"), Step("latent_kv{even=true}")
_LAYERS = {"Llama": 2, "Qwen2": 1}
_PLANS: dict[str, tuple[str, tuple[Step, ...]]] = {
    "llama whole": ("Llama", (WHOLE,)),
    "llama cut": ("Llama", (CUT, Step("refit{damping=0.01}"))),
    "qwen2 whole": ("Qwen2", (WHOLE,)),
    "qwen2 even": ("Qwen2", (EVEN,)),
}
# The rank with its constant, the dims that turn at least (layers may turn with other frequencies),
# and whether the frequencies are a plain list.
_WRITTEN = {
    "llama whole": (25, 32, False),
    "llama cut": (17, 16, False),
    "qwen2 whole": (25, 32, False),
    "qwen2 even": (17, 16, True),
}


@dataclass(frozen=True)
class Given:
    """A tiny random model on disk, and read."""

    folder: Path
    loaded: Loaded
    program: Program

    def tokens(self, seed: int) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        return self.call(torch.randint(3, VOCABULARY, (8, LENGTH), generator=draw))

    def call(self, ids: Tensor) -> Batch:
        inputs = {"input_ids": ids}
        if "attention_mask" in self.loaded.kwargs:
            inputs["attention_mask"] = torch.ones_like(ids)
        return Batch((), inputs)


@lru_cache(maxsize=len(_LAYERS))
def given(family: str) -> Given:
    folder = Path(mkdtemp()) / "model"
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(num_hidden_layers=_LAYERS[family], **_SIZES)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    loaded = load(str(folder), length=LENGTH)
    return Given(folder, loaded, read(loaded))


@dataclass(frozen=True)
class Made:
    """What a plan made of a model."""

    of: Given
    plan: Plan
    program: Program
    outcomes: list[Any]

    @property
    def changes(self) -> Changes:
        return changes(self.of.program, self.program, self.outcomes)

    @property
    def hf(self) -> Any:
        return self.of.loaded.module.hf

    @property
    def names(self) -> Names:
        return Names.read(self.of.program, self.hf.state_dict(), self.of.loaded.root_prefix)

    @property
    def converted(self) -> Converted:
        found = self.changes
        return converted(self.hf, found, self.names, read_latents(found))

    @property
    def named(self) -> dict[str, Tensor]:
        return by_name(self.hf.state_dict(), self.changes, self.names)


@lru_cache(maxsize=len(_PLANS))
def made(name: str) -> Made:
    family, steps = _PLANS[name]
    model = given(family)
    plan = Plan((Step("fuse_attention"), *steps))
    notes = Notes(model.program, [model.tokens(1), model.tokens(2)], [model.tokens(3)])
    program, outcomes = apply_plan(model.program, plan, notes)
    assert {step.rewrite.split("{")[0] for step in plan.steps} == {
        outcome.rewrite.split("{")[0] for outcome in outcomes if outcome.applied
    }
    return Made(model, plan, program, outcomes)


def test_latents_in_stock_transformers(tmp_path: Path) -> None:
    """Whole ranks are the original too, cut ones are the optimized program alone."""
    folders = {name: str(tmp_path / name.replace(" ", "_")) for name in _PLANS}
    for name, folder in folders.items():
        found = made(name).converted
        found.model(made(name).named).save_pretrained(folder)
        config = found.settings.config
        plain = config.rope_parameters["rope_type"] == "default"
        rank, turning, listed = _WRITTEN[name]
        assert (config.kv_lora_rank, plain) == (rank, listed), name
        assert turning <= config.qk_rope_head_dim <= (32 if name == "llama cut" else turning), name
        assert (config.q_lora_rank is not None) == ("qwen2" in name)  # its queries have a bias
    prompt = torch.randint(3, VOCABULARY, (2, PROMPT))
    seen = generated(folders.values(), prompt, NEW, tmp_path)
    for name, folder in folders.items():
        logits, tokens = seen[folder]
        model = made(name)
        own = model.program.run(model.of.call(tokens))["logits"]
        assert_close(logits, own, name)
        assert tokens.shape[1] == PROMPT + NEW
        assert torch.equal(tokens[:, PROMPT:], own.argmax(-1)[:, PROMPT - 1 : -1]), name
        original = model.of.program.run(model.of.call(tokens))["logits"]
        if "whole" in name:
            assert_close(logits, original, name)
        else:
            assert float((logits - original).abs().max()) > 1e-2


def test_an_export_is_compared_and_told(tmp_path: Path) -> None:
    model, out = made("qwen2 whole"), tmp_path / "out"
    written = write_checkpoint(
        model.of.loaded, model.of.program, model.program, model.plan, model.outcomes,
        model.of.folder, out,
    )  # fmt: skip
    told = {field: now for field, (_, now) in written.settings.items()}
    assert written.family == "DeepseekV3ForCausalLM" and written.error < 1e-5
    assert told.keys() >= {"kv_lora_rank", "q_lora_rank", "rope_parameters", "attention_bias"}
    assert told["model_type"] == "deepseek_v3" and "latent_kv" not in written.kept
    assert {path.name for path in out.iterdir()} == set(written.files)


def _refused(what: Callable[[], Any]) -> Problem:
    with pytest.raises(Problem) as caught:
        what()
    assert caught.value.code == "A521"
    return caught.value


def test_every_attention_needs_a_latent() -> None:
    model = made("llama cut")
    site = model.program.sites[0]
    half = [replace(p, after=p.before) if p.before.id == site.id else p
            for p in changes(model.of.program, model.of.program, []).pairs]  # fmt: skip
    found = Changes(model.of.program, model.of.program, tuple(half), ())
    refused = _refused(lambda: read_latents(found))
    assert refused.where == site.module and "made of no latent" in refused.why
    assert "every attention" in refused.help


def test_what_the_family_has_not_is_refused() -> None:
    model = made("llama cut")
    more = {"model.layers.0.mlp.gate_proj.bias": torch.ones(32)}
    refused = _refused(lambda: model.converted.model(model.named | more))
    assert refused.where == next(iter(more)) and "no place" in refused.what
    less = {name: value for name, value in model.named.items() if "gate_proj" not in name}
    refused = _refused(lambda: model.converted.model(less))
    assert "gate_proj" in refused.where and "gated MLPs" in refused.why


@pytest.mark.parametrize(
    ("changed", "why"),
    [({"softcap": 30.0}, "soft cap"), ({"extras": ("sinks",)}, "sinks"),
     ({"mask": Mask("window", left=4)}, "window")],
)  # fmt: skip
def test_settings_of_an_attention_that_the_family_has_not(
    changed: dict[str, Any], why: str
) -> None:
    model = made("llama cut")
    program = model.program.copy()
    for site in program.sites:
        program.node(site.node).update_arg(4, program.spec(site).with_(**changed).text)
    found = changes(model.of.program, program, model.outcomes)
    assert why in _refused(lambda: read_latents(found)).why


def test_heads_that_differ_between_layers_are_refused() -> None:
    model, last = made("llama cut"), "model.layers.1.self_attn"
    maps = read_latents(model.changes)
    maps[last] = replace(maps[last], query=maps[last].query[:2])
    refused = _refused(lambda: converted(model.hf, model.changes, model.names, maps))
    assert refused.where == last and "2 heads" in refused.what


def test_narrower_layers_and_deleted_attentions_are_padded() -> None:
    model, last = made("llama cut"), "model.layers.1.self_attn"
    found = model.converted
    narrow = replace(
        found.maps[last], down=found.maps[last].down[:3], up=found.maps[last].up[..., -4:]
    )
    ids = torch.randint(3, VOCABULARY, (2, 9))
    filled = replace(
        narrow,
        down=torch.cat((narrow.down, torch.zeros(13, 24))),
        up=torch.cat((narrow.up[..., :3], torch.zeros(4, 32, 13), narrow.up[..., -1:]), 2),
    )
    results = [
        replace(found, maps={**found.maps, last: maps}).model(model.named)(ids).logits
        for maps in (narrow, filled)
    ]
    assert_close(results[0], results[1])
    first = {name: maps for name, maps in found.maps.items() if name != last}
    silent = replace(found, maps=first).model(model.named).model.layers[1].self_attn
    assert not any(bool(p.any()) for p in (silent.o_proj.weight, silent.q_proj.weight))
    assert bool(silent.kv_a_layernorm.weight.all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_passes_what_it_is_given(dtype: torch.dtype) -> None:
    """With the norm as the family has it, for inputs as long as a norm before it lets them be."""
    rank, width, size = 5, 16, 9
    down, up = torch.randn(rank, width).double(), torch.randn(7, rank + 1).double()
    norm = 1 + 0.2 * torch.randn(width)
    x = torch.randn(64, width)
    x = (norm * x * x.square().mean(1, keepdim=True).rsqrt()).double()
    bound = longest(down, norm)
    assert float((x @ down.T).norm(dim=1).max()) <= bound
    made = unnormed(down, up, size, bound, dtype)
    z = x @ made.weight.T + made.bias
    z = made.gamma * z * (z.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    wanted = x @ down.T @ up[:, :-1].T + up[:, -1]
    allowed = {torch.float32: 1.2e-10, torch.float16: 8e-6}[dtype]
    assert float((z @ made.after.T - wanted).abs().max() / wanted.abs().max()) <= allowed
    powers = torch.cat((made.gamma, made.bias[-1:])).log2()
    assert torch.equal(powers, powers.round())


def test_frequencies_of_all_layers_lie_in_one_list() -> None:
    layers = [torch.tensor(x).double() for x in ([0.25, 1.0, 1.0], [1.0, 0.5])]
    every = together(layers)
    assert every.tolist() == [1.0, 1.0, 0.5, 0.25]
    assert [places(x, every).tolist() for x in layers] == [[3, 0, 1], [0, 2]]


def test_a_list_is_written_in_the_plainest_way_that_gives_it() -> None:
    family = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")

    def table(parameters: dict[str, Any]) -> torch.Tensor:
        dims = 2 * len(every)
        config = transformers.DeepseekV3Config(
            qk_rope_head_dim=dims, rope_parameters=dict(parameters), num_hidden_layers=1
        )
        found: torch.Tensor = family.DeepseekV3RotaryEmbedding(config).inv_freq
        return found

    all_of_them = (1.0 / 500.0 ** (torch.arange(0, 16, 2).float() / 16)).double()
    for every, kind, given in (
        (all_of_them[::2], "default", {"rope_theta": 500.0}),
        (all_of_them[::2] / 4, "linear",
         {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}),
        (all_of_them[[0, 0, 1, 5]], "longrope", {"rope_theta": 500.0}),
    ):  # fmt: skip
        made = rope(given, every, 64, table)
        assert made.get("rope_type", "default") == kind
        assert float((table(made).double() / every - 1).abs().max()) < 2e-7
