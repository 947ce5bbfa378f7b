"""Steps of decoders through the generated kernels give what they give in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from attnopt.codegen import step_dispatch, ways
from attnopt.codegen.kernel import Load
from attnopt.codegen.latent_ways import LatentDispatch, PromptDispatch
from attnopt.codegen.step_ways import StepDispatch, never_empty
from attnopt.codegen.target import target
from attnopt.codegen.ways import Ways
from attnopt.compiler import attend, attend_step
from attnopt.compiler.attend_latent import absorbed, rope_at
from attnopt.compiler.contract import Miss, Notes, read_pass
from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.caches import Ring
from attnopt.compiler.decode.latents import Latent
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.program import Program
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec, Mask
from tests.codegen.kernels.host_path import BAR, least_seconds, without_launches
from tests.compiler.decode.test_derive import zoo
from tests.compiler.decode.test_latents import narrow
from tests.tolerance import assert_close

H100 = target("h100")
SPEC = AttentionSpec(4, 2, 32, 16, 32**-0.5, CAUSAL)
LATENT = AttentionSpec(4, 4, 40, 32, 40**-0.5, CAUSAL)  # 24 channels of each head's own, 16 shared


@pytest.fixture(autouse=True)
def _fresh_warnings() -> Iterator[None]:
    ways.warn.cache_clear()
    yield
    ways.warn.cache_clear()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Ways]]:
    """CPU tensors are dispatched as if they were on an H100; the list holds what dispatched."""
    made: list[Ways] = []
    first = Ways._first

    def noted(self: Ways, *given: Any) -> Tensor:
        made.append(self)
        return first(self, *given)

    caches = [step_dispatch._step, step_dispatch._latent, step_dispatch._prompt]
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(attend_step, "is_gpu", lambda q: True)
    monkeypatch.setattr(step_dispatch, "_here", lambda device: (H100, "NVIDIA H100 80GB HBM3"))
    monkeypatch.setattr(Ways, "_first", noted)
    monkeypatch.setattr(ways, "_DTYPES", ("float32", "float64"))  # which only the interpreter has
    yield made
    for cache in caches:
        cache.cache_clear()


def _inputs(spec: AttentionSpec, new: int, keys: int, batch: int = 2) -> tuple[Tensor, ...]:
    return (
        torch.randn(batch, spec.heads, new, spec.head_dim),
        torch.randn(batch, spec.kv_heads, keys, spec.head_dim),
        torch.randn(batch, spec.kv_heads, keys, spec.v_dim),
    )


def _extras(spec: AttentionSpec, new: int, keys: int) -> list[Tensor]:
    padding = torch.ones(2, keys, dtype=torch.bool)
    padding[0, : keys // 3] = False
    made = {
        "padding": padding, "bias": torch.randn(1, spec.heads, new, keys),
        "keep": torch.rand(2, 1, new, keys) < 0.7, "sinks": torch.randn(1, spec.heads, 1, 1),
    }  # fmt: skip
    return [made[name] for name in spec.extras]


def _way(run: Ways) -> str:
    """The way that the one bucket took: the first that was not passed over."""
    (passed,) = run.passed.values()
    return ", ".join(reason.partition(":")[0] for reason in passed)


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in tensors]


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize(
    "spec",
    [
        SPEC, SPEC.with_(softcap=4.0), SPEC.with_(extras=("padding",)), SPEC.with_(mask=FULL),
        SPEC.with_(extras=("bias", "padding")), SPEC.with_(mask=FULL, extras=("keep", "sinks")),
        SPEC.with_(mask=Mask("window", left=9, sink=2)),
        SPEC.with_(extras=("sinks", "padding"), fill="min"),
    ],
)  # fmt: skip
def test_new_tokens_run_on_split_decode(spec: AttentionSpec, new: int) -> None:
    run = StepDispatch(spec.with_(backend="triton"), H100)
    if new == 1 and spec.mask.kind == "window":
        spec = spec.with_(mask=FULL)  # what a step of one token is asked for
        run = StepDispatch(spec, H100)
    for keys in (40, 45):
        inputs, extras = _inputs(spec, new, keys), _extras(spec, new, keys)
        wide = _wide(*inputs, *extras)
        assert_close(
            run(*inputs, keys, *extras),
            attend_step.newest(wide[0], wide[1], wide[2], wide[3:], spec),
        )
    assert _way(run) == ""


@pytest.mark.parametrize(
    ("extras", "mask"), [(("padding",), CAUSAL), (("keep",), FULL), (("keep", "padding"), CAUSAL)]
)
def test_a_token_that_reads_no_key_gives_the_mean_where_a_spec_says_so(
    extras: tuple[str, ...], mask: Mask
) -> None:
    spec = SPEC.with_(extras=extras, fill="min", mask=mask, softcap=3.0)
    inputs, given = _inputs(spec, 1, 30), _extras(spec, 1, 30)
    given[0][1] = False
    wide = _wide(*inputs, *given)
    want = attend_step.newest(wide[0], wide[1], wide[2], wide[3:], spec)
    assert_close(want[1, 2, 0], wide[2][1, 1].mean(0))
    run = StepDispatch(spec, H100)
    assert_close(run(*inputs, 30, *given), want)
    assert _way(run) == ""
    run, several = StepDispatch(spec, H100), _inputs(spec, 3, 30)
    given = [x if x.dim() == 2 else x.expand(2, 1, 3, 30) for x in given]
    wide = _wide(*several, *given)
    want = attend_step.newest(wide[0], wide[1], wide[2], wide[3:], spec)
    assert_close(run(*several, 30, *given), want)
    assert _way(run) == "split_decode"  # and flash_prefill knows the mean
    assert never_empty(spec.with_(extras=("padding", "bias")), 1)[1] is None


@pytest.mark.parametrize(("new", "end"), [(1, 5), (1, 40), (3, 13), (3, 100), (5, 16)])
@pytest.mark.parametrize("extras", [(), ("padding", "sinks")])
def test_a_ring_is_read_as_it_lies(new: int, end: int, extras: tuple[str, ...]) -> None:
    spec = SPEC.with_(mask=Mask("window", left=9, sink=2), extras=extras)
    slots = 2 + 9 + 4
    run = StepDispatch(spec, H100, ring=True)
    inputs, given = _inputs(spec, new, slots), _extras(spec, new, slots)
    wide = _wide(*inputs, *given)
    want = attend_step.ringed(wide[0], wide[1], wide[2], wide[3:], spec, end)
    assert_close(run(*inputs, end, *given), want)
    assert _way(run) == ""


@pytest.mark.parametrize("extra", ["keep", "padding"])
def test_a_token_that_reads_nothing_of_a_ring_gets_the_mean_of_what_it_holds(extra: str) -> None:
    spec = SPEC.with_(mask=Mask("window", left=8), fill="min", extras=(extra,))
    q, k, v = _inputs(spec, 1, 8)
    none = torch.zeros((2, 8) if extra == "padding" else (2, 1, 1, 8), dtype=torch.bool)
    got = attend_step.ringed(q, k, v, [none], spec, 5)
    assert_close(got[:, ::2, 0], v[:, :, :5].mean(2))


def test_many_new_tokens_run_on_flash_prefill_and_float64_on_torch() -> None:
    small = target("h100").__class__(**{**vars(H100), "units": 1})
    run = StepDispatch(SPEC, small)
    inputs = _inputs(SPEC, 70, 90)
    assert_close(run(*inputs, 90), attend_step.newest(*_wide(*inputs), [], SPEC))
    assert next(name for name, _ in run.ways(ways_load(70))) == "flash_prefill"
    run = StepDispatch(SPEC, H100)
    wide = _wide(*inputs)
    assert_close(run(*wide, 90), attend_step.newest(*wide, [], SPEC))
    assert _way(run) == "split_decode, flash_prefill"
    assert "float64" in str(run.passed)


def ways_load(queries: int) -> Any:
    return ways.Load(2, queries, 90, "float32")


def _latent(new: int, keys: int, rope: int = 16, first: bool = False) -> list[Tensor]:
    """q, what is kept, the maps and the bias; keys' shared part last, or `first`."""
    own, rank = LATENT.head_dim - rope, 24
    up_k = torch.zeros(4, LATENT.head_dim, rank + rope)
    part = slice(rope, None) if first else slice(0, own)
    up_k[:, part, :rank] = torch.randn(4, own, rank) / rank**0.5
    up_k[:, slice(0, rope) if first else slice(own, None), rank:] = torch.eye(rope)
    return [
        torch.randn(2, 4, new, LATENT.head_dim), torch.randn(2, 1, keys, rank + rope), up_k,
        torch.randn(4, LATENT.v_dim, rank) / rank**0.5, torch.randn(4, LATENT.v_dim),
    ]  # fmt: skip


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("extras", [(), ("padding",), ("padding", "bias")])
@pytest.mark.parametrize("rope", [16, 0])
def test_latents_are_read_as_they_are(new: int, extras: tuple[str, ...], rope: int) -> None:
    spec = LATENT.with_(extras=extras)
    given, more = _latent(new, 37, rope), _extras(spec, new, 37)
    at = rope_at(given[2], 24)
    assert at == (24 if rope else -1)
    run = LatentDispatch(spec, H100, at)
    wide = _wide(*given, *more)
    want = absorbed(*wide[:5], wide[5:], spec, attend_step.newest)
    assert_close(run(*given, *more), want)
    assert _way(run) == ("latent_decode" if "bias" in extras else "")


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("extras", [(), ("padding",)])
def test_many_new_tokens_make_keys_of_latents(first: bool, extras: tuple[str, ...]) -> None:
    spec = LATENT.with_(extras=extras)
    narrow_heads = spec.with_(head_dim=20, v_dim=4)
    given, more = _latent(60, 75, first=first), _extras(spec, 60, 75)
    given[0], given[2] = given[0][..., :20], given[2][:, :20]
    if not first:
        given[2] = torch.cat((given[2][:, :4], _latent(1, 1)[2][:, 24:]), 1)
    given[3], given[4] = given[3][:, :4], given[4][:, :4]
    at = rope_at(given[2], 24)
    assert at == (0 if first else 4)
    run = LatentDispatch(narrow_heads, H100, at)
    wide = _wide(*given, *more)
    want = absorbed(*wide[:5], wide[5:], narrow_heads, attend_step.newest)
    assert_close(run(*given, *more), want)
    assert _way(run) == "" and run._listed(ways_load(60), 40, 24)[0][0] == "latent_prefill"
    assert run._listed(ways_load(1), 40, 24)[0][0] == "latent_decode"


