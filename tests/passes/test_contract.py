"""Every pass on models of several kinds: it applies or says why not, and keeps what it promises.
`python -m tests.zoo.contract` asks all architectures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from attnopt.compiler import pipeline
from attnopt.passes.fuse_attention import FuseAttention
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


def test_a_pass_that_breaks_its_word_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    honest = FuseAttention.rewrite

    def lying(self: Any, target: Any, program: Any, notes: Any) -> Any:
        edit = honest(self, target, program, notes)
        return replace(edit, spec=edit.spec.with_(scale=2 * edit.spec.scale)) if edit else edit

    monkeypatch.setattr(FuseAttention, "rewrite", lying)
    model = next(a for a in ALL if a.name == "Llama")
    found = {kept.rewrite: kept for kept in contracts(model, "sdpa")}
    assert "rolled back" in found["fuse_attention"].broken
    monkeypatch.setattr(pipeline, "_verified", lambda before, after, *rest: (after, rest[1]))
    found = {kept.rewrite: kept for kept in contracts(model, "sdpa")}
    assert "it differs" in found["fuse_attention"].broken
