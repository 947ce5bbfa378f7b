"""`torch.compile(model, backend="attnopt")`: what is rewritten, what is left, what is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from attnopt.compiler import backend
from attnopt.compiler.raising.anchor import SOFTMAX
from tests.families import FAMILIES, Nano
from tests.tolerance import assert_close
from tests.zoo.architecture import Architecture
from tests.zoo.survey import ALL


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Watching:
    """The backend without Inductor: the rewritten graphs run as they are."""

    def __init__(self) -> None:
        self.made: list[fx.GraphModule | None] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        numbers = [x.node.hint if isinstance(x, torch.SymInt) else x for x in inputs]
        found = backend._rewritten(graph, numbers)
        self.made.append(found[0] if found else None)
        return found[0].forward if found else graph.forward

    def softmaxes(self) -> int:
        """How many written-out softmaxes are left."""
        return sum(n.target in SOFTMAX for made in self.made if made for n in made.graph.nodes)


def _architecture(name: str) -> Architecture:
    return next(a for a in ALL if a.name == name)


@pytest.mark.parametrize("name", ["Llama", "GPT-Neo", "T5", "BERT", "MPT (ALiBi)"])
def test_the_eager_spelling_is_fused_at_any_size_in_two_graphs(name: str) -> None:
    """GPT-Neo's masks are buffers, T5 writes in place, BERT is padded."""
    pytest.importorskip("transformers")
    architecture = _architecture(name)
    model, watching = architecture.build("eager"), Watching()
    compiled = torch.compile(model, backend=watching)
    with torch.no_grad():
        for shape in ((2, 12), (3, 17), (4, 9), (2, 31)):
            inputs = architecture.inputs(*shape)
            assert_close(compiled(**inputs), model(**inputs), f"{name} at {shape}")
    assert len(watching.made) == 2 and None not in watching.made
    assert watching.softmaxes() == 0


def test_weights_stay_inputs_in_their_order() -> None:
    model, watching = Nano().eval(), Watching()
    given: list[list[str]] = []

    def both(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        given.append([n.name for n in graph.graph.nodes if n.op == "placeholder"])
        return watching(graph, inputs)

    torch.compile(model, backend=both)(torch.randn(2, 9, 64))
    (made,) = watching.made
    assert made is not None
    assert [n.name for n in made.graph.nodes if n.op == "placeholder"] == given[0]
    assert not [n for n in made.graph.nodes if n.op == "get_attr"]


def test_gradients_are_those_of_the_model() -> None:
    model, x = Nano().eval(), torch.randn(2, 9, 64)
    model(x).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    watching = Watching()
    torch.compile(model, backend=watching)(x).square().sum().backward()
    assert watching.softmaxes() == 0 and None not in watching.made
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and expected[name] is not None
        assert_close(parameter.grad, expected[name], name)


def test_active_dropout_is_left_alone() -> None:
    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scores = (x @ x.transpose(-1, -2)).softmax(-1)
            made: Tensor = nn.functional.dropout(scores, 0.5, self.training) @ x
            return made

    watching = Watching()
    torch.compile(Dropping().train(), backend=watching)(torch.randn(2, 4, 9, 16))
    assert watching.made == [None]


def test_a_mask_buffer_that_is_written_to_later(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(backend._log, "warning", lambda *words: said.append(words[0]))
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda module, inputs, config_patches: module)
    model, x = Nano().eval(), torch.randn(2, 9, 64)
    compiled = torch.compile(model, backend=backend.attnopt)
    with torch.no_grad():
        assert_close(compiled(x), model(x), "as compiled")
        assert not said
        for block in model.blocks:
            block.bias.fill_(1)  # every token sees every other one now
        assert_close(compiled(x), model(x), "after the write")
        compiled(x)
    (words,) = said
    assert "a buffer that holds a mask" in words and "the graph runs as it was given" in words


def test_a_rewrite_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from attnopt.passes.fuse_attention import FuseAttention

    honest = FuseAttention.rewrite

    def lying(self: Any, target: Any, program: Any, notes: Any) -> Any:
        edit = honest(self, target, program, notes)
        spec = edit.spec.with_(scale=2 * edit.spec.scale)
        return type(edit)(spec=spec)

    monkeypatch.setattr(FuseAttention, "rewrite", lying)
    model, x, watching = Nano().eval(), torch.randn(2, 9, 64), Watching()
    made = torch.compile(model, backend=watching)(x)
    assert watching.made == [None]
    assert_close(made, model(x), "left as it was")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"plans": 1}, "no option `plans`"), ({"check": 1}, "True or False"),
     ({"inductor": 1}, "a mapping")],
)  # fmt: skip
def test_options_that_mean_nothing(options: dict[str, Any], said: str) -> None:
    compiled = torch.compile(Nano().eval(), backend=backend.attnopt, options=options)
    with pytest.raises(Exception, match=said):
        compiled(torch.randn(2, 9, 64))


@pytest.mark.slow
def test_by_name_with_inductor_autocast_and_training() -> None:
    """The backend is found by its name without an import of attnopt, and Inductor compiles what it
    gives."""
    family = next(f for f in FAMILIES if f.name == "nano")
    model, inputs = family.build("plain"), family.inputs(2, 9)
    compiled = torch.compile(model, backend="attnopt")
    made = compiled(**inputs)
    assert_close(made, model(**inputs), "by name")
    made.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert_close(compiled(**inputs), model(**inputs), "under autocast")