@pytest.mark.parametrize("first", [False, True])
def test_prompts_read_the_shared_part_of_keys_as_it_is(first: bool) -> None:
    shared, own = torch.randn(2, 1, 33, 16), torch.randn(2, 4, 33, 24)
    wide_shared = shared.expand(2, 4, 33, 16)
    k = torch.cat((wide_shared, own) if first else (own, wide_shared), -1)
    q, v = torch.randn(2, 4, 33, 40), torch.randn(2, 4, 33, 32)
    at = 0 if first else 24
    run = PromptDispatch(LATENT, H100, at, lambda *_: pytest.fail("not wanted", pytrace=False))
    assert_close(run(q, k, v, shared), attend.reference(*_wide(q, k, v), [], LATENT))
    same = LATENT.with_(v_dim=40)
    run = PromptDispatch(same, H100, at, attend.sdpa)
    run(q, k, k, shared)
    assert _way(run) == "latent_prefill"


def test_gradients_of_steps_are_those_of_plain_torch() -> None:
    given = _inputs(SPEC, 1, 20)
    leaf = given[0].clone().requires_grad_()
    run = StepDispatch(SPEC, H100)
    out = run(leaf, *given[1:], 20)
    assert out.requires_grad and not run._ways
    assert_close(out.detach(), run(*given, 20))


