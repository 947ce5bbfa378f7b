"""A few architectures of the coverage table, one per way of spelling something; `make coverage`
looks at all of them."""

from __future__ import annotations

import pytest

from tests.zoo.survey import ALL, survey

CASES = {
    ("GPT-Neo", "eager"): ("causal (proved), learned", "window(left=6) (proved), learned"),
    ("ImageGPT", "eager"): ("causal (proved), learned",),
    ("GPT-OSS (sinks)", "eager"): (
        "window(left=6) (proved), rotary(half, 16 dims)",
        "causal (proved), rotary(half, 16 dims)",
    ),
    ("GPT-J", "eager"): ("causal (proved), rotary(interleaved, 8 dims)",),
    ("Apertus", "sdpa"): ("causal (proved), rotary(half, 16 dims)",),
    ("MPT (ALiBi)", "eager"): ("causal+alibi (proved), alibi",),
    ("RoBERTa", "sdpa"): ("padding (proved), learned",),
    ("M2M-100", "sdpa"): ("padding (proved), sinusoidal", "causal (proved), sinusoidal"),
    ("BEiT", "sdpa"): ("relative-bias (proved), relative-bias",),
    ("DINOv3", "sdpa"): ("full (proved), rotary(half, 16 dims, 2-D)",),
    ("SAM (vision encoder)", "eager"): ("tensor (proved), learned",),
    ("Swin", "eager"): ("relative-bias (proved), relative-bias",),
    ("Swin v2", "eager"): ("relative-bias (proved), relative-bias",),
    ("Whisper", "eager"): ("full (proved), learned", "causal (proved), learned"),
}


@pytest.mark.parametrize(("name", "spelling"), CASES, ids=str)
def test_raises_fully_and_equals_the_model(name: str, spelling: str) -> None:
    pytest.importorskip("transformers")
    row = survey(next(a for a in ALL if a.name == name), spelling)
    assert (row.found, row.reasons, row.problem) == (row.expected, (), "")
    assert row.exact, (row.error, row.failed)
    seen = tuple(dict.fromkeys(fact.partition(", ")[2] for fact in row.facts))
    assert seen == CASES[name, spelling]
