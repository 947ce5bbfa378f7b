"""`rope_qk` against its reference in float64, run by triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.codegen.kernel import Load
from attnopt.codegen.kernels.references import rope_qk as plain
from attnopt.codegen.kernels.rope_qk import RopeQK, rope_qk
from attnopt.codegen.rope_spec import RopeSpec, parse_rope
from attnopt.codegen.target import target
from attnopt.compiler.errors import Problem
from tests.tolerance import assert_close

H100 = target("h100")
NAN = float("nan")


def _wide(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in float64; whole numbers stay. Copies, because a launch writes caches."""
    return {
        name: x.clone().double() if x.is_floating_point() else x.clone()
        for name, x in inputs.items()
    }


def _agree(inputs: dict[str, Any], tiles: dict[str, int] | None = None, **fixed: Any) -> Any:
    """The launcher's outputs are the reference's, whatever the caches held before."""
    for name in ("k_cache", "v_cache"):
        if name in inputs:
            inputs[name].normal_()
    asked = {key: x for key, x in fixed.items() if key not in ("in_place", *RopeQK.space())}
    expected = plain.rope_qk(**_wide(inputs), **asked)
    found = rope_qk(**inputs, **fixed, **(tiles or {}))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    return found


def _inputs(spec: RopeSpec, load: Load) -> dict[str, Any]:
    return RopeQK.inputs(spec, load)


def _check(spec: RopeSpec, load: Load) -> Any:
    """The kernel at its default tiles agrees with its reference."""
    kernel = RopeQK.default(spec, H100, load)
    return _agree(_inputs(spec, load), **kernel.constants(spec))


SHORT = Load(2, 5, 9, "float32")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("depth", [32, 33, 40, 57, 64, 80, 96, 128, 192, 256])
def test_head_sizes(depth: int, interleaved: bool) -> None:
    _check(RopeSpec(3, 1, depth, depth, depth // 2 * 2, interleaved), SHORT)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("rotary", "first"), [(2, 0), (16, 0), (24, 0), (24, 40), (20, 17), (64, 0)]
)
def test_rotary_channels(rotary: int, first: int, norm: bool, interleaved: bool) -> None:
    spec = RopeSpec(2, 1, 64, 32, rotary, interleaved, first, norm=norm, eps=1e-2)
    _check(spec, SHORT)
    _check(RopeSpec(**{**vars(spec), "in_place": True, "keep_keys": True}), SHORT)


@pytest.mark.parametrize("length", [1, 63, 100, 128, 257])
@pytest.mark.parametrize("batch", [1, 3])
def test_lengths(length: int, batch: int) -> None:
    load = Load(batch, length, length + 2, "float32")
    _agree(_inputs(RopeSpec(4, 2, 32, 32, 32), load), {"block_t": 16, "block_h": 4})


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (8, 4), (12, 3), (8, 1), (17, 1)])
@pytest.mark.parametrize("block_h", [1, 4, 16])
@pytest.mark.parametrize("block_t", [1, 8])
def test_heads_and_tiles(heads: int, kv_heads: int, block_h: int, block_t: int) -> None:
    inputs = _inputs(RopeSpec(heads, kv_heads, 32, 48, 32), SHORT)
    _agree(inputs, {"block_h": block_h, "block_t": block_t})


@pytest.mark.parametrize("unit_offset", [False, True])
def test_norms(unit_offset: bool) -> None:
    """Heads have a root mean square of one before the weight; either weight may be absent."""
    _check(RopeSpec(4, 2, 64, 64, 24, norm=True, unit_offset=unit_offset), SHORT)
    spec = RopeSpec(4, 2, 64, 64, 64, norm=True, unit_offset=unit_offset)
    inputs = _inputs(spec, SHORT)
    one = torch.zeros(64) if unit_offset else torch.ones(64)
    q, *_ = _agree({**inputs, "q_weight": one}, unit_offset=unit_offset)
    assert_close(q.square().mean(3), torch.ones(2, 4, 5))
    for name in ("q_weight", "k_weight"):
        _agree({key: x for key, x in inputs.items() if key != name}, unit_offset=unit_offset)


def test_positions_of_any_kind() -> None:
    inputs = _inputs(RopeSpec(2, 1, 32, 32, 32), Load(3, 5, 40, "float32"))
    scattered = torch.stack([torch.randperm(40)[:5] for _ in range(3)])
    _agree({**inputs, "positions": scattered})
    _agree({**inputs, "positions": scattered.int()})
    _agree({**inputs, "positions": scattered[:1]})
    _agree({**inputs, "positions": scattered.T.contiguous().T})
    _agree({**inputs, "positions": torch.full((3, 5), 7), "slots": scattered.int()})
    _agree({**inputs, "positions": scattered, "slots": scattered[:1].flip(1)})


