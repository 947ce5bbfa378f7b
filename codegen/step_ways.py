"""The ways to compute the attention of a decoder's new tokens to its keys and values on a GPU.

They are `split_decode`, which reads keys and values once for all heads and new tokens that share
them, `flash_prefill` for several new tokens (first where these alone fill the device), and torch's
own attention.

Keys are read up to the newest token, whose place is known on the host. How a launch is split, which
constants of its code follow, is planned for the largest size of a bucket, so that later calls of
one compile nothing (but for a mask whose strides begin or cease to be multiples of 16).

The rotation of queries and keys stays with the graph: `rope_qk` would have to be found there, and
torch.compile joins it with the write into the cache as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from attnopt.codegen.decode_spec import DecodeSpec
from attnopt.codegen.kernel import Load
from attnopt.codegen.target import Target
from attnopt.codegen.ways import Bucket, Way, Ways, learning
from attnopt.compiler import attend, attend_step
from attnopt.compiler.contract import Miss
from attnopt.compiler.spec import AttentionSpec

_FEW = 64  # new tokens, up to which each number of them has a bucket of its own
_ROWS = 64  # of a tile of `split_decode`
Ready = Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]


class StepDispatch(Ways):
    """Attention of the newest tokens on one target, called as `dispatch(q, k, v, end, *extras)`.

    The keys are those of all tokens, in order, or, in a `ring`, in the slots that
    `attend_step.positions` tells; those of the new tokens are among them. `end` is how many tokens
    there have been.
    """

    def __init__(
        self, spec: AttentionSpec, target: Target, ring: bool = False, check: bool | None = None,
        device: str = "",
    ) -> None:  # fmt: skip
        super().__init__(target, check, device)
        self.spec, self.ring = spec.with_(backend="reference"), ring

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, end: int, *extras: Tensor) -> Tensor:
        if learning(q, k, v, *extras):  # of which kernels for steps know nothing
            return self._plain(q, k, v, end, *extras)
        bucket = bucket_of(q, k, v)
        way = self._ways.get(bucket)
        if way is not None:
            return way(q, k, v, end, *extras)

        def wanted() -> Tensor:
            wide = [x.float() if x.is_floating_point() else x for x in extras]
            return self._plain(q.float(), k.float(), v.float(), end, *wide)

        return self._first(bucket, self.ways(load_of(q, k)), (q, k, v, end, *extras), wanted)

    def ways(self, load: Load) -> list[tuple[str, Way | Miss]]:
        """All of them, best first."""
        ways = [self._split(load), self._flash(load)]
        rows = load.queries * self.spec.group
        if rows > _ROWS and load.batch * self.spec.kv_heads * (rows // 128) >= self.target.units:
            ways.reverse()
        return [*ways, ("torch's own attention", self._plain)]

    def _split(self, load: Load) -> tuple[str, Way | Miss]:
        spec, ready = never_empty(self.spec, load.queries)
        about = DecodeSpec(spec, "ring" if self.ring else "contiguous")
        found = self.kernel("split_decode", about, load)
        if isinstance(found, Miss):
            return "split_decode", found
        names, ring = spec.extras, self.ring
        launch = partial(found, longest=0 if ring else longest(load))

        def run(q: Tensor, k: Tensor, v: Tensor, end: int, *extras: Tensor) -> Tensor:
            lengths = None
            if ring:
                lengths = torch.full((q.shape[0],), end, dtype=torch.int32, device=q.device)
            if not names and not extras:
                return launch(q, k, v, lengths)
            given: Sequence[Tensor] = extras
            if ready is not None:
                q, given = ready(q, extras)
            return launch(q, k, v, lengths, **dict(zip(names, given, strict=True)))

        return "split_decode", run

    def _flash(self, load: Load) -> tuple[str, Way | Miss]:
        if self.ring:
            return "flash_prefill", Miss("it reads keys in order, and those of a ring are not")
        launch, names = self.kernel("flash_prefill", self.spec, load), self.spec.extras
        if isinstance(launch, Miss):
            return "flash_prefill", launch

        def run(q: Tensor, k: Tensor, v: Tensor, end: int, *extras: Tensor) -> Tensor:
            given = dict(zip(names, extras, strict=True))
            return launch(q, k, v, offset=end - q.shape[2], **given)

        return "flash_prefill", run

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, end: int, *extras: Tensor) -> Tensor:
        if self.ring:
            return attend_step.ringed(q, k, v, extras, self.spec, end)
        return attend_step.newest(q, k, v, extras, self.spec)


def never_empty(spec: AttentionSpec, queries: int) -> tuple[AttentionSpec, Ready | None]:
    """A spec in which a query without a key gives zeros, and what makes its inputs of one's whose
    query then gives the mean of all values, where there is such: for a single new token its logits
    are all made zero, and all its keys read. Elsewhere the spec stays as it is.

    With sinks such a query gives zeros already, because these have all the weight.
    """
    drops = [name for name in spec.extras if name in ("keep", "padding")]
    if spec.fill == "-inf" or not drops:
        return spec, None
    if "sinks" in spec.extras:
        return spec.with_(fill="-inf"), None
    if queries > 1 or "bias" in spec.extras or len(drops) < len(spec.extras):
        return spec, None

    def ready(q: Tensor, extras: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        keep = attend.extra(extras, spec, "keep")
        padding = attend.extra(extras, spec, "padding")
        if keep is None and padding is not None:
            none = ~padding.any(1)
            q = q.masked_fill(none[:, None, None, None], 0.0)
            return q, [padding | none[:, None]]
        assert keep is not None
        if padding is not None:
            keep = keep & padding[:, None, None, :]
        empty = ~keep.any(-1, keepdim=True)
        return q.masked_fill(empty, 0.0), [keep | empty]

    names = ("padding",) if drops == ["padding"] else ("keep",)
    return spec.with_(fill="-inf", extras=names), ready


def bucket_of(q: Tensor, k: Tensor, v: Tensor) -> Bucket:
    """The bucket of a step: the batch stays as it is while a state is read."""
    new = q.shape[2]
    sizes = q.shape[0], new if new <= _FEW else -new.bit_length(), k.shape[2].bit_length()
    return *sizes, q.dtype, k.dtype, v.dtype


def load_of(q: Tensor, k: Tensor) -> Load:
    """The sizes of a step."""
    return Load(q.shape[0], q.shape[2], k.shape[2], str(q.dtype).removeprefix("torch."))


def longest(load: Load) -> int:
    """The most keys in the bucket of a load."""
    return (1 << load.keys.bit_length()) - 1
