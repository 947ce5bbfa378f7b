"""What prompt and step cost, against formulas by hand, the counted program and the caches held."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnopt.compiler.cost import Workload, cost
from attnopt.compiler.decode import derive
from attnopt.compiler.decode.phase_cost import Latent, Load, decoding, decoding_or_why, phases
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask
from tests.decoder import BLOCKS, HIDDEN, VOCABULARY, WIDTH, decoder

BF16 = 2
MHA = AttentionSpec(128, 128, 128, 128, 128**-0.5, CAUSAL)
MLA = Latent(128, 128, 128, rank=512, rope_dim=64)  # DeepSeek-V2
WINDOW = Mask("window", left=4, sink=2)


def test_absorbed_latents_do_a_hundred_times_the_work_per_byte() -> None:
    load = Load(batch=1, prompt=4096, cached=4095)
    mha, mla = phases(MHA, load, BF16), phases(MLA, load, BF16)
    assert 0.99 < mha.step.intensity < 1.0
    assert mla.step.intensity / mha.step.intensity > 100
    # without the query and the output, 2 H (2 r + d_rope) / (b (r + d_rope)) = 241.8
    endless = phases(MLA, replace(load, cached=1 << 30), BF16)
    assert endless.step.intensity == pytest.approx(2 * 128 * 1088 / (BF16 * 576), rel=1e-4)
    assert (mha.cache_bytes_per_token, mla.cache_bytes_per_token) == (65536, 1152)
    assert mla.prefill.intensity / mha.prefill.intensity < 2  # expanded, it is MHA


@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 4), (3, 2), (2, 1)])
def test_a_step_by_hand(batch: int, kv_heads: int) -> None:
    spec = AttentionSpec(4, kv_heads, head_dim=6, v_dim=10, scale=1.0, mask=CAUSAL)
    found = phases(spec, Load(batch, prompt=5, cached=8), itemsize=4)
    products = batch * 4 * 9 * (6 + 10)  # nine keys: eight cached ones and the new one
    moved = batch * (9 * kv_heads * 16 + 4 * 16)
    assert (found.step.flops, found.step.bytes) == (2 * products, 4 * moved)
    prompt = batch * 5 * (4 * 16 + kv_heads * 16)
    assert (found.prefill.flops, found.prefill.bytes) == (2 * batch * 4 * 15 * 16, 4 * prompt)
    assert found.cache_bytes_per_token == 4 * kv_heads * 16
    assert found.cache_bytes == 8 * found.cache_bytes_per_token


@pytest.mark.parametrize("mask", [CAUSAL, WINDOW, Mask("window", left=3), Mask("window", 1)])
def test_a_step_reads_what_the_mask_keeps(mask: Mask) -> None:
    for cached in range(12):
        last = mask.dense(cached + 1, cached + 1)[-1]
        assert mask.reads(cached + 1) == int(last.sum())


def test_a_window_bounds_a_step_and_its_cache() -> None:
    spec = MHA.with_(mask=WINDOW)
    near, far = (phases(spec, Load(cached=n)) for n in (6, 6000))
    assert near.step == far.step and near.cache_bytes == far.cache_bytes
    assert far.cache_bytes == 6 * far.cache_bytes_per_token


def test_the_program_counts_the_same_prompt() -> None:
    program = decoder(batch=2, length=8)
    found = decoding(program)
    assert (found.batch, found.prompt, found.cached) == (2, 8, 8)
    counted = cost(program, Workload(2, 8))
    assert [s.prefill.flops for s in found.sites] == list(counted.site_core_flops.values())
    assert found.prefill.flops == sum(counted.site_core_flops.values())
    made = derive(program, check=False)
    assert found.cache_bytes_per_token == made.bytes_per_token()
    held = made.state(2, 8).bytes - made.state(2, 7).bytes  # of one token
    assert found.cache_bytes_per_token * 2 == held


def test_rows_that_are_looked_up_are_not_read_as_weights() -> None:
    found = decoding(decoder())
    everything = cost(decoder()).param_bytes
    assert found.weight_bytes == everything - 4 * VOCABULARY * WIDTH
    assert found.weight_bytes > 4 * BLOCKS * 2 * WIDTH * HIDDEN


def test_the_ceiling_is_amdahls() -> None:
    found = decoding(decoder(), Load(4, 8, 4096))
    total = found.cache_bytes + found.weight_bytes
    assert found.ceiling == pytest.approx(total / found.weight_bytes)
    assert found.cache_share > 0.9


def test_models_without_weights_cost_the_same() -> None:
    assert decoding(decoder(meta=True)) == decoding(decoder())


def test_what_reads_later_tokens_has_no_such_cost() -> None:
    program = decoder().copy()
    for node in program.attentions():
        node.args = (*node.args[:4], str(node.args[4]).replace("mask=causal", "mask=full"))
    full = program.with_sites(replace(site, mask="full") for site in program.sites)
    with pytest.raises(Problem, match="not known to read earlier tokens alone") as caught:
        decoding(full)
    assert caught.value.code == "A703"
    told = decoding_or_why(full)
    assert isinstance(told, str) and "its mask is full" in told
    tensor = program.with_sites(replace(site, mask="window(left=3)+padding") for site in full.sites)
    kept = decoding(tensor, Load(1, 8, 6))  # a class that a tensor spells
    assert kept.sites[0].cache_bytes == 3 * kept.sites[0].cache_bytes_per_token
