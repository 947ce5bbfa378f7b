"""Single steps under torch.compile: the same tokens, and a way back where none can be compiled."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor import compile_fx as inductor

from attnopt.compiler import native
from attnopt.compiler.decode import Decoder, derive, linear_maps
from attnopt.compiler.decode.generate import Generation, generate
from attnopt.compiler.decode.linear_maps import LinearMaps
from attnopt.compiler.decode.state import State
from attnopt.compiler.errors import Problem
from attnopt.compiler.native import layouts
from tests.compiler.decode.test_derive import Small, traced, zoo
from tests.compiler.decode.test_shared_cache import Twice
from tests.tolerance import assert_close

pytestmark = pytest.mark.slow  # the operators are built, once per machine
IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))
HOW = Generation(max_new_tokens=6)


class Masked(Small):
    """The same attention among positions that are real."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(input_ids)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mask = causal & (attention_mask[:, None, None, :] != 0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        made: Tensor = self.head(x + self.out(y.transpose(1, 2).reshape(x.shape)))
        return made


def small(mix: str = "", masked: bool = False) -> Decoder:
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(0, 50, (2, 12))}
    if not masked:
        return derive(traced(Small(mix), **inputs))
    inputs["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
    return derive(traced(Masked(mix), **inputs))


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


class Both:
    """A compiled decoder and the same one as it was, read in step; which steps ran guarded."""

    def __init__(self, mix: str = "", masked: bool = False) -> None:
        self.fast, self.plain = small(mix, masked), small(mix, masked)
        self.fast.compile()
        self.guarded = list[int]()
        assert self.fast._single is not None
        compiled = self.fast._single.compiled
        form = compiled.form

        def counted(*args: Any) -> Any:
            self.guarded.append(args[-1])
            return form(*args)  # type: ignore[misc]

        compiled.form = counted

    def states(self, ids: Tensor, capacity: int, **masks: Tensor) -> tuple[State, State]:
        made = tuple(each.state(len(ids), capacity, masks) for each in (self.fast, self.plain))
        for each, state in zip((self.fast, self.plain), made, strict=True):
            each.prefill(state, ids, last=True)
        return made  # type: ignore[return-value]

    def step(self, states: tuple[State, State], token: int) -> None:
        given = torch.full((states[0].batch, 1), token)
        made, wanted = (
            each.step(state, given, last=True)
            for each, state in zip((self.fast, self.plain), states, strict=True)
        )
        assert_close(made, wanted)


@pytest.fixture
def both() -> Iterator[Both]:
    torch._dynamo.reset()
    yield Both()
    torch._dynamo.reset()


def test_later_steps_of_a_state_skip_the_guards(both: Both) -> None:
    """The token and the position go to the right places, also after rewinding and growing."""
    states = both.states(IDS, 12)
    for token in (4, 9, 30, 17):
        both.step(states, token)
    assert both.guarded == [7, 8]
    known = states[0].compiled
    assert known is not None and known.bound is not None
    assert known.bound.positions == range(7, 12)
    assert copy.deepcopy(states[0]).compiled is None
    for each, state in zip((both.fast, both.plain), states, strict=True):
        each.rewind(state, 8)
    both.step(states, 21)
    assert both.guarded == [7, 8]
    for each, state in zip((both.fast, both.plain), states, strict=True):
        each.grow(state, 16)
    for token in (5, 6, 7):
        both.step(states, token)
    assert both.guarded == [7, 8, 9, 10]  # the caches are others
    made = both.fast.step(states[0], torch.full((2, 1), 3, dtype=torch.int32), last=True)
    assert both.guarded == [7, 8, 9, 10, 12]  # a token of another dtype
    assert_close(made, both.plain.step(states[1], torch.full((2, 1), 3), last=True))


def test_the_next_tokens_are_the_most_likely(both: Both) -> None:
    """Of prompts, of steps that ask the guards and of those that do not."""
    fast, plain = both.states(IDS, 12)
    empty, other = both.plain.state(2, 12), both.plain.state(2, 12)
    wanted = both.plain.prefill(empty, IDS, last=True).argmax(-1)
    assert torch.equal(both.plain.next(other, IDS), wanted)
    for token in (4, 9, 30, 17, 2):
        given = torch.full((2, 1), token)
        found = both.fast.next(fast, given)
        assert torch.equal(found, both.plain.step(plain, given, last=True).argmax(-1))
        assert found.dtype == torch.int64 and found.shape == (2, 1)
    assert both.guarded == [7, 8] and fast.length == fast.reached == 12


def test_steps_that_skip_the_guards_say_what_does_not_fit(both: Both) -> None:
    state, _ = both.states(IDS, 10)
    for token in (4, 9, 30):
        both.fast.next(state, torch.full((2, 1), token))
    state.length = 9
    assert state.compiled is not None and state.compiled.bound is not None
    one, fewer, more = (torch.full((rows, 1), 3) for rows in (2, 1, 3))
    for given in ((), (one, one), (fewer,), (more,), (IDS[:, :0],)):
        with pytest.raises(Problem, match="A707"):
            both.fast.next(state, *given)
    with pytest.raises(Problem, match="9 tokens and 2 more do not fit into 10"):
        both.fast.next(state, IDS[:, :2])
    both.fast.next(state, IDS[:, :1])
    with pytest.raises(Problem, match="10 tokens and 1 more do not fit into 10"):
        both.fast.next(state, IDS[:, :1])
    assert state.length == 10


def test_tokens_whose_stride_moves_as_the_position_does(both: Both) -> None:
    """As slices of a tensor do that grows by what is generated."""
    states = both.states(IDS, 15)
    for width, token in ((8, 4), (9, 9), (10, 30), (10, 17), (10, 20), (30, 2), (1, 5)):
        given = torch.full((2, width), 99)  # no token of the model's
        given[:, -1] = token
        made = both.fast.step(states[0], given[:, -1:], last=True)
        assert_close(made, both.plain.step(states[1], given[:, -1:], last=True))
    assert both.guarded == [7, 8]


def test_outputs_that_are_not_the_graphs_are_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something is done to what the compiled graph gives, all of it runs."""

    whole = inductor.compile_fx

    def compile_fx(*args: Any, **how: Any) -> Callable[..., Any]:
        made = whole(*args, **how)
        # It calls itself, without the settings.
        return (lambda *given: [-x for x in made(*given)]) if "config_patches" in how else made

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    torch._dynamo.reset()
    fast, plain = small(), small()
    fast.compile()
    states = [each.state(2, 12) for each in (fast, plain)]
    for each, state in zip((fast, plain), states, strict=True):
        each.prefill(state, IDS, last=True)
    for token in (4, 9, 30, 17):
        given = torch.full((2, 1), token)
        assert_close(
            fast.step(states[0], given, last=True), -plain.step(states[1], given, last=True)
        )
    assert states[0].compiled is not None and states[0].compiled.bound is None
    torch._dynamo.reset()


def test_states_in_turn_and_in_another_order(both: Both) -> None:
    one, other = both.states(IDS, 12), both.states(IDS.flip(0)[:, :5], 10)
    for token in (4, 9, 30):
        both.step(one, token)
        both.step(other, token + 1)
    assert both.guarded == [7, 5, 8, 6]
    for each, state in zip((both.fast, both.plain), one, strict=True):
        each.reorder(state, torch.tensor([1, 1]))
    both.step(one, 8)
    both.step(other, 8)
    assert both.guarded == [7, 5, 8, 6, 10]


def test_a_prompt_of_one_token_and_one_sequence(both: Both) -> None:
    states = both.states(IDS[:1, :1], 9)
    for token in (4, 9, 30, 17, 3):
        both.step(states, token)
    assert len(both.guarded) < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_attend_in_cpp_whatever_the_dtype_of_the_cache(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Small("").to(dtype)
    decoder = derive(traced(model, input_ids=torch.randint(0, 50, (2, 12))))
    wide = derive(traced(copy.deepcopy(model).float(), input_ids=torch.randint(0, 50, (2, 12))))
    decoder.compile()
    states = [each.state(2, 12) for each in (decoder, wide)]
    for each, state in zip((decoder, wide), states, strict=True):
        each.prefill(state, IDS, last=True)
    token = torch.full((2, 1), 9)
    with torch.no_grad():
        decoder.step(states[0], token, last=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            made = decoder.step(states[0], token, last=True)
        wide.step(states[1], token, last=True)
        assert_close(made, wide.step(states[1], token, last=True))
    assert made.dtype == dtype
    assert "attnopt::one_token" in {event.key for event in seen.key_averages()}
    torch._dynamo.reset()


def test_padded_batches_skip_the_guards_too() -> None:
    torch._dynamo.reset()
    both = Both(masked=True)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    states = both.states(IDS, 12, attention_mask=mask)
    for token in (4, 9, 30, 17, 5):
        both.step(states, token)
    assert both.guarded[:2] == [7, 8] and len(both.guarded) <= 3  # the last one may be another form
    torch._dynamo.reset()


def test_weights_that_were_written_to_are_compiled_anew(both: Both) -> None:
    states = both.states(IDS, 12)
    for token in (4, 9, 30):
        both.step(states, token)
    with torch.no_grad():
        for decoder in (both.fast, both.plain):
            for weight in decoder.program.module.parameters():
                weight.mul_(1.25)
    states = both.states(IDS, 12)
    for token in (4, 9, 30):
        both.step(states, token)


def test_a_graph_that_fails_is_not_called_again() -> None:
    decoder = small()
    torch._dynamo.reset()
    decoder.compile()
    state, plain = decoder.state(2, 12), small()
    other = plain.state(2, 12)
    for each, of in ((decoder, state), (plain, other)):
        each.prefill(of, IDS, last=True)
    token = torch.full((2, 1), 4)
    assert_close(decoder.step(state, token, last=True), plain.step(other, token, last=True))
    assert decoder._single is not None and state.compiled is not None
    assert state.compiled.first is not None

    def failing(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    decoder._single.compiled.form = failing
    with pytest.warns(RuntimeWarning, match="A507"):
        decoder.step(state, token, last=True)
    plain.step(other, token, last=True)
    assert state.compiled.bound is None
    assert_close(decoder.step(state, token, last=True), plain.step(other, token, last=True))
    torch._dynamo.reset()


def test_a_compiled_decoder_can_be_let_go() -> None:
    torch._dynamo.reset()
    decoder = small()
    decoder.compile()
    generate(decoder, IDS, HOW)
    assert decoder._single is not None
    held = weakref.ref(decoder._single)
    del decoder
    gc.collect()
    assert held() is None
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


def test_weights_and_caches_lie_in_large_pages() -> None:
    """Each is the first of its own, and so begins with one."""
    module, *_ = _through_few_rows(nn.Linear(12, 4096))
    (weights,) = _read_by_operators(module)
    (cache,) = small().state(64, 300).caches
    for first in (weights, cache[0]):
        assert first.data_ptr() % (1 << 21) == 0


def test_where_the_operators_cannot_be_built_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ready", lambda: "no C++ compiler `c++`")
    decoder = small()
    with pytest.warns(RuntimeWarning, match=r"A507\]: the decoder runs torch's own"):
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

    found, wanted, x = _through_few_rows(Maps())
    few = torch.ops.attnopt.few_rows.default
    assert len(found.graph.find_nodes(op="call_function", target=few)) == 1  # for four in float32
    for got, want in zip(found(x), wanted, strict=True):
        assert_close(got, want)


def test_a_map_that_gates_another_is_one_call_with_it() -> None:
    class Units(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.ModuleList(nn.Linear(12, 40, bias=n % 3 > 0) for n in range(12))
            self.maps[1].weight.data = self.maps[1].weight.data.half().float()

        def forward(self, x: Tensor) -> list[Tensor]:
            silu, gelu, (a, b, c, d, e, f, g, h, i, j, k, m) = F.silu, F.gelu, self.maps
            read, shared = c(x), i(x)
            return [
                silu(e(x)) * d(x), f(x) * gelu(g(x), approximate="tanh"),
                gelu(h(x)) * j(x), silu(read) * k(x), read,  # another gate, one that is read
                silu(shared) * shared, silu(a(x)) * b(x), silu(m(x)) + 1,  # of itself, other dtypes
            ]  # fmt: skip

    found, wanted, x = _through_few_rows(Units())
    few = torch.ops.attnopt.few_rows.default
    calls = found.graph.find_nodes(op="call_function", target=few)
    assert sorted(int(node.args[5]) for node in calls) == [0, 0, 1, 2]
    assert not found.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    for got, want in zip(found(x), wanted, strict=True):
        assert_close(got, want)


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

    model = Maps()
    with torch.no_grad():
        model.whole.weight[0, 0] = 1 + 2.0**-20
    found, wanted, x = _through_few_rows(model)
    copies = {str(weights.dtype) for weights in _read_by_operators(found)}
    assert copies == {"torch.bfloat16", "torch.float16", "torch.float32"}
    for got, want in zip(found(x), wanted, strict=True):
        assert_close(got, want)


def _read_by_operators(module: Any) -> list[Tensor]:
    """The weights that calls of few_rows and many_rows read, each tensor once."""
    operators = torch.ops.attnopt.few_rows.default, torch.ops.attnopt.many_rows.default
    calls = [node for node in module.graph.nodes if node.target in operators]
    return [getattr(module, name) for name in {node.args[1].target: 0 for node in calls}]


def test_small_weights_lie_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few tensors as may be, unless they are large; each weight is kept once for all graphs."""
    for together, count in ((1 << 26, 1), (1, 3)):
        monkeypatch.setattr(linear_maps, "_TOGETHER", together)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 70, bias=False),
                              nn.ReLU(), nn.Linear(70, 12))  # fmt: skip
        maps = LinearMaps(torch.ops.attnopt.few_rows.default, layouts.panels)
        forms = [_through_few_rows(model, maps) for _ in range(2)]
        for form, wanted, x in forms:
            assert len(_read_by_operators(form)) == count
            assert_close(form(x), wanted)
        first, second = (_read_by_operators(form) for form, *_ in forms)
        assert [id(x) for x in first] == [id(x) for x in second]


