"""`MaskFacts`: what is known of the mask of one attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnopt.compiler import text
from attnopt.compiler.spec import FULL, Fill, Mask


@dataclass(frozen=True)
class Test:
    """How a padding input says that a key is real: `aten.<op>(input, value)`.

    `batch` and `keys` are the axes of the input that run over the batch and the keys; its other
    axes are read at 0.
    """

    op: str = "ne"
    value: int = 0
    batch: int = 0
    keys: int = 1


@dataclass(frozen=True)
class MaskFacts:
    """What the mask of one attention is, its spec's own mask included.

    `mask` is the class, None when there is none. `relations` say what query and key have in common
    besides: "document(ids)", "chunk(8)", "order(position_ids)". `padding` names the input that
    drops keys, read through `test`. `fill` says what dropped logits become. `bias` says that
    real-valued logits are added besides, by the node `rest`. "proved" holds for every length and
    input; "observed" was seen at a few. `reason` and `at` say what stood in the way of a proof.
    """

    mask: Mask | None
    padding: str | None = None
    fill: Fill = "-inf"
    bias: bool = False
    certainty: Literal["proved", "observed"] = "proved"
    text: str = "full"
    reason: str = ""
    at: str = ""
    test: Test = Test()
    rest: str | None = None
    relations: tuple[str, ...] = ()


def mask_text(facts: MaskFacts, kind: str) -> str:
    """The mask in a few words, such as "causal", "window(left=4096)+padding" or "relative-bias"."""
    if facts.mask is None:
        return kind or "tensor"
    parts = [] if facts.mask == FULL else [text.dump_value(facts.mask)]
    parts += facts.relations
    parts += ["padding"] if facts.padding is not None else []
    parts += [kind] if kind else []
    return "+".join(parts) or "full"
