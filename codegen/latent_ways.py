"""The ways to compute the attention of new tokens to a cache of latents on a GPU, and that among
the tokens of a prompt whose keys were made of latents.

Of new tokens they are `latent_prefill`, where making keys and values of all latents takes fewer
operations than attending to the latents themselves, which is so for many new tokens; then
`latent_decode`, `split_decode` with the latents as the one key/value head, and torch's own
attention to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from attnopt.codegen.kernel import Load
from attnopt.codegen.latent_spec import LatentSpec
from attnopt.codegen.step_ways import StepDispatch, bucket_of, load_of, longest, never_empty
from attnopt.codegen.target import Target
from attnopt.codegen.ways import Way, Ways, learning
from attnopt.compiler import attend, attend_step
from attnopt.compiler.attend_latent import absorbed, one_head
from attnopt.compiler.contract import Miss
from attnopt.compiler.spec import AttentionSpec

_NO_ROPE = 16  # channels of zeros that stand for the rotary query where no key has such a part
_MADE = 0.1  # share of the memory that keys and values may take that are made for one call
Whole = Callable[..., Tensor]


class LatentDispatch(Ways):
    """Attention of the newest tokens to latents on one target, called as `dispatch(q, kept, up_k,
    up_v, bias, *extras)` with the shapes of `attnopt.compiler.attend_latent`."""

    def __init__(
        self, spec: AttentionSpec, target: Target, rope_at: int = -1, check: bool | None = None,
        device: str = "",
    ) -> None:  # fmt: skip
        super().__init__(target, check, device)
        self.spec, self.rope_at = spec.with_(backend="reference"), rope_at

    def __call__(
        self, q: Tensor, kept: Tensor, up_k: Tensor, up_v: Tensor, bias: Tensor, *extras: Tensor
    ) -> Tensor:
        if learning(q, kept, up_k, up_v, bias, *extras):  # of which kernels for steps know nothing
            return self._plain(q, kept, up_k, up_v, bias, *extras)
        bucket = bucket_of(q, kept, up_k)
        way = self._ways.get(bucket)
        if way is not None:
            return way(q, kept, up_k, up_v, bias, *extras)
        given = q, kept, up_k, up_v, bias

        def wanted() -> Tensor:
            wide = [x.float() if x.is_floating_point() else x for x in extras]
            return self._plain(*(x.float() for x in given), *wide)

        ways = self._listed(load_of(q, kept), up_k.shape[2], up_v.shape[2])
        return self._first(bucket, ways, (*given, *extras), wanted)

    def _listed(self, load: Load, width: int, rank: int) -> list[tuple[str, Way | Miss]]:
        alone = StepDispatch(
            one_head(self.spec, width, rank), self.target, False, device=self.device
        )
        others = [
            (name, way if isinstance(way, Miss) else self._absorbed(way))
            for name, way in alone.ways(load)
        ]
        ways = [("latent_decode", self._decoded(load, width, rank)), *others]
        made = 2.0 * self.spec.heads * load.keys * rank * (self.spec.head_dim + self.spec.v_dim)
        scores = 2.0 * self.spec.heads * load.keys * load.queries
        if made + scores * (self.spec.head_dim + self.spec.v_dim) < scores * (width + rank):
            return [("latent_prefill", self._expanded(load, width, rank)), *ways]
        return ways

    def _decoded(self, load: Load, width: int, rank: int) -> Way | Miss:
        spec, ready = never_empty(self.spec, load.queries)
        found: Way | Miss | None = why_not_absorbed(spec, width, rank)
        if found is None:
            found = self.kernel("latent_decode", latent_spec(self.spec, width, rank), load)
        if isinstance(found, Miss):
            return found
        names, launch = spec.extras, partial(found, longest=longest(load))

        def run(q: Tensor, k: Tensor, v: Tensor, end: int, *extras: Tensor) -> Tensor:
            given: Sequence[Tensor] = extras
            if ready is not None:
                q, given = ready(q, extras)
            latents, turned = k[:, 0, :, :rank], k[:, 0, :, rank:]
            q_rope = q[..., rank:]
            if width == rank:
                q_rope, turned = q.new_zeros(*q.shape[:3], _NO_ROPE), k[:, 0, :, :_NO_ROPE]
            return launch(
                q[..., :rank], q_rope, latents, turned, **dict(zip(names, given, strict=True))
            )

        return self._absorbed(run)

    def _expanded(self, load: Load, width: int, rank: int) -> Way | Miss:
        launch = _prefill(self, self.spec, self.rope_at, latent_spec(self.spec, width, rank), load)
        if isinstance(launch, Miss):
            return launch
        if self.spec.kv_heads != self.spec.heads:
            return Miss("heads that share keys are not made of latents one by one")
        made = load.batch * self.spec.heads * longest(load) * load.torch_dtype.itemsize
        made *= self.spec.head_dim + self.spec.v_dim
        if made > self.target.memory * _MADE:
            return Miss(f"keys and values of all heads would take {made / 1e9:.0f} GB")
        own = _own(self.spec.head_dim, self.rope_at, width - rank)

        def run(
            q: Tensor, kept: Tensor, up_k: Tensor, up_v: Tensor, bias: Tensor, *extras: Tensor
        ) -> Tensor:
            latents = kept[..., :rank]
            k = latents @ up_k[:, own, :rank].transpose(1, 2)
            v = latents @ up_v.transpose(1, 2)
            made = launch(q, k, kept[..., rank:], v, extras, kept.shape[2] - q.shape[2])
            return made + bias[:, None]

        return run

    def _absorbed(self, way: Way) -> Way:
        spec = self.spec

        def attention(
            q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], _: AttentionSpec
        ) -> Tensor:
            return way(q, k, v, k.shape[2], *extras)

        def run(
            q: Tensor, kept: Tensor, up_k: Tensor, up_v: Tensor, bias: Tensor, *extras: Tensor
        ) -> Tensor:
            return absorbed(q, kept, up_k, up_v, bias, extras, spec, attention)

        return run

    def _plain(
        self, q: Tensor, kept: Tensor, up_k: Tensor, up_v: Tensor, bias: Tensor, *extras: Tensor
    ) -> Tensor:
        return absorbed(q, kept, up_k, up_v, bias, extras, self.spec, attend_step.newest)


class PromptDispatch(Ways):
    """Attention among the tokens of a prompt on one target, called as `dispatch(q, k, v, shared,
    *extras)`: of the keys `[batch, heads, S, head_dim]`, `shared` `[batch, 1, S, rope]` is the part
    of all heads, from channel `rope_at` on. `whole` is what computes it without that knowledge."""

    def __init__(
        self, spec: AttentionSpec, target: Target, rope_at: int, whole: Whole,
        check: bool | None = None, device: str = "",
    ) -> None:  # fmt: skip
        super().__init__(target, check, device)
        self.spec, self.rope_at, self.whole = spec, rope_at, whole

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, shared: Tensor, *extras: Tensor) -> Tensor:
        if learning(q, k, v, shared, *extras):
            return self.whole(q, k, v, extras, self.spec)
        bucket = bucket_of(q, k, v)
        way = self._ways.get(bucket)
        if way is not None:
            return way(q, k, v, shared, *extras)

        def wanted() -> Tensor:
            wide = [x.float() if x.is_floating_point() else x for x in extras]
            return attend.reference(q.float(), k.float(), v.float(), wide, self.spec)

        spec = self.spec

        def whole(q: Tensor, k: Tensor, v: Tensor, shared: Tensor, *extras: Tensor) -> Tensor:
            return self.whole(q, k, v, extras, spec)

        ways: list[tuple[str, Way | Miss]] = [
            ("latent_prefill", self._split(load_of(q, k), shared.shape[3])),
            ("attention to whole keys", whole),
        ]
        return self._first(bucket, ways, (q, k, v, shared, *extras), wanted)

    def _split(self, load: Load, rope: int) -> Way | Miss:
        spec = self.spec
        if spec.head_dim == spec.v_dim and not spec.extras:
            return Miss("torch's fused attention is for keys and values of one width, as they are")
        about = LatentSpec(
            spec.heads, 1, rope, max(1, spec.head_dim - rope), spec.v_dim, spec.scale,
            spec.mask.kind == "causal",
        )  # fmt: skip
        launch = _prefill(self, spec, self.rope_at, about, load)
        if isinstance(launch, Miss):
            return launch
        if spec.kv_heads != spec.heads:
            return Miss("it has keys for each query head")
        own = _own(spec.head_dim, self.rope_at, rope)

        def run(q: Tensor, k: Tensor, v: Tensor, shared: Tensor, *extras: Tensor) -> Tensor:
            return launch(q, k[..., own], shared, v, extras, 0)

        return run


def latent_spec(spec: AttentionSpec, width: int, rank: int) -> LatentSpec:
    """An attention whose cache holds `width` numbers per token, the first `rank` of them the latent
    and the others the rotary key of all heads. Where there are none, the first numbers of the
    latent stand for one, for a query of zeros."""
    rope = width - rank
    return LatentSpec(
        spec.heads, rank, rope or _NO_ROPE, max(1, spec.head_dim - rope), spec.v_dim, spec.scale,
        spec.mask.kind == "causal",
    )  # fmt: skip


def why_not_absorbed(spec: AttentionSpec, width: int, rank: int) -> Miss | None:
    """Why `latent_decode` does not compute a spec over such a cache."""
    if width == rank < _NO_ROPE:
        return Miss(f"latents of {rank} numbers without a rotary part are too few")
    return _plain_enough(spec)


def _plain_enough(spec: AttentionSpec) -> Miss | None:
    """Why kernels for latents do not compute a spec."""
    if spec.softcap:
        return Miss("it has no logit soft cap")
    others = [name for name in spec.extras if name != "padding"]
    if others:
        return Miss(f"it takes no {', '.join(others)}")
    if spec.extras and spec.fill == "min":
        return Miss("padding may drop all keys of a query, which would give zeros, not the mean")
    if spec.mask.kind == "window":
        return Miss("it has no window")
    return None


def _prefill(
    ways: Ways, spec: AttentionSpec, rope_at: int, about: LatentSpec, load: Load
) -> Callable[..., Tensor] | Miss:
    """`latent_prefill` as `(q, k_nope, k_rope, v, extras, offset)`, q with channels as the keys."""
    if rope_at < 0:
        return Miss("keys have no part that all heads share as it is")
    last = rope_at + about.rope == spec.head_dim
    if rope_at and not last:
        return Miss("the part of keys that all heads share is in their middle")
    launch: Way | Miss | None = _plain_enough(spec)
    if launch is None:
        launch = ways.kernel("latent_prefill", about, load)
    if isinstance(launch, Miss):
        return launch

    def run(
        q: Tensor, k: Tensor, k_rope: Tensor, v: Tensor, extras: Sequence[Tensor], offset: int
    ) -> Tensor:
        if not last:
            q = torch.cat((q[..., about.rope :], q[..., : about.rope]), -1)
        padding = extras[0] if extras else None
        return launch(q, k, k_rope, v, padding, offset)

    return run


def _own(head_dim: int, rope_at: int, rope: int) -> slice:
    """The channels of keys that are each head's own."""
    return slice(rope, head_dim) if rope_at == 0 else slice(0, rope_at)