def test_positions_outside_the_tables_are_seen() -> None:
    inputs = _inputs(RopeSpec(2, 1, 32, 32, 32, cache="none"), Load(1, 4, 8, "float32"))
    q, k = rope_qk(**{**inputs, "positions": torch.tensor([[0, 7, 8, -1]])})
    for x in (q, k):
        assert x[:, :, :2].isfinite().all() and x[:, :, 2:].isnan().all()


def test_without_a_cache_keys_come_back() -> None:
    spec = RopeSpec(4, 2, 32, 32, 32, cache="none")
    assert len(_check(spec, SHORT)) == 2
    assert len(_check(RopeSpec(4, 2, 32, 32, 32), SHORT)) == 3
    assert len(_check(RopeSpec(4, 2, 32, 32, 32, keep_keys=True), SHORT)) == 4


def test_in_place() -> None:
    for cache in ("none", "contiguous"):
        inputs = _inputs(RopeSpec(4, 2, 32, 32, 16, cache=cache), SHORT)  # type: ignore[arg-type]
        before = inputs["k"].clone()
        found = _agree(inputs, in_place=True, keep_keys=cache == "contiguous")
        assert found[0] is inputs["q"] and found[1] is inputs["k"]
        assert not torch.equal(before, inputs["k"])
    inputs = _inputs(RopeSpec(4, 2, 32, 32, 16), SHORT)
    before = inputs["k"].clone()
    q, k_cache, v_cache = _agree(inputs, in_place=True)
    assert q is inputs["q"] and k_cache is inputs["k_cache"] and v_cache is inputs["v_cache"]
    assert torch.equal(before, inputs["k"]), "keys that are not kept stay as they were"


@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize(("start", "length"), [(0, 5), (0, 8), (0, 30), (6, 1), (21, 7), (40, 17)])
def test_rings(start: int, length: int, sink: int) -> None:
    """Slot p below the sink, then round and round; of tokens that meet, the last one stays."""
    spec = RopeSpec(2, 2, 32, 16, 32, cache="ring", size=8, sink=sink, keep_keys=True)
    inputs = _inputs(spec, Load(2, length, start + length, "float32"))
    found = _agree(inputs, ring=True, sink=sink, keep_keys=True)
    newest = {}
    for s in range(length):
        p = start + s
        newest[p if p < sink else sink + (p - sink) % (8 - sink)] = s
    for slot, s in newest.items():
        assert torch.equal(found[2][:, :, slot], found[1][:, :, s])
        assert torch.equal(found[3][:, :, slot], inputs["v"][:, :, s])
    backwards = torch.arange(start, start + length).flip(0)[None]
    _agree({**inputs, "slots": backwards}, ring=True, sink=sink)


def test_rings_of_sequences_at_various_places() -> None:
    spec = RopeSpec(2, 1, 32, 32, 32, cache="ring", size=8, sink=2)
    inputs = _inputs(spec, Load(3, 12, 60, "float32"))
    slots = torch.arange(12) + torch.tensor([[0], [5], [40]])
    slots[1, :4] = -1  # padding in front
    slots[2, 9:] = -1  # and behind
    _agree({**inputs, "slots": slots}, ring=True, sink=2)
    _agree({**inputs, "slots": slots.flip(1)}, ring=True, sink=2)


@pytest.mark.parametrize("page", [1, 4, 16])
@pytest.mark.parametrize("length", [1, 7, 20])
def test_pages(page: int, length: int) -> None:
    spec = RopeSpec(4, 2, 32, 48, 32, cache="paged", size=page)
    inputs = _inputs(spec, Load(3, length, length + 5, "float32"))
    _agree(inputs)
    tokens_first = {
        name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("k_cache", "v_cache")
    }
    _agree({**inputs, **tokens_first})


def _in_the_midst(rows: int, slots: int) -> tuple[Tensor, Tensor]:
    """Memory full of NaN, and a cache in the midst of it."""
    memory = torch.full((rows + 2, 1, 3 * slots, 32), NAN)
    return memory, memory[1:-1, :, slots : 2 * slots]


def test_what_has_no_slot_is_not_written() -> None:
    """Padding, indices behind the cache, and indices whose page is missing: nothing around the
    cache is written either."""
    load = Load(1, 4, 8, "float32")
    contiguous = _inputs(RopeSpec(2, 1, 32, 32, 32), load)
    paged = _inputs(RopeSpec(2, 1, 32, 32, 32, cache="paged", size=2), load)
    table = torch.tensor([[3, 2, -1, 0, 1, 3]], dtype=torch.int32)
    paged["pages"] = table[:, 1:5]
    for inputs, slots, written in (
        (contiguous, [-1, 3, 8, 9], {(1, 8 + 3)}),
        (paged, [1, 2, 4, 8], {(1 + 2, 2 + 1), (1 + 0, 2 + 0)}),
    ):
        shape = inputs["k_cache"].shape
        (keys, k_cache), (values, v_cache) = (_in_the_midst(shape[0], shape[2]) for _ in range(2))
        inputs |= {"k_cache": k_cache, "v_cache": v_cache}
        rope_qk(**inputs, slots=torch.tensor([slots]))
        for memory in (keys, values):
            found = memory.isfinite().all(3)[:, 0].nonzero().tolist()
            assert {(a, b) for a, b in found} == written


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_half_precision(dtype: str, interleaved: bool) -> None:
    spec = RopeSpec(4, 2, 64, 64, 32, interleaved, norm=True, keep_keys=True)
    found = _check(spec, Load(2, 9, 20, dtype))
    assert all(x.dtype == getattr(torch, dtype) for x in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e5m2, torch.float8_e4m3fn])
