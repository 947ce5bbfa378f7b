"""Single steps under torch.compile: the same tokens, and a way back where none can be compiled."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

from attnopt.compiler import native
from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.few_rows import with_few_rows
from attnopt.compiler.decode.generate import Generation, generate
from tests.compiler.decode.test_derive import Small, traced
from tests.tolerance import assert_close

IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))
HOW = Generation(max_new_tokens=6)


def small(mix: str = "") -> Decoder:
    return derive(traced(Small(mix), input_ids=torch.randint(0, 50, (2, 12))))


def test_compiled_steps_give_the_same_tokens() -> None:
    decoder = small("convolved")
    assert decoder.convolutions
    expected = generate(decoder, IDS, HOW)
    torch._dynamo.reset()
    counters.clear()
    decoder.compile()
    assert torch.equal(generate(decoder, IDS, HOW), expected)
    assert decoder._single is not None and decoder._single.compiled.form is not None
    assert counters["stats"]["unique_graphs"] == 1  # whatever the position
    torch._dynamo.reset()


def test_later_steps_of_a_state_skip_the_guards() -> None:
    """The token and the position go to the right places, also after rewinding and growing."""
    decoder, whole = small(), small()
    torch._dynamo.reset()
    decoder.compile()
    states = [each.state(2, 12) for each in (decoder, whole)]
    for each, state in zip((decoder, whole), states, strict=True):
        each.prefill(state, IDS, last=True)

    def step(token: int) -> None:
        made, wanted = (
            each.step(state, torch.full((2, 1), token), last=True)
            for each, state in zip((decoder, whole), states, strict=True)
        )
        assert_close(made, wanted)

    guarded = list[int]()
    single = decoder._single
    assert single is not None
    form = single.compiled.form

    def counted(*args: Any) -> Any:
        guarded.append(args[-1])
        return form(*args)

    single.compiled.form = counted
    for token in (4, 9, 30, 17):
        step(token)
    assert guarded == [7, 8]
    known = states[0].compiled
    assert known is not None and known.bound is not None
    assert known.bound.positions == range(7, 12)
    for each, state in zip((decoder, whole), states, strict=True):
        each.rewind(state, 8)
    step(21)
    assert guarded == [7, 8]
    for each, state in zip((decoder, whole), states, strict=True):
        each.grow(state, 16)
    for token in (5, 6, 7):
        step(token)
    assert guarded == [7, 8, 9, 10]  # the caches are others
    made = decoder.step(states[0], torch.full((2, 1), 3, dtype=torch.int32), last=True)
    assert guarded == [7, 8, 9, 10, 12]  # a token of another dtype
    assert_close(made, whole.step(states[1], torch.full((2, 1), 3), last=True))
    torch._dynamo.reset()


def test_where_nothing_can_be_compiled_it_goes_on_with_one_warning() -> None:
    def broken(module: Any, example: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    decoder = small()
    expected = generate(decoder, IDS, HOW)
    decoder.compile()
    assert decoder._single is not None
    decoder._single.compiled.form = torch.compile(decoder._single.module, backend=broken)
    with pytest.warns(RuntimeWarning, match=r"A507\]: the decoder's step runs uncompiled") as told:
        assert torch.equal(generate(decoder, IDS, HOW), expected)
    assert len([w for w in told if "A507" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        generate(decoder, IDS, HOW)


def test_a_compiled_step_runs_the_operators_in_cpp() -> None:
    decoder = small()
    state, eager = decoder.state(2, 12), decoder.state(2, 12)
    for each in (state, eager):
        decoder.prefill(each, IDS, last=True)
    expected = decoder.step(eager, IDS[:, :1], last=True)
    decoder.compile()
    assert decoder._single is not None
    few = [
        node for node in decoder._single.module.graph.nodes
        if node.target is torch.ops.attnopt.few_rows.default
    ]  # fmt: skip
    assert few and not decoder._single.module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.linear.default
    )
    torch._dynamo.reset()
    assert_close(decoder.step(state, IDS[:, :1], last=True), expected)
    torch._dynamo.reset()


def test_where_the_operators_cannot_be_built_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ready", lambda: "no C++ compiler `c++`")
    decoder = small()
    with pytest.warns(RuntimeWarning, match=r"A507\]: the decoder's step runs torch's own"):
        decoder.compile()
    assert decoder._single is not None
    names = {str(node.target) for node in decoder._single.module.graph.nodes}
    assert "aten.linear.default" in names and "attnopt.few_rows.default" not in names


def test_linear_maps_of_one_input_are_one_call() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.ModuleList(nn.Linear(12, 4 + n, bias=n != 1) for n in range(4))
            self.wide = nn.Linear(12, 5).double()

        def forward(self, x: Tensor) -> list[Tensor]:
            return [*(each(x) for each in self.maps), self.wide(x.double())]

    assert native.ready() == ""
    x, model = torch.randn(1, 3, 12), Maps().eval()
    made = torch.export.export(model, (x,)).run_decompositions({}).module()
    assert isinstance(made, fx.GraphModule)
    found = with_few_rows(made)
    few = torch.ops.attnopt.few_rows.default
    assert len(found.graph.find_nodes(op="call_function", target=few)) == 2  # of four in float32
    for got, wanted in zip(found(x), model(x), strict=True):
        assert_close(got, wanted)


def test_weights_that_lose_nothing_are_read_in_16_bits() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.brief, self.brain, self.whole = (nn.Linear(12, 4) for _ in range(3))
            self.brief.weight.data = self.brief.weight.data.half().float()
            self.brain.weight.data = self.brain.weight.data.bfloat16().float() * 2.0**-30
            self.again = nn.Linear(12, 4)
            self.again.weight = self.brief.weight

        def forward(self, x: Tensor) -> list[Tensor]:
            return [each(x) for each in (self.brief, self.brain, self.whole, self.again)]

    assert native.ready() == ""
    x, model = torch.randn(1, 3, 12), Maps().eval()
    with torch.no_grad():
        model.whole.weight[0, 0] = 1 + 2.0**-20
    made = torch.export.export(model, (x,)).run_decompositions({}).module()
    assert isinstance(made, fx.GraphModule)
    found = with_few_rows(made)
    copies = {name: b.dtype for name, b in found.named_buffers() if name.startswith("_few_rows")}
    assert sorted(map(str, copies.values())) == ["torch.bfloat16", "torch.float16"]
    for got, wanted in zip(found(x), model(x), strict=True):
        assert_close(got, wanted)
