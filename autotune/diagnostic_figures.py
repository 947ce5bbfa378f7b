"""Which figures of a diagnosis are drawn as heat maps, and what each says of a rewrite."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.autotune.heat_grid import Shade
from attnopt.compiler.diagnostics.diagnosis import Diagnosis

SHARE = Shade(0.0, 1.0, lambda value: f"{value:.2f}")


@dataclass(frozen=True)
class Figure:
    """One heat map: the name of the figure, its heading, the sentence under it, and its scale."""

    name: str
    heading: str
    speaks: str
    shade: Shade = SHARE


def figures(found: Diagnosis) -> list[Figure]:
    """The heat maps of a diagnosis, in the order they are shown."""
    dim = float(max((site.head_dim for site in found.sites), default=1))
    ranks = Shade(0.0, dim, lambda value: f"{value:.0f}")
    distance = max((x for s in found.sites for x in s.per_head.get("distance", ())), default=1.0)
    windows = [
        Figure(
            f"lost_{width}",
            f"Mass beyond {width} keys and the first {found.sink}",
            f"What sliding_window{{left={width} sink={found.sink}}} would drop: pale heads can "
            "take it.",
        )
        for width in found.widths
    ]
    return [
        Figure(
            "entropy_share",
            "Entropy of the attention, of the most it could be",
            "Pale heads read few keys. A sublayer that is dark throughout takes nearly the mean of "
            "all keys, which speaks for skip_sublayers with its linear map.",
        ),
        Figure(
            "sink",
            f"Mass on the first {found.sink} keys",
            f"Dark heads rest there: keep sinks (sink={found.sink}) in any sliding_window.",
        ),
        *windows,
        Figure(
            "distance",
            "Mean distance of the keys that are read",
            "In tokens; a window well above it costs a head little.",
            Shade(0.0, distance, lambda value: f"{value:.0f}"),
        ),
        Figure(
            "retrieval",
            "Retrieval score: copying steps whose largest weight is on the token to copy",
            "Dark heads copy from far back: leave them out of sliding_window and merge_kv_heads.",
        ),
        Figure(
            "induction",
            "Induction score: mean weight on the token to copy",
            "The same as a mean: also shows heads that copy among other things.",
        ),
        Figure(
            "no_key",
            "Mass on the learned sink logit, which is no key",
            "Dark heads are mostly off: they bear skip_sublayers and windows well.",
        ),
        Figure(
            "qk_rank",
            "Effective rank of the logits",
            f"Of {dim:.0f} dims, on the data. Pale heads need fewer dims for queries and keys: "
            "they bear merge_kv_heads, and a low-rank form.",
            ranks,
        ),
        Figure(
            "qk_weights_rank",
            "Effective rank of the QK form of the weights",
            "Of the weights alone, rotary at equal positions; where the data's rank is lower, fit "
            "on data.",
            ranks,
        ),
        Figure(
            "vo_rank",
            "Effective rank of the output of a head",
            "Values of the data times the output projection. Pale heads need fewer value dims.",
            ranks,
        ),
        Figure(
            "kv_rank",
            "Effective rank of [K, V] per key/value head",
            f"Of keys and values together ({2 * dim:.0f} columns for equal sizes); low ranks speak "
            "for a latent cache.",
            Shade(0.0, 2 * dim, lambda value: f"{value:.0f}"),
        ),
    ]