def _through_few_rows(
    model: nn.Module, maps: LinearMaps | None = None
) -> tuple[fx.GraphModule, list[Tensor], Tensor]:
    assert native.ready() == ""
    x = torch.randn(1, 3, 12)
    made = torch.export.export(model.eval(), (x,)).run_decompositions({}).module()
    assert isinstance(made, fx.GraphModule)
    maps = maps or LinearMaps(torch.ops.attnopt.few_rows.default, layouts.panels)
    return maps.through(made), model(x), x


LONG = torch.randint(3, 50, (2, 70), generator=torch.Generator().manual_seed(2))


class Grouped(Small):
    """Query heads that share keys and values."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = self.qkv(x).split((32, 16, 48), -1)
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (q, k, v[..., :16]))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        made: Tensor = self.head(x + self.out(y.transpose(1, 2).reshape(x.shape)))
        return made


FORMS: dict[str, Callable[[], Decoder]] = {
    "plain": small,
    "masked": lambda: small(masked=True),
    "grouped": lambda: derive(traced(_seeded(lambda: Grouped("")), input_ids=LONG[:, :12])),
    "gated": lambda: derive(traced(_seeded(lambda: Twice("gated")), input_ids=LONG[:, :12])),
    "latent": lambda: derive(zoo("DeepSeek-V2 (MLA)", double=False), check=False),
}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_read_in_cpp_is_what_torch_reads(form: str) -> None:
    """A prompt, its chunks, several tokens after it, all logits or the last; the heads of a group,
    attentions that read padding, a gate or latents."""
    plain, fast = FORMS[form](), FORMS[form]()
    fast.compile()
    assert fast._cpp is not None
    states = [each.state(2, 60) for each in (plain, fast)]
    for last, of in ((False, LONG[:, :33]), (True, LONG[:, 33:49]), (False, LONG[:, 49:50])):
        made = [
            each.step(state, of, last=last)
            for each, state in zip((plain, fast), states, strict=True)
        ]
        assert_close(made[1], made[0])
    for one, other in zip(*(state.caches for state in states), strict=True):
        for x, y in zip(one, other, strict=True):
            assert_close(y, x)


def test_what_follows_a_prompt_runs_through_the_operators_too() -> None:
    decoder = small()
    decoder.compile()
    forms = [decoder._form(*how) for how in (("prefill", True), ("step", False))]
    for form in forms:
        assert isinstance(form, fx.GraphModule)
        assert "attention_in_cpp" in {getattr(n.target, "__name__", "") for n in form.graph.nodes}
    slack = decoder.with_slack(3)
    assert slack is decoder  # it has no windows
    kept = [{x.data_ptr() for x in _read_by_operators(form)} for form in forms]
    assert kept[0] & kept[1]  # once


def test_prompts_run_through_the_operators_in_cpp() -> None:
    decoder = small()
    decoder.compile()
    form = decoder._form("prefill", True)
    assert isinstance(form, fx.GraphModule)
    many, few = torch.ops.attnopt.many_rows.default, torch.ops.attnopt.few_rows.default
    units = torch.ops.attnopt.matrix_units()
    assert bool(form.graph.find_nodes(op="call_function", target=many)) == units
    last = form.graph.find_nodes(op="call_function", target=few)  # of the last position alone
    assert [node.args[4] for node in last] == [[32], [50]]


def test_under_autocast_torch_runs() -> None:
    plain, fast = small(masked=True), small(masked=True)
    fast.compile()
    form = fast._form("prefill", True)
    with torch.autocast("cpu", torch.bfloat16):
        assert fast._form("prefill", True) is not form
        states = [each.state(2, 12) for each in (plain, fast)]
        for of in (IDS, IDS[:, :1], IDS[:, 1:2]):
            made = [
                each.step(state, of, last=True)
                for each, state in zip((plain, fast), states, strict=True)
            ]
            assert made[1].dtype == torch.bfloat16
            assert_close(made[1], made[0])


def test_prompts_are_compiled_where_that_is_asked() -> None:
    torch._dynamo.reset()
    counters.clear()
    plain, fast = small(), small()
    fast.compile(prompts=True)
    graphs = list[int]()
    for length, room in ((69, 20_000), (9, 80), (33, 20_000), (51, 80)):
        ids = LONG[:, :length]  # a view at first
        if graphs:
            ids = ids.clone()
        states = [each.state(2, room) for each in (plain, fast)]
        made = [
            each.prefill(state, ids, last=True)
            for each, state in zip((plain, fast), states, strict=True)
        ]
        assert_close(made[1], made[0])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1] * 4  # whatever the length, and whatever memory is a view of
    torch._dynamo.reset()


class Held(Small):
    """The last map's weight is no parameter."""

    def __init__(self, mix: str) -> None:
        super().__init__(mix)
        self.held = nn.Buffer(torch.randn(50, 50) / 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.linear(super().forward(input_ids), self.held)


@pytest.mark.parametrize("used", [False, True])
def test_prompts_follow_weights_that_are_written_to(used: bool) -> None:
    """Parameters and buffers, for a new state and for one that is read into again."""
    plain, fast = (
        derive(traced(_seeded(lambda: Held("")), input_ids=LONG[:, :12])) for _ in range(2)
    )
    fast.compile()
    states = [each.state(2, 12) for each in (plain, fast)]
    for each, state in zip((plain, fast), states, strict=True):
        each.prefill(state, IDS, last=True)
        if used:
            each.step(state, IDS[:, :1], last=True)
        each.rewind(state, 0)
    for which in ("parameters", "buffers"):
        made = []
        for each, state in zip((plain, fast), states, strict=True):
            with torch.no_grad():
                for x in getattr(each.program.module, which)():
                    if x.is_floating_point():
                        x.mul_(1.5)
            made.append(each.prefill(state, IDS, last=True))
            each.rewind(state, 0)
        assert_close(made[1], made[0])
