"""The attentions of a program as work for kernels: specs, sizes, and what a decoder asks for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from attnopt.codegen.decode_spec import DecodeSpec
from attnopt.codegen.kernel import Load
from attnopt.codegen.sites import Wanted, steps, wanted
from attnopt.compiler.contract import Miss
from attnopt.compiler.decode.caches import Contiguous, Ring
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask
from tests.decoder import decoder
from tests.programs import one_attention

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
    class Latent:
        """A cache of another kind."""

    window = SPEC.with_(mask=Mask("window", left=5, sink=1))
    asked = [
        Wanted(f"s{at}", "", f"n{at}", spec, Load(2, 9, 9, "float16"))
        for at, spec in enumerate((SPEC, window, SPEC))
    ]
    plain, ring, latent = steps(
        asked, {"n0": Contiguous(SPEC), "n1": Ring(window), "n2": Latent()}
    )  # fmt: skip
    assert isinstance(plain, Wanted) and plain.step
    assert plain.spec == DecodeSpec(SPEC) and plain.load == Load(2, 1, 9, "float16")
    assert isinstance(ring, Wanted) and ring.spec == DecodeSpec(window, "ring")
    assert isinstance(latent, Miss) and "latent" in latent.reason
