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
    windows = [figure for width in found.widths for figure in _window(width, found.sink)]
    return [
        Figure(
            "entropy_share",
            "Entropy of the attention, of the most it could be",
            "Pale heads read few keys. An attention that is dark throughout takes nearly the mean "
            "of all keys, which speaks for a narrow sliding_window.",
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
            "In tokens. Dark heads read from afar.",
            Shade(0.0, distance, lambda value: f"{value:.0f}"),
        ),
        Figure(
            "retrieval",
            "Retrieval score: copying steps whose largest weight is on the token to copy",
            "Dark heads copy what stands further back: windows and merges there break copying, "
            "which an average loss hardly shows.",
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
            f"Of {dim:.0f} dims, on the data. Pale heads need fewer dims for queries and keys, "
            "which speaks for a low-rank form.",
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


def _window(width: int, sink: int) -> list[Figure]:
    """What one sliding window would do."""
    told = f"sliding_window{{left={width} sink={sink}}}"
    return [
        Figure(
            f"moved_{width}",
            f"Change of a head's output under a window of {width} keys",
            f"Relative to the output; {told} costs least where this is pale.",
        ),
        Figure(
            f"lost_{width}",
            f"Mass beyond {width} keys and the first {sink}",
            f"What {told} would drop; harmless where the change above is pale all the same.",
        ),
    ]
