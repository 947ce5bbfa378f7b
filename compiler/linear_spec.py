"""`LinearSpec`: what one linear attention computes, as a frozen value that prints as one line.

    linear{heads=8 kv_heads=8 key_dim=64 value_dim=64 feature=elu normalised=true decay=token}

Meaning, with q `[batch, heads, S, key_dim]`, k `[batch, kv_heads, S, key_dim]`,
v `[batch, kv_heads, S, value_dim]` and phi the feature map:

    S_t = exp(g_t) S_{t-1} + phi(k_t)^T v_t,    z_t = exp(g_t) z_{t-1} + phi(k_t),
    o_t = scale phi(q_t) S_t,  normalised: over scale phi(q_t) z_t + eps.

Not causal, every query reads the state after the last token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from attnopt.compiler import text
from attnopt.compiler.errors import Problem

Feature = Literal["identity", "elu", "relu", "softmax", "taylor"]
Decay = Literal["none", "head", "token"]
FEATURES = ("identity", "elu", "relu", "softmax", "taylor")
DECAYS = ("none", "head", "token")


@dataclass(frozen=True)
class LinearSpec:
    """One linear attention as a value.

    `feature` maps every row of queries and keys: "elu" is elu + 1, "softmax" is over the channels,
    "taylor" is [1, x, x x^T / sqrt(2)] (Based). `two_sided` takes the features of x and then those
    of -x (Hedgehog: softmax on both sides). `decay` is g: one number per head, or one per head and
    token. States are shared by the query heads of a key/value head unless `state_heads` says that
    each query head has its own (decays are then per query head); 0 means `kv_heads`. `initial` and
    `final` say whether states come in and go out, in float32, with z where `normalised`.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    feature: Feature = "identity"
    two_sided: bool = False
    scale: float = 1.0
    normalised: bool = False
    eps: float = 1e-6
    decay: Decay = "none"
    state_heads: int = 0
    causal: bool = True
    initial: bool = False
    final: bool = False
    name: str = field(default="linear", init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.key_dim, self.value_dim) < 1:
            raise Problem("A825", f"a linear attention spec needs positive sizes, got {self}")
        if self.heads % self.kv_heads:
            raise Problem(
                "A825", f"{self.heads} query heads cannot share {self.kv_heads} key/value heads"
            )
        if self.state_heads not in (0, self.kv_heads, self.heads):
            raise Problem(
                "A825",
                f"{self.state_heads} heads of states",
                help=f"kv_heads={self.kv_heads} or heads={self.heads}",
            )
        for word, known in ((self.feature, FEATURES), (self.decay, DECAYS)):
            if word not in known:
                raise Problem("A825", f"unknown word `{word}`", help=f"one of {', '.join(known)}")
        if self.two_sided and self.feature in ("identity", "taylor"):
            raise Problem("A825", f"the feature map `{self.feature}` has one side only")
        if not self.causal and self.decay != "none":
            raise Problem(
                "A825", "a decay needs an order of tokens", help="causal=true, or decay=none"
            )

    @property
    def states(self) -> int:
        """How many heads have a state."""
        return self.state_heads or self.kv_heads

    @property
    def features(self) -> int:
        """How many features a row of queries or keys has: the rows of a state."""
        if self.feature == "taylor":
            return 1 + self.key_dim + self.key_dim**2
        return self.key_dim * (2 if self.two_sided else 1)

    @property
    def text(self) -> str:
        """The spec as one line; `parse_linear_spec` reads it back."""
        return text.dump(self)

    def with_(self, **changes: object) -> LinearSpec:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def parse_linear_spec(line: str) -> LinearSpec:
    """Read a spec from its text.

    Raises `Problem` A601 on text that is not a spec, A825 on one that makes no sense.
    """
    call = text.parse(line)
    if call.name != "linear":
        raise Problem("A601", f"expected linear{{...}}, got `{line}`")
    return text.build(LinearSpec, call.values, "linear")