def test_keys_of_latents_are_not_made_where_they_take_too_much() -> None:
    spec = AttentionSpec(128, 128, 192, 128, 0.1, CAUSAL)
    listed = LatentDispatch(spec, H100, 128)._listed
    for batch, fits in ((1, True), (8, False)):
        found = dict(listed(Load(batch, 512, 16384 if fits else 131072), 576, 512))
        assert isinstance(found["latent_prefill"], Miss) is not fits


def test_latents_too_narrow_for_a_tile_are_passed_over() -> None:
    run = LatentDispatch(LATENT.with_(head_dim=24), H100)
    found = dict(run._listed(Load(2, 1, 20), 4, 4))
    assert isinstance(found["latent_decode"], Miss) and "too few" in found["latent_decode"].reason


def test_a_way_that_fails_is_passed_over_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Ways, name: str, *_: Any) -> Any:
        def run(*_: Any, **__: Any) -> Tensor:
            raise OutOfResources(300000, 232448, "shared memory")

        return run

    monkeypatch.setattr(Ways, "kernel", fails)
    run, inputs = StepDispatch(SPEC, H100), _inputs(SPEC, 1, 40)
    with pytest.warns(UserWarning, match="split_decode failed on NVIDIA H100") as told:
        got = run(*inputs, 40)
        run(*_inputs(SPEC, 1, 80), 80)
    assert len(told) == 2  # one for each of two kernels
    assert_close(got, attend_step.newest(*inputs, [], SPEC))


