"""`LatentSpec`: latent attention (MLA), as a frozen value of one line of text.

    latent{heads=128 rank=512 rope=64 head_dim=128 v_dim=128 scale=0.1147 cache=paged page=64}

Head h reads k_h = [W_uk^h c, r] and v_h = W_uv^h c, with one latent c `[rank]` and one rotary
key r `[rope]` per token for all heads. There are two ways to compute it. Expanded
(`latent_prefill`): keys of `head_dim` channels and values of `v_dim` are made of the latents first.
Absorbed (`latent_decode`): q^T W_uk^h is made instead, `rank` wide, and W_uv^h is applied to the
result, so that the cache holds `rank + rope` numbers per token and is read once for all heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from attnopt.compiler import text
from attnopt.compiler.errors import Problem


@dataclass(frozen=True)
class LatentSpec:
    """Sizes of one latent attention; `scale` multiplies q k^T, and the mask is causal where
    `causal`. `cache` and `page` (tokens in a page) say how latents are held."""

    heads: int
    rank: int
    rope: int
    head_dim: int
    v_dim: int
    scale: float
    causal: bool = True
    cache: Literal["contiguous", "paged"] = "contiguous"
    page: int = 0
    name: str = field(default="latent", init=False, repr=False)

    def __post_init__(self) -> None:
        wrong = ""
        if min(self.heads, self.rank, self.rope, self.head_dim, self.v_dim) < 1:
            wrong = "all sizes must be positive"
        elif self.cache not in ("contiguous", "paged"):
            wrong = f"`{self.cache}` is neither contiguous nor paged"
        elif (self.cache == "paged") != (self.page > 0):
            wrong = "`page` is given for a paged cache, and for no other"
        if wrong:
            raise Problem("A821", f"no such latent attention: {wrong}", where=self.text)

    @property
    def text(self) -> str:
        """The spec as one line."""
        return text.dump(self)