def test_caches_of_another_dtype(dtype: torch.dtype) -> None:
    """Held to numbers that the dtype has: the interpreter rounds to eight bits wrongly."""
    inputs = _inputs(RopeSpec(2, 1, 32, 32, 32), SHORT)
    for name in "kv":
        inputs[name] = inputs[name].to(dtype).float()
        inputs[f"{name}_cache"] = inputs[f"{name}_cache"].to(dtype)
    inputs["cos"], inputs["sin"] = torch.ones_like(inputs["cos"]), torch.zeros_like(inputs["sin"])
    _, *caches = rope_qk(**inputs)
    for name, cache in zip("kv", caches, strict=True):
        assert cache.dtype == dtype
        assert torch.equal(cache[:, :, 4:9].float(), inputs[name])


def test_strided_inputs() -> None:
    """Heads in one tensor with tokens, as a projection leaves them; a last dimension that is not
    dense."""
    inputs = _inputs(RopeSpec(4, 2, 32, 32, 16), SHORT)
    whole = torch.randn(2, 5, 8, 32)
    for name, part in zip("qkv", whole.split((4, 2, 2), 2), strict=True):
        inputs[name] = part.transpose(1, 2)
    _agree(inputs)
    q, k = whole[:, :, :4], whole[:, :, 4:6]
    _agree(inputs, in_place=True, keep_keys=True)
    assert torch.equal(q.transpose(1, 2), inputs["q"]) and k.data_ptr() == inputs["k"].data_ptr()
    across = {name: inputs[name].T.contiguous().T for name in ("cos", "sin")}
    _agree({**inputs, **across, "q": torch.randn(2, 4, 32, 5).mT})


def test_what_is_refused() -> None:
    inputs = _inputs(RopeSpec(2, 1, 32, 32, 32), SHORT)
    with pytest.raises(ValueError, match="without the other"):
        rope_qk(**{name: x for name, x in inputs.items() if name != "v_cache"})
    with pytest.raises(ValueError, match="cannot keep 9"):
        rope_qk(**inputs, ring=True, sink=9)
    with pytest.raises(ValueError, match="must be dense"):
        rope_qk(**{**inputs, "q": torch.randn(2, 2, 32, 5).mT}, in_place=True)
    assert RopeQK.supports(RopeSpec(1, 1, 64, 64, 64), H100) is None
    miss = RopeQK.supports(RopeSpec(1, 1, 64, 2048, 64), H100)
    assert miss is not None and "2048" in str(miss)


def test_specs_are_lines_of_text() -> None:
    specs = [spec for spec, _ in RopeQK.examples()]
    for spec in specs:
        assert parse_rope(spec.text) == spec
    wrong: list[dict[str, Any]] = [
        {"heads": 0}, {"rotary": 3}, {"rotary": 66}, {"first": 2}, {"cache": "ring"},
        {"size": 4}, {"sink": 1}, {"cache": "ring", "size": 4, "sink": 4}, {"cache": "shelf"},
    ]  # fmt: skip
    for changes in wrong:
        with pytest.raises(Problem) as told:
            RopeSpec(
                **{"heads": 2, "kv_heads": 1, "head_dim": 64, "v_dim": 64, "rotary": 64} | changes
            )
        assert told.value.code == "A818", changes
    with pytest.raises(Problem) as unread:
        parse_rope("attn{heads=2}")
    assert unread.value.code == "A601"


def test_work_counts_each_tensor_once() -> None:
    load = Load(2, 8, 8)
    none = RopeQK.work(RopeSpec(4, 2, 64, 32, 64, cache="none"), load)
    tables = 8 * 64 * 4 + 16 * 8
    assert none.bytes == 2 * 16 * (2 * 6 * 64) + tables
    cached = RopeQK.work(RopeSpec(4, 2, 64, 32, 64), load)
    assert cached.bytes == none.bytes + 2 * 16 * (2 * 2 * 32)
    assert cached.flops == none.flops == 16 * 6 * 3 * 64


def test_the_reference_leaves_its_inputs() -> None:
    spec = RopeSpec(2, 1, 32, 32, 32)
    inputs = _inputs(spec, SHORT)
    before: dict[str, Tensor] = {name: x.clone() for name, x in inputs.items()}
    RopeQK.reference(spec, inputs)
    assert all(torch.equal(before[name], inputs[name]) for name in before)
