"""Single steps under torch.compile: the same tokens, and a way back where none can be compiled."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.generate import Generation, generate
from tests.compiler.decode.test_derive import Small, traced

IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))
HOW = Generation(max_new_tokens=6)


def small() -> Decoder:
    return derive(traced(Small(""), input_ids=torch.randint(0, 50, (2, 12))))


def test_compiled_steps_give_the_same_tokens() -> None:
    decoder = small()
    expected = generate(decoder, IDS, HOW)
    torch._dynamo.reset()
    counters.clear()
    decoder.compile()
    assert torch.equal(generate(decoder, IDS, HOW), expected)
    assert decoder._single is not None and decoder._single.form is not None
    assert counters["stats"]["unique_graphs"] == 1  # whatever the position
    torch._dynamo.reset()


def test_where_nothing_can_be_compiled_it_goes_on_with_one_warning() -> None:
    def broken(module: Any, example: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    decoder = small()
    expected = generate(decoder, IDS, HOW)
    decoder.compile()
    assert decoder._single is not None
    decoder._single.form = torch.compile(decoder._single.module, backend=broken)
    with pytest.warns(RuntimeWarning, match=r"A507\]: the decoder's step runs uncompiled") as told:
        assert torch.equal(generate(decoder, IDS, HOW), expected)
    assert len([w for w in told if "A507" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        generate(decoder, IDS, HOW)
