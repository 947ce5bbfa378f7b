"""`Decoder`: a causal model that reads each token once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, fx

from attnopt.compiler.compiled import Compiled
from attnopt.compiler.decode import padding
from attnopt.compiler.decode.caches import Ring, cache_of
from attnopt.compiler.decode.convolutions import find as find_convolutions
from attnopt.compiler.decode.halves import flipped
from attnopt.compiler.decode.in_cpp import InCpp, autocast, in_cpp
from attnopt.compiler.decode.latents import find
from attnopt.compiler.decode.phases import Cache, Kind, phase, places, tables
from attnopt.compiler.decode.sampling import most_likely
from attnopt.compiler.decode.single import HELP, Made, Single, own
from attnopt.compiler.decode.split import Split
from attnopt.compiler.decode.state import State, empty_caches
from attnopt.compiler.errors import Problem
from attnopt.compiler.native.memory import Memory
from attnopt.compiler.program import Program
from attnopt.compiler.spec import parse_spec


class Decoder:
    """A causal model as two programs: `prefill` reads a prompt, `step` what follows it.

    Both take tokens `[batch, S]` and a `State`, and give logits `[batch, S, vocabulary]` or, where
    `last`, those of the last position `[batch, 1, vocabulary]`. They equal what the whole program
    gives at these positions.
    """

    def __init__(
        self, program: Program, parts: Split, slack: int = 0, dtype: torch.dtype | None = None,
        counted: bool = False,
    ) -> None:  # fmt: skip
        self.program, self.split, self.slack, self.dtype = program, parts, slack, dtype
        self.counted = counted  # whether its tables count real tokens alone
        self.caches: dict[str, Cache] = {
            node.name: find(program, parts, node, dtype)
            or cache_of(parse_spec(str(node.args[4])), slack)
            for node in program.attentions()
        }
        self.convolutions = {
            found.node: found for found in find_convolutions(program, parts, slack)
        }
        self.places = places(program, self.caches, self.convolutions)
        self._dtypes = {name: _dtype_of(program, name)
                        for name in (*self.caches, *self.convolutions)}  # fmt: skip
        self._phases: dict[tuple[Kind, bool, bool], Callable[..., Tensor]] = {}
        self._single: Single | None = None
        self._cpp: InCpp | None = None
        self._compiles_prompts = False
        self._with_slack: dict[int, Decoder] = {}
        self._padded: Decoder | None = None
        self._memory = Memory()

    @cached_property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.program.device

    def state(self, batch: int, capacity: int, masks: Mapping[str, Tensor] | None = None) -> State:
        """An empty state for sequences of at most `capacity` tokens.

        `masks` gives the input of the model that says which positions are real, `[batch, n]` for
        the first n positions; later ones are real (see the method `masks`).

        Raises `Problem` A704 for a capacity that the model has no positions for, and A707 for a
        mask that does not fit, or tells of padding that convolutions carry into real positions.
        """
        if capacity < 1:
            raise Problem("A704", f"a state needs room for one token at least, got {capacity}")
        given = {name: self._extended(name, (masks or {}).get(name), batch, capacity)
                 for name in self.split.masks}  # fmt: skip
        kinds = [(cache, self.dtype or self._dtypes[name])
                 for name, cache in (*self._owners(), *self.convolutions.items())]  # fmt: skip
        caches = empty_caches(kinds, batch, capacity, self.device, self._memory)
        state = State(batch, capacity, caches, [], given)
        state.tables = self._make_tables(state)
        return state

    def masks(self, attention_mask: Tensor | None) -> dict[str, Tensor]:
        """The model's mask inputs for prompts `[batch, prompt]` that are padded where the mask is
        0. Raises `Problem` A707 where the model has none and there is padding."""
        if attention_mask is None:
            return {}
        if not self.split.masks and not bool(attention_mask.all()):
            raise Problem(
                "A707", "the model was traced without an attention_mask and takes no padding",
                help="read them with the decoder that `taking` gives",
            )  # fmt: skip
        real = attention_mask != 0
        return {
            name: torch.where(real, self.split.real, self.split.padded).to(self._fake(name).dtype)
            for name in self.split.masks
        }

    def prefill(self, state: State, *tokens: Tensor, last: bool = False) -> Tensor:
        """Read a prompt into an empty state. Raises `Problem` A704 where it is not empty."""
        if state.length:
            raise Problem(
                "A704", f"the state holds {state.length} tokens, a prompt needs an empty one",
                help="read what follows with step, or make another state",
            )  # fmt: skip
        return self._read("prefill", state, tokens, last)[0]

    def step(self, state: State, *tokens: Tensor, last: bool = False) -> Tensor:
        """Read what follows: one token of each sequence, or several."""
        return self._read("step" if state.length else "prefill", state, tokens, last)[0]

    def next(self, state: State, *tokens: Tensor) -> Tensor:
        """Read what follows, as `step`: the most likely next token of each sequence, int64
        `[batch, 1]`."""
        kind: Kind = "step" if state.length else "prefill"
        logits, found = self._read(kind, state, tokens, True)
        return most_likely(logits) if found is None else found

    def rewind(self, state: State, length: int) -> None:
        """Take tokens back, so that `length` are left.

        Raises `Problem` A705 where the cache of a window or of a convolution has overwritten what
        would be needed.
        """
        least = max(
            cache.least(state.reached)
            for cache in (*self.caches.values(), *self.convolutions.values())
        )
        if not 0 <= length <= state.length:
            raise Problem("A705", f"a state of {state.length} tokens cannot go back to {length}")
        if length < least:
            raise Problem(
                "A705", f"a state of {state.length} tokens cannot go back to {length}",
                why=f"{state.reached} tokens were read, and a window or convolution keeps what "
                f"{least} need",
                help="derive the decoder with more slack",
            )  # fmt: skip
        state.length = length

    def with_slack(self, tokens: int) -> Decoder:
        """This decoder, or one whose windows and convolutions can take back so many tokens; it is
        made once, and compiled where this one is."""
        rings = [cache for cache in self.caches.values() if isinstance(cache, Ring)]
        slacks = [kept.slack for kept in rings]
        slacks += [kept.slack for kept in self.convolutions.values()]
        if all(slack >= tokens for slack in slacks):
            return self
        if tokens not in self._with_slack:
            made = Decoder(self.program, self.split, tokens, self.dtype, self.counted)
            made._memory = self._memory
            if self._single is not None:
                made._compile(self._compiles_prompts, self._cpp)
            self._with_slack[tokens] = made
        return self._with_slack[tokens]

    def taking(self, attention_mask: Tensor | None) -> Decoder:
        """This decoder, or, where the mask `[batch, prompt]` tells of padding and the model was
        traced without, one that takes it; made once, and compiled where this one is. Raises
        `Problem` A707 where the model's positions do not allow it."""
        if self.split.masks or attention_mask is None or bool(attention_mask.all()):
            return self
        if self._padded is None:
            self._padded = padding.padded(self)
            self._padded._memory = self._memory
            if self._single is not None:
                self._padded._compile(self._compiles_prompts, self._cpp)
        return self._padded

    def grow(self, state: State, capacity: int) -> None:
        """Make room for more tokens. Raises `Problem` A704 as `state` does."""
        larger = self.state(state.batch, capacity, state.masks)
        for new, old in zip(larger.caches, state.caches, strict=True):
            for to, of in zip(new, old, strict=True):
                to[:, :, : of.shape[2]] = of
        state.capacity, state.masks = capacity, larger.masks
        state.replace(larger.caches, larger.tables)

    def pad(self, state: State, masks: Mapping[str, Tensor]) -> None:
        """Mark positions that are still to be read as padding: the inputs of `masks` `[batch, n]`
        for all positions so far and these."""
        larger = {
            name: self._extended(name, masks[name], state.batch, state.capacity)
            for name in state.masks
        }
        for name, mask in larger.items():
            if not torch.equal(mask[:, : state.length], state.masks[name][:, : state.length]):
                raise Problem("A707", "the mask of tokens that were read has changed")
        state.masks = larger
        state.replace(state.caches, self._make_tables(state))

    def reorder(self, state: State, rows: Tensor) -> None:
        """Let row i of the batch go on from row `rows[i]`, as a beam search needs; what it has read
        is copied, into ordinary pages."""
        caches = [tuple(x[rows] for x in cache) for cache in state.caches]
        state.batch = len(rows)
        state.masks = {name: mask[rows] for name, mask in state.masks.items()}
        state.replace(caches, self._make_tables(state) if state.masks else state.tables)

    def bytes_per_token(self) -> int:
        """Bytes of cache that a token of one sequence takes, where it is kept; the inputs of
        convolutions, which do not grow with tokens, are in `convolution_bytes`."""
        return sum(self.bytes_by_attention().values())

    def bytes_by_attention(self) -> dict[str, int]:
        """The same of each attention that has a cache of its own, by its node."""
        return {
            name: self._dtypes[name].itemsize * sum(heads * dim for heads, dim in cache.widths)
            for name, cache in self._owners()
        }

    def convolution_bytes(self) -> int:
        """Bytes that the last inputs of convolutions take, of one sequence however long it is."""
        return sum(
            kept.channels * kept.turn * (self.dtype or self._dtypes[name]).itemsize
            for name, kept in self.convolutions.items()
        )

    def compile(self, prompts: bool = False) -> None:
        """Run single tokens (`step` of one token with `last`) under torch.compile from now on, and
        `prompts` (`prefill` with `last`) where it is worth as long a compilation again.

        On a CPU, linear maps of float32, and attention without a mask or bias, run through
        operators in C++ that are built here, once per machine, those of prompts too; a warning
        (A507) says where they cannot be. They keep copies of the weights: of 16 bits where these
        hold them, else of 32, and for prompts, where the processor multiplies bfloat16 on matrix
        units, of 16, 32 or 48. Under autocast torch's own run. The first step takes the time of a
        compilation, and a second one for other batch sizes. Weights are taken as they are: where
        one is written to later, what the next prompt or state needs is compiled anew; call
        `compile` after what torch does not count (writes through `.data`, other parameters in its
        place).
        """
        self._compile(prompts, None)

    def _compile(self, prompts: bool, other: InCpp | None) -> None:
        form = self.phase("step", last=True)
        dtypes = {self.dtype or self._dtypes[name] for name in self.caches}
        self._cpp = in_cpp(self.caches, dtypes, self.device, other)
        if self._cpp is not None:
            form = self._cpp.single(form)
        if self.device.type == "cpu":
            form = flipped(form)
        self._single = Single(form)
        self._compiles_prompts = prompts
        self._phases.clear()
        self._with_slack.clear()
        self._padded = None

    def phase(self, kind: Kind, last: bool) -> fx.GraphModule:
        """The graph of a phase; see `phases.phase`."""
        every = {**self.caches, **self.convolutions}
        at = {name: (self.places[name], cache) for name, cache in every.items()}
        return phase(self.program, self.split, at, kind, last)

    def _owners(self) -> list[tuple[str, Cache]]:
        """The attentions whose caches are kept, in the order of a state's."""
        first = dict[int, str]()
        for name in self.caches:
            first.setdefault(self.places[name], name)
        return [(name, self.caches[name]) for _, name in sorted(first.items())]

    def _read(self, kind: Kind, state: State, tokens: Sequence[Tensor], last: bool) -> Made:
        """What is made of the next tokens; the state has read them."""
        compiled = last and kind == "step" and not (self._cpp and autocast())
        with torch.no_grad():
            if compiled and self._single is not None:
                again = self._single.again(state, tokens)
                if again is not None:
                    state.read(1)
                    return again
            new = self._checked(state, tokens)
            self._renew(state)
            made: Made
            if compiled and self._single is not None and new == 1:
                made = self._single.step(state, tokens)
            else:
                start = () if kind == "prefill" else (state.length,)
                form = self._form(kind, last)
                if isinstance(form, Compiled):
                    tokens = [own(x) for x in tokens]
                with self._memory.kept():
                    made = form(*tokens, state.tables, state.caches, *start), None
        state.read(new)
        return made

    def _checked(self, state: State, tokens: Sequence[Tensor]) -> int:
        """How many tokens of each sequence these are, which the state has room for."""
        wanted = self.split.tokens
        new = tokens[0].shape[1] if tokens else 0
        fits = all(x.shape[:2] == (state.batch, new) for x in tokens)
        if len(tokens) != len(wanted) or not new or not fits:
            raise Problem(
                "A707", f"the state of {state.batch} sequences reads {', '.join(wanted)}, each "
                "[batch, S]", why=f"it was given {[list(x.shape) for x in tokens]}",
            )  # fmt: skip
        if state.length + new > state.capacity:
            raise Problem(
                "A704", f"{state.length} tokens and {new} more do not fit into {state.capacity}",
                help="make a state of a larger capacity",
            )  # fmt: skip
        return new

    def _renew(self, state: State) -> None:
        """Compile anew where weights were written to, before a prompt or the first step."""
        if self._single is None or (state.length and state.compiled is not None):
            return
        if self._single.outdated or (self._cpp is not None and self._cpp.outdated):
            self.compile(self._compiles_prompts)

    def _form(self, kind: Kind, last: bool) -> Callable[..., Tensor]:
        cpp = None if autocast() else self._cpp
        key = (kind, last, cpp is not None)
        if key not in self._phases:
            made = self.phase(kind, last)
            form = made if cpp is None else cpp.many(made, kind)
            if self._compiles_prompts and (kind, last) == ("prefill", True):
                what = "the decoder's prompt"
                form = flipped(form) if self.device.type == "cpu" else form
                self._phases[key] = Compiled(form, what, HELP, fullgraph=True, dynamic=True)
            else:
                self._phases[key] = form
        return self._phases[key]

    def _make_tables(self, state: State) -> list[Tensor]:
        if not self.split.tables:
            return []
        whole = [self._dummy(name, state) for name in self.split.tokens]
        names = [n.name for n in self._tables.graph.find_nodes(op="placeholder")]
        given = dict(zip(self.split.tokens, whole, strict=True)) | state.masks
        try:
            with torch.no_grad():
                made: list[Tensor] = self._tables(*(given[name] for name in names))
        except (RuntimeError, IndexError) as error:
            raise Problem(
                "A704", f"{self.program.name} has no positions for {state.capacity} tokens",
                why=str(error).splitlines()[0], help="make a state of a smaller capacity",
            ) from error  # fmt: skip
        for table, value in zip(self.split.tables, made, strict=True):
            sizes = [value.shape[axis] for axis in (table.rows, table.keys) if axis is not None]
            if any(size != state.capacity for size in sizes):
                raise Problem(
                    "A704", f"{self.program.name} has no positions for {state.capacity} tokens",
                    why=f"`{table.node}` reaches over {min(sizes)}",
                    help="make a state of a smaller capacity",
                )  # fmt: skip
        made = padding.counted(self.split, state, made) if self.counted else made
        return [x.detach() for x in made]  # views of nothing, which guards would look at

    @cached_property
    def _tables(self) -> fx.GraphModule:
        return tables(self.program, self.split)

    def _dummy(self, name: str, state: State) -> Tensor:
        """An input of the right size whose values nobody reads."""
        fake = self._fake(name)
        shape = (state.batch, state.capacity, *map(int, fake.shape[2:]))
        return torch.zeros((), dtype=fake.dtype, device=self.device).expand(shape)

    def _extended(self, name: str, mask: Tensor | None, batch: int, capacity: int) -> Tensor:
        made = torch.full((batch, capacity), self.split.real, device=self.device)
        made = made.to(self._fake(name).dtype)
        if mask is not None:
            if mask.shape[0] != batch or mask.shape[1] > capacity:
                raise Problem("A707", f"the mask {list(mask.shape)} does not fit into a state "
                              f"[{batch}, {capacity}]")  # fmt: skip
            made[:, : mask.shape[1]] = mask
            if self.convolutions and bool((mask != self.split.real).any()):
                self._require_sealed()
        return made

    def _require_sealed(self) -> None:
        if self._leaks:
            raise Problem(
                "A707", f"{self.program.name} takes no padding",
                why="its convolutions read padded positions, so that they change what follows",
                help="give prompts of one length, or a model that sets to zero what its "
                "convolutions read where attention_mask is 0",
            )  # fmt: skip

    @cached_property
    def _leaks(self) -> bool:
        from attnopt.compiler.decode.equal import padding_leaks

        return padding_leaks(self)

    def _fake(self, name: str) -> Tensor:
        fake: Tensor = self.program.node(name).meta["val"]
        return fake


def _dtype_of(program: Program, name: str) -> torch.dtype:
    """The dtype of an attention's keys and values, or of a convolution's weight and inputs."""
    operand = program.node(name).args[1]
    dtype: torch.dtype = operand.meta["val"].dtype  # type: ignore[union-attr]
    return dtype
