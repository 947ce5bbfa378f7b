"""Every pass on models of several kinds: it applies or says why not, and keeps what it promises.
`python -m tests.zoo.contract` asks all architectures."""

from __future__ import annotations

import pytest

from tests.zoo.contract import contracts
from tests.zoo.survey import ALL

CASES = [
    ("Llama, padded", "sdpa"),
    ("GPT-NeoX", "eager"),
    ("MPT (ALiBi)", "eager"),
    ("BERT", "sdpa"),
    ("SqueezeBERT", "eager"),  # its channels are not on the last axis
    ("T5 encoder", "eager"),
    ("Swin", "sdpa"),
    ("Flux", "sdpa"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "spelling"), CASES, ids=str)
def test_every_pass_keeps_its_contract(name: str, spelling: str) -> None:
    architecture = next(a for a in ALL if a.name == name)
    pytest.importorskip(architecture.library)
    found = list(contracts(architecture, spelling))
    assert not {kept.rewrite: kept.broken for kept in found if kept.broken}
    fired = {kept.rewrite for kept in found if kept.applied}
    assert {"fuse_attention", "skip_sublayers"} <= fired
