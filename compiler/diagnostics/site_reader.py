"""All that is gathered of one attention while batches run, and the figures made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from attnopt.compiler.diagnostics.centred import Centred
from attnopt.compiler.diagnostics.copying import Copying, sources
from attnopt.compiler.diagnostics.diagnosis import Row, SiteDiagnosis
from attnopt.compiler.diagnostics.kv_reader import KVReader
from attnopt.compiler.diagnostics.map_figures import SINK, MapFigures
from attnopt.compiler.diagnostics.some_weights import Slice, row_of, slices
from attnopt.compiler.diagnostics.spectra import effective_rank, product, rank_of_energy, shares
from attnopt.compiler.diagnostics.window_change import WindowChange
from attnopt.compiler.grams import real
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.site import Path, Site
from attnopt.compiler.site_weights import read_output, read_weight
from attnopt.compiler.spec import FULL

QUERIES = 256  # positions of a sequence whose maps are read, where it has more
SEQUENCES = 32  # of one call of the attention: windows of images make thousands
COPIES = 8  # sequences of a batch that the copying test reads
_DIGITS = 5


class SiteReader:
    """Watches one attention; see `diagnosis` for what comes out."""

    def __init__(
        self, program: Program, site: Site, widths: Sequence[int], queries: int, seed: int
    ) -> None:
        self.program, self.site, self.queries, self.seed = program, site, queries, seed
        self.spec, self.node = program.spec(site), program.node(site.node)
        heads, dim = self.spec.heads, self.spec.head_dim
        self.elsewhere = _elsewhere(self.node, site)
        self.maps = MapFigures(heads, widths, not self.elsewhere, SINK)
        self.q, self.k = Centred(heads, dim), Centred(self.spec.kv_heads, dim)
        self.v = Centred(self.spec.kv_heads, self.spec.v_dim)
        self.kv = KVReader(program, site)
        self.windows = None if self.elsewhere else self._windows(widths)
        self.copying = Copying(heads)
        self.no_copying = ""
        self.hidden = 0  # positions of copies that do not count
        self.calls = 0

    def see(self, read: Mapping[fx.Node, Any], value: Any, batch: Batch) -> None:
        """Add one batch of calibration data."""
        q, k, v = (read[cast(fx.Node, arg)] for arg in self.node.args[:3])
        of_queries, of_keys = self._real(q, k, batch)
        for moment, operand, told in (
            (self.q, q, of_queries), (self.k, k, of_keys), (self.v, v, of_keys),
        ):  # fmt: skip
            tokens = operand.transpose(1, 2)
            alone = len(tokens) != len(told)  # keys or values that all sequences share
            moment.add(tokens.flatten(0, 1) if alone else tokens[told])
        extras = self._extras(read)
        for row in _some(len(q), SEQUENCES):
            at = self._sampled(of_queries[row].nonzero()[:, 0], row)
            for part in slices(q, k, extras, self.spec, row, at):
                self.maps.add(part, row_of(of_keys, row))
                if self.windows is not None:
                    values = _per_query(row_of(v, row), len(part.weights))
                    self.windows.add(part, values, row_of(of_keys, row))
        self.calls += 1

    def see_copy(
        self, read: Mapping[fx.Node, Any], value: Any, half: int, given: frozenset[str]
    ) -> None:
        """Add one batch whose first `half` tokens come twice.

        Where masks come from inputs that are as `given`, positions that they hide do not count.
        """
        q, k = (read[cast(fx.Node, arg)] for arg in self.node.args[:2])
        nodes = cast(Sequence[fx.Node], self.node.args[3])
        masks = [at for at, extra in enumerate(nodes) if given & sources(extra)]
        extras = self._extras(read)
        alone = self.spec.with_(mask=FULL, extras=tuple(self.spec.extras[at] for at in masks))
        for row in _some(len(q), COPIES):
            at = self._sampled(torch.arange(half, 2 * half - 1), row)
            for part in slices(q, k, extras, self.spec, row, at):
                if not masks:
                    self.copying.add(part, half)
                    continue
                (seen,) = slices(q, k, [extras[at] for at in masks], alone, row, part.i)
                counted = _seen(seen, part.i - half + 1) & _seen(seen, part.i)
                self.hidden += int((~counted).sum())
                self.copying.add(part, half, counted)

    def diagnosis(self) -> SiteDiagnosis:
        """The figures, and why others are missing."""
        site, spec = self.site, self.spec
        missing: dict[str, str] = {}
        per_head = self.maps.per_head()
        whole = self.windows.whole() if self.windows is not None else {}
        per_head |= self.windows.per_head() if self.windows is not None else {}
        similarity = {"maps": self.maps.similarity()} if per_head else {}
        if not per_head:
            missing["maps"] = "the data holds no query that may read two keys"
        if "sinks" not in spec.extras:
            per_head.pop("no_key", None)
        if self.elsewhere:
            missing["local"] = self.elsewhere
        why = self.uncopied
        if why:
            missing["retrieval"] = why
        else:
            per_head["induction"] = self.copying.mass / self.copying.queries
            per_head["retrieval"] = self.copying.hits / self.copying.queries
        spectra = self._spectra(missing)
        for name, values in spectra.items():
            per_head[f"{name}_rank"] = effective_rank(values)
            per_head[f"{name}_rank99"] = rank_of_energy(values)
        found = self.kv.figures(self.q.moment(), spec)
        missing |= found.missing
        per_head |= found.per_head
        similarity |= found.similarity
        if found.spectrum is not None:
            spectra["kv"] = found.spectrum[None]
        return SiteDiagnosis(
            site.id, site.module, spec.heads, site.kv_heads, spec.head_dim, self.maps.queries,
            {name: _row(value) for name, value in per_head.items()},
            {name: _rows(shares(value)) for name, value in spectra.items()},
            {name: _rows(value) for name, value in similarity.items()},
            {**whole, **found.whole}, missing,
        )  # fmt: skip

    def _windows(self, widths: Sequence[int]) -> WindowChange:
        """What windows would change; without a known output projection, in the heads' own dims."""
        heads, dim = self.spec.heads, self.spec.v_dim
        output = torch.eye(heads * dim, dtype=torch.float64).reshape(heads, dim, heads * dim)
        if self.site.out is not None:
            output = read_output(self.program, self.site.out)
        return WindowChange(output, widths, SINK, "sinks" in self.spec.extras)

    @property
    def unfit(self) -> str:
        """Why copying has no meaning here, or ""."""
        if self.maps.looks_ahead and not self.elsewhere:
            return "the attention also reads later tokens, so that nothing has to be copied"
        return self.elsewhere

    @property
    def uncopied(self) -> str:
        """Why copying is not measured, or ""."""
        if self.unfit or self.copying.queries:
            return self.unfit
        if self.hidden:
            return "a mask of the data hides the tokens that come twice"
        return self.no_copying or "no query of the copies was read"

    def _spectra(self, missing: dict[str, str]) -> dict[str, Tensor]:
        """Singular values per query head `[heads, dim]` by name."""
        site, heads = self.site, self.spec.heads
        found = {"qk": product(self.q.moment(), _per_query(self.k.moment(), heads))}
        for name, paths in (
            ("qk_weights", ("q", "k")),
            ("vo", ("out",)),
            ("vo_weights", ("v", "out")),
        ):
            lacking = [which for which in paths if getattr(site, which) is None]
            if lacking:
                said = site.missing.get(lacking[0], "it was not found")
                missing[name] = f"the projection of {lacking[0]}: {said}"
        if "qk_weights" not in missing:
            found["qk_weights"] = product(
                _form(self.program, site.q, heads), _form(self.program, site.k, heads)
            )
        if "vo" not in missing:
            output = read_output(self.program, cast(Any, site.out))
            out = output @ output.transpose(1, 2)
            found["vo"] = product(_per_query(self.v.moment(), heads), out)
            if "vo_weights" not in missing:
                found["vo_weights"] = product(_form(self.program, site.v, heads), out)
        return found

    def _extras(self, read: Mapping[fx.Node, Any]) -> list[Tensor]:
        return [read[cast(fx.Node, extra)] for extra in cast(Sequence[Any], self.node.args[3])]

    def _real(self, q: Tensor, k: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which queries `[batch, S]` and which keys `[batch, T]` are real."""
        valid = real(self.program, self.site.node, batch, axes=(0, 2))
        every = [torch.ones(x.shape[0], x.shape[2], dtype=torch.bool) for x in (q, k)]
        if valid is None or valid.shape != every[0].shape:
            return every[0], every[1]
        same = not self.elsewhere and valid.shape == every[1].shape
        return valid, valid if same else every[1]

    def _sampled(self, at: Tensor, row: int) -> Tensor:
        """At most `queries` of the positions, in order; the same ones at every attention."""
        if len(at) <= self.queries:
            return at
        seed = self.seed + 7919 * self.calls + row
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randperm(len(at), generator=generator)[: self.queries]
        return at[picked.sort().values]


def _seen(part: Slice, keys: Tensor) -> Tensor:
    """Which queries may read their one of the `keys`, in every head: bool `[R]`."""
    at = keys[None, :, None].expand(len(part.visible), -1, 1)
    return part.visible.gather(-1, at)[..., 0].all(0)


def _elsewhere(node: fx.Node, site: Site) -> str:
    """Why queries and keys share no positions, or ""."""
    q, k = (cast(fx.Node, arg).meta["val"].shape[2] for arg in node.args[:2])
    apart = site.q is not None and site.k is not None and site.q.source != site.k.source
    lengths = isinstance(q, int) and isinstance(k, int) and q != k
    return "queries and keys come from different sequences" if apart or lengths else ""


def _form(program: Program, path: Path | None, heads: int) -> Tensor:
    """W W^T of each head, `[heads, dim, dim]`, key/value heads repeated for the queries."""
    weight = read_weight(program, cast(Path, path))[0]
    return _per_query(weight @ weight.transpose(1, 2), heads)


def _per_query(moment: Tensor, heads: int) -> Tensor:
    return moment.repeat_interleave(heads // len(moment), dim=0)


def _some(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spread."""
    if count <= most:
        return list(range(count))
    return [at * count // most for at in range(most)]


def _row(value: Tensor) -> Row:
    return tuple(round(float(x), _DIGITS) for x in value)


def _rows(value: Tensor) -> tuple[Row, ...]:
    return tuple(_row(row) for row in value)