def test_the_guard_finds_a_wrong_way(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ways.kernel

    def off(self: Ways, *given: Any) -> Any:
        run = right(self, *given)
        return run if isinstance(run, ways.Miss) else lambda *a, **b: run(*a, **b) * 1.01

    monkeypatch.setattr(Ways, "kernel", off)
    inputs, latents = _inputs(SPEC, 1, 40), _latent(1, 40)
    with pytest.warns(UserWarning, match="split_decode is wrong on NVIDIA H100"):
        got = StepDispatch(SPEC, H100, check=True)(*inputs, 40)
    assert_close(got, attend_step.newest(*inputs, [], SPEC))
    with pytest.warns(UserWarning, match="latent_decode is wrong on NVIDIA H100"):
        LatentDispatch(LATENT, H100, 24, check=True)(*latents)


@pytest.mark.parametrize("ring", [False, True])
def test_a_step_takes_less_than_twenty_microseconds_beyond_its_launches(
    ring: bool, monkeypatch: pytest.MonkeyPatch, on_gpu: list[Ways]
) -> None:
    """On the host, from where a decoder asks, for a bucket that has had its first call. All of the
    path counts but what Triton does with the launches: the choice, the launchers of the kernel and
    of the merge of its parts, memory for the parts and the result (on a CPU here), the strides, and
    the calls that hand all arguments to the two kernels. A ring's lengths are filled by a launch of
    torch's."""
    stubs = without_launches(monkeypatch)
    lengths = torch.full((2,), 600, dtype=torch.int32)
    monkeypatch.setattr(torch, "full", lambda *_, **__: lengths)
    spec = SPEC.with_(backend="triton", mask=Mask("window", 600) if ring else CAUSAL)
    line, (q, k, v) = spec.text, _inputs(spec, 1, 600)

    def step() -> None:
        if ring:
            attend_step.to_ring(q, k, v, [], spec, line, 700)
        else:
            attend_step.to_newest(q, k, v, [], spec, line)

    least = least_seconds(step)
    assert len(on_gpu) == 1
    assert all(stubs[name].calls > 7000 for name in stubs if "flash" not in name)
    assert least < BAR


def _dispatched(program: Program) -> Program:
    notes = Notes(program, target="h100")
    return apply_pass(program, read_pass("generate_kernel"), ("*",), notes)[0]


@lru_cache
def decoders(name: str, slack: int) -> tuple[Decoder, Decoder]:
    """A decoder in plain torch, and one whose attentions are dispatched."""
    program = narrow(16) if name == "latents alone" else zoo(name)
    return derive(program, slack, check=False), derive(_dispatched(program), slack, check=False)


def _read(decoder: Decoder, ids: Tensor, padded: int, sizes: tuple[int, ...]) -> Tensor:
    """The logits of a prompt, then of as many tokens at a time as `sizes` say."""
    masks = {}
    if decoder.split.masks:
        keep = torch.ones(len(ids), sizes[0], dtype=torch.long)
        keep[0, :padded] = 0
        masks = {decoder.split.masks[0]: keep}
    state = decoder.state(len(ids), ids.shape[1], masks)
    made = [decoder.step(state, part) for part in ids.split(list(sizes), 1)]
    return torch.cat(made, 1)[:, padded:].float()


@pytest.mark.parametrize(
    ("name", "slack", "padded", "kernels"),
    [
        ("Llama", 0, 0, {"split_decode"}),
        ("Llama, padded", 0, 3, {"split_decode"}),
        ("Mistral", 0, 0, {"split_decode"}),
        ("Mistral", 4, 0, {"split_decode"}),
        ("GPT-OSS (sinks)", 0, 0, {"split_decode"}),
        ("MPT (ALiBi)", 0, 0, {"split_decode"}),
        ("Gemma 2", 2, 0, {"split_decode"}),
        ("DeepSeek-V2 (MLA)", 0, 0, {"latent_decode", "latent_prefill"}),
        ("DeepSeek-V3 (MLA)", 0, 0, {"latent_decode", "latent_prefill"}),
        ("latents alone", 0, 0, {"latent_decode"}),
    ],
)
def test_decoders_give_what_they_give_in_plain_torch(
    name: str, slack: int, padded: int, kernels: set[str], on_gpu: list[Ways],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    launched: set[str] = set()
    right = Ways.kernel

    def noted(self: Ways, kernel: str, *given: Any) -> Any:
        run = right(self, kernel, *given)
        if isinstance(run, ways.Miss):
            return run

        def launch(*args: Any, **kwargs: Any) -> Tensor:
            launched.add(kernel)
            return run(*args, **kwargs)

        return launch

    plain, fast = decoders(name, slack)
    assert type(next(iter(plain.caches.values()))) is type(next(iter(fast.caches.values())))
    monkeypatch.setattr(Ways, "kernel", noted)
    ids = torch.randint(3, 50, (2, 24))
    sizes = (7, 1, 1, 3, 6, 1, 1, 2, 1, 1)
    assert_close(_read(fast, ids, padded, sizes), _read(plain, ids, padded, sizes), name)
    assert launched == kernels
    kinds = {type(cache) for cache in fast.caches.values()}
    assert (Ring in kinds) == (name in ("Mistral", "GPT-OSS (sinks)", "Gemma 2"))
    assert (Latent in kinds) == ("latent_decode" in kernels)


@pytest.mark.parametrize("name", ["Llama, padded", "Mistral", "DeepSeek-V2 (MLA)"])
def test_a_compiler_is_shown_one_operator(name: str, on_gpu: list[Ways]) -> None:
    plain, fast = decoders(name, 0)
    form = torch.compile(fast.phase("step", last=True), fullgraph=True, backend="aot_eager")
    ids = torch.randint(3, 50, (2, 12))
    states = [each.state(2, 12) for each in (plain, fast)]
    for each, state in zip((plain, fast), states, strict=True):
        each.prefill(state, ids[:, :9])
    on_gpu.clear()
    for at in (9, 10):
        want = plain.step(states[0], ids[:, at : at + 1], last=True)
        with torch.no_grad():
            got = form(ids[:, at : at + 1], states[1].tables, states[1].caches, at)
        assert_close(got.float(), want.float())
    assert on_gpu
