"""Which names pass, which do not, and what the flags open."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake import load
from attnopt.compiler.intake.allow import Refused, check
from attnopt.compiler.intake.scan import Global, Scan


def verdict(module: str, name: str, *, called: bool = False) -> str:
    """Why the name is refused, or an empty string."""
    item = Global(module, name)
    refused = check(Scan({item}, {item} if called else set()))[1]
    return refused[0].why if refused else ""


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.nn.modules.linear", "Linear"),
        ("torch.nn.modules.transformer", "TransformerEncoderLayer"),
        ("torch.nn.functional", "relu"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("collections", "OrderedDict"),
        ("collections", "deque"),
        ("transformers.models.llama.modeling_llama", "LlamaAttention"),
        ("transformers.models.llama.configuration_llama", "LlamaConfig"),
        ("transformers.generation.configuration_utils", "GenerationConfig"),
        ("transformers.activations", "GELUActivation"),
    ],
)
def test_what_models_are_made_of_passes(module: str, name: str) -> None:
    assert verdict(module, name) == ""


@pytest.mark.parametrize(
    ("module", "name", "why"),
    [
        ("posix", "system", "any command"),
        ("builtins", "eval", "any command"),
        ("builtins", "getattr", "any command"),
        ("subprocess", "Popen", "any command"),
        ("functools", "partial", "not a library"),
        ("torch.hub", "load", "not a library"),
        ("torch", "load", "not a library"),
        ("torch.nn.modules.linear", "init", "a function"),
        ("torch.nn.modules.linear", "Missing", "no such name"),
        ("transformers.models.llama.modeling_llama", "eager_attention_forward", "a function"),
        ("transformers.models.llama.modeling_llama", "Callable", "borrowed from"),
        ("transformers.models.auto.auto_factory", "_BaseAutoModelClass", "neither a module"),
        ("transformers.models.nowhere", "Model", "does not import"),
        ("transformers.__main__", "Model", "not a plain name"),
        ("transformers", "PreTrainedModel.from_pretrained", "a function"),
    ],
)
def test_everything_else_does_not(module: str, name: str, why: str) -> None:
    assert why in verdict(module, name)


def test_a_library_class_may_be_restored_but_not_called() -> None:
    assert "calls it" in verdict("torch.nn.modules.linear", "Linear", called=True)


def test_weights_and_inputs_hold_no_modules() -> None:
    scan = Scan({Global("torch.nn.modules.linear", "Linear")})
    path = "torch.nn.modules.linear.Linear"
    assert check(scan, tensors_only=True)[1] == [Refused(path, "not a tensor")]


def test_unknown_global_is_refused_with_its_flag_and_not_imported(
    stranger: Path, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(Problem) as caught:
        load(str(stranger), inputs=inputs)
    assert caught.value.code == "A102"
    assert "--allow-global strangers.Block" in caught.value.help
    assert "--trust" in caught.value.help
    assert "strangers" not in sys.modules and not (tmp_path / "imported").exists()


def test_allow_global_opens_that_name(stranger: Path, inputs: Path) -> None:
    loaded = load(str(stranger), inputs=inputs, allow_globals=["strangers.Block"])
    assert loaded.module is not None and not loaded.module.training
    assert type(loaded.module).__name__ == "Block"


def test_allow_global_opens_no_other_name(stranger: Path, inputs: Path) -> None:
    with pytest.raises(Problem, match=r"strangers\.Block"):
        load(str(stranger), inputs=inputs, allow_globals=["strangers.Other"])


def test_allow_global_of_nothing(stranger: Path, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "strangers.py").write_text("")
    with pytest.raises(Problem) as caught:
        load(str(stranger), inputs=inputs, allow_globals=["strangers.Block"])
    assert caught.value.code == "A105"


def test_trust_opens_the_whole_file(stranger: Path, inputs: Path) -> None:
    assert type(load(str(stranger), inputs=inputs, trust=True).module).__name__ == "Block"


def test_the_allow_list_does_not_stay_open(stranger: Path, inputs: Path) -> None:
    load(str(stranger), inputs=inputs, allow_globals=["strangers.Block"])
    left = [getattr(item, "__name__", "") for item in torch.serialization.get_safe_globals()]
    assert "Block" not in left


def test_a_module_with_many_layer_kinds_loads(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
    torch.save(nn.TransformerEncoder(layer, 2), tmp_path / "model.pt")
    torch.save(torch.randn(2, 5, 8), tmp_path / "x.pt")
    loaded = load(str(tmp_path / "model.pt"), inputs=tmp_path / "x.pt")
    assert loaded.kind == "pickle" and loaded.sequence_dims == {"src": {0: "batch", 1: "seq"}}
