"""The attentions of a program as work for kernels: specs, sizes, and what a decoder asks for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from attnopt.codegen.decode_spec import DecodeSpec
from attnopt.codegen.kernel import Load
from attnopt.codegen.latent_spec import LatentSpec
from attnopt.codegen.pick import Picked, pick
from attnopt.codegen.sites import Wanted, steps, wanted
from attnopt.codegen.target import target
from attnopt.compiler.contract import Miss
from attnopt.compiler.decode import derive
from attnopt.compiler.decode.caches import Contiguous, Ring
from attnopt.compiler.decode.latents import Latent
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask
from attnopt.passes.latent_kv import LatentKv
from tests.attention_models import applied, notes, raised
from tests.compiler.decode.test_derive import zoo
from tests.decoder import decoder
from tests.programs import one_attention, rewritten

SPEC = AttentionSpec(4, 2, 6, 6, 6**-0.5, CAUSAL)


def test_sizes_are_those_of_the_example() -> None:
    found = wanted(decoder(batch=3, length=7))
    assert [(one.site, one.module) for one in found] == [("s0", "blocks.0"), ("s1", "blocks.1")]
    assert {one.load for one in found} == {Load(3, 7, 7, "float32")}
    assert {one.spec for one in found} == {SPEC}  # no word of the backend that ran it


def test_sizes_can_be_given() -> None:
    loads = {one.load for one in wanted(decoder(), batch=5, length=300, dtype="bf16")}
    assert loads == {Load(5, 300, 300, "bfloat16")}
    assert {one.load.batch for one in wanted(decoder(), length=300)} == {2}


def test_a_site_without_a_record_is_named_by_its_place_in_the_graph() -> None:
    program = decoder().with_sites([])
    assert [(one.site, one.module) for one in wanted(program)] == [
        ("s0", "blocks.0"), ("s1", "blocks.1")
    ]  # fmt: skip


def test_a_fixed_size_stays() -> None:
    program = one_attention(SPEC, batch=2, seq=7)
    (found,) = wanted(program, batch=2, dtype="float16")
    assert found.load == Load(2, 7, 7, "float16")
    with pytest.raises(Problem, match="fixed batch of 2") as problem:
        wanted(program, batch=3)
    assert problem.value.code == "A807"


def test_a_dtype_that_no_kernel_takes() -> None:
    with pytest.raises(Problem, match="do not take float64"):
        wanted(decoder(), dtype="float64")


def test_steps_read_the_caches_of_the_decoder() -> None:
    @dataclass(frozen=True)
    class Heap:
        """A cache of another kind."""

    window = SPEC.with_(mask=Mask("window", left=5, sink=1))
    asked = [
        Wanted(f"s{at}", "", f"n{at}", spec, Load(2, 9, 9, "float16"))
        for at, spec in enumerate((SPEC, window, SPEC))
    ]
    plain, ring, heap = steps(
        asked, {"n0": Contiguous(SPEC), "n1": Ring(window), "n2": Heap()}
    )  # fmt: skip
    assert isinstance(plain, Wanted) and plain.step
    assert plain.spec == DecodeSpec(SPEC) and plain.load == Load(2, 1, 9, "float16")
    assert isinstance(ring, Wanted) and ring.spec == DecodeSpec(window, "ring")
    assert isinstance(heap, Miss) and "heap" in heap.reason


def test_steps_over_latents_of_a_model_that_was_trained_so() -> None:
    program = zoo("DeepSeek-V2 (MLA)")
    asked = wanted(program, length=300, dtype="bf16")
    for each, before in zip(steps(asked, derive(program, check=False).caches), asked, strict=True):
        assert isinstance(each, Wanted) and each.step and each.load.queries == 1
        assert each.spec == LatentSpec(4, 16, 8, 16, 16, before.spec.scale)
        for name in ("h100", "mi300x"):
            picked = pick(each.spec, target(name), each.load, each.kernels)
            assert isinstance(picked, Picked) and picked.kernel.name == "latent_decode"


def test_steps_over_latents_that_a_rewrite_made() -> None:
    program = rewritten(raised("partial"))
    made, _ = applied(program, LatentKv(0.5), notes(program))
    caches = derive(made, check=False).caches
    for each in steps(wanted(made, dtype="bf16"), caches):
        assert isinstance(each, Wanted) and isinstance(each.spec, LatentSpec)
        cache = caches[each.node]
        assert each.spec.rank == cache.rank and each.kernels == ("latent_decode",)
        assert each.spec.rank + each.spec.rope == cache.widths[0][1]


def test_what_kernels_for_latents_do_not_compute_is_told() -> None:
    def told(spec: AttentionSpec, rank: int = 20) -> str:
        up, bias = torch.zeros(2, 6, rank), torch.zeros(2, 6)
        cache = Latent(SPEC, "latent", None, up, up, bias)
        (found,) = steps([Wanted("s0", "", "n0", spec, Load())], {"n0": cache})
        return found.reason if isinstance(found, Miss) else str(found.spec.text)

    assert "rank=20 rope=16" in told(SPEC)  # no rotary part: zeros stand for it
    assert told(SPEC.with_(softcap=5.0)) == "it has no logit soft cap"
    assert "takes padding" in told(SPEC.with_(extras=("padding",)))
    assert "too few" in told(SPEC, 10)
