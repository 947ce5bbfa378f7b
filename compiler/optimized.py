"""`Optimized`: an optimized program that is called like the model it was made from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.compiler.compiled import Compiled
from attnopt.compiler.device import CPU, Carried, moved
from attnopt.compiler.errors import Notice, Problem
from attnopt.compiler.plan import Plan
from attnopt.compiler.signature import Signature

if TYPE_CHECKING:
    from attnopt.compiler.contract import Miss
    from attnopt.compiler.decode.decoder import Decoder
    from attnopt.compiler.decode.draft import Draft
    from attnopt.compiler.program import Batch


DECODE = "decode.pt2"  # beside the model of a run; see `attnopt.compiler.decode.stored`


class Outputs(dict[Any, Any]):
    """A model's outputs by name, readable as attributes (`out.logits`) and by position
    (`out[0]`).
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"no output `{name}`; there are {', '.join(map(str, self))}")
        return self[name]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)) and key not in self.keys():
            return tuple(self.values())[key]
        return super().__getitem__(key)


pytree.register_pytree_node(
    Outputs, lambda made: (list(made.values()), list(made)),
    lambda values, names: Outputs(zip(names, values, strict=True)),
)  # fmt: skip


class Optimized:
    """A loaded run: call it like the model. `signature` says which inputs it takes.

    `plan` is what was done to it, `report` its report.json. It is for inference: no weight asks for
    a gradient. `device` is where its weights are and its inputs have to be. Where the plan says
    `compiled`, the first call compiles it with torch.compile; where that cannot be done it runs
    uncompiled, with one warning.
    """

    def __init__(
        self,
        exported: torch.export.ExportedProgram,
        plan: Mapping[str, Any],
        report: Mapping[str, Any],
        folder: Path,
        device: torch.device = CPU,
    ) -> None:
        self.exported, self.report, self.folder = exported, dict(report), folder
        self.device = device
        self.signature = Signature.of(exported)
        self._carried = Carried(device)
        made = moved(exported.module(), self._carried)
        self.module: Callable[..., Any] = made.requires_grad_(False)
        self._plan = dict(plan)
        if plan.get("compiled"):
            self.module = Compiled(
                self.module, "the optimized model", where=str(folder),
                help="it was measured under torch.compile, which needs a C++ compiler",
            )  # fmt: skip

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs in the structure that the model returns. Raises `Problem` A506 on other
        inputs.
        """
        self._require_here((args, kwargs))
        fitted, named = self.signature.fit(args, kwargs)
        outputs = self.module(*fitted, **named)
        return Outputs(outputs) if isinstance(outputs, dict) else outputs

    def _require_here(self, inputs: Any) -> None:
        """Raise `Problem` A411 for tensors that are not where the weights are."""
        for leaf in pytree.tree_leaves(inputs):
            if isinstance(leaf, Tensor) and leaf.device != self.device and leaf.dim() > 0:
                raise Problem(
                    "A411", f"the inputs are on {leaf.device}, the model is on {self.device}",
                    where=str(self.folder),
                    help="move the inputs there, or load the run with "
                    f'device="{leaf.device}"',
                )  # fmt: skip

    @property
    def plan(self) -> Plan:
        """The rewrites that made this model. Raises `Problem` A501 when this version cannot read
        them.
        """
        return Plan.from_json(self._plan)

    @cached_property
    def decoder(self) -> Decoder:
        """The model as a prompt and single steps over a cache.

        Raises `Problem` A708 where none was derived of it, with the reason.
        """
        from attnopt.compiler.decode.stored import restored

        path = self.folder / DECODE
        if not path.is_file():
            told = self._plan.get("decode") or {}
            raise Problem(
                "A708", "this model cannot be decoded with a cache", where=str(self.folder),
                why=str(told.get("why_not", "the run was saved before caches were derived")),
                help="" if told else "run optimize again",
            )  # fmt: skip
        return restored(path, self.exported, self._carried)

    def draft(
        self, texts: Sequence[Batch | Tensor] | Tensor = (), remember: bool = False, **how: Any
    ) -> Draft | Miss:
        """The model without some sublayers, to `generate` with as `speculate`, or why none pays.

        It is chosen by measurement on `texts`, batches or tokens int64 `[batch, seq]`; without them
        and without settings it is what was remembered, or is chosen on the batches that the run
        kept. The arguments of `Sampling` say what it is chosen for. `remember` writes it into the
        run's plan.json. Raises `Problem` A707 on unknown settings, A708 as `decoder` does, and A709
        where there is no text.
        """
        from attnopt.compiler.artifact import load_calibration, remember_draft
        from attnopt.compiler.decode.draft import choose, restored, told
        from attnopt.compiler.decode.generate import read

        settings = read(how)
        known = (self._plan.get("decode") or {}).get("speculate")
        given: list[Batch | Tensor] = [texts] if isinstance(texts, Tensor) else list(texts)
        if known is not None and not given and not how:
            return restored(self.decoder, known)
        given = given or list(load_calibration(self.folder).get("calibration", ()))
        made = choose(self.decoder, given, settings)
        if remember:
            self.__dict__.pop("_usual_draft", None)
            remember_draft(self.folder, told(made))
            self._plan["decode"] = {**self._plan["decode"], "speculate": told(made)}
        return made

    @cached_property
    def _usual_draft(self) -> Draft | None:
        """The draft, or None after a warning (A710) that says why there is none."""
        from attnopt.compiler.contract import Miss

        made = self.draft()
        if not isinstance(made, Miss):
            return made
        notice = Notice("A710", "it is decoded without a draft", str(self.folder), made.reason)
        warnings.warn(str(notice), RuntimeWarning, stacklevel=4)
        return None

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        speculate: Draft | bool = False,
        **how: Any,
    ) -> Tensor:
        """The prompts with new tokens after them, int64 `[batch, prompt + new]`.

        `input_ids` is int64 `[batch, prompt]`, padded on the left where `attention_mask`, of that
        shape, is 0; the other arguments are those of `Generation`: `max_new_tokens`, `do_sample`,
        `temperature`, `top_k`, `top_p`, `seed`, `eos_token_id`, `pad_token_id`, `prefill_chunk`.
        With `speculate` a draft guesses tokens, which changes none of them without sampling (up to
        ties within rounding) and their distribution never; True takes what `draft()` gives. Raises
        `Problem` A707 on
        arguments that do not fit and A708 as `decoder` does.
        """
        columns = self.stream(input_ids, attention_mask, speculate, **how)
        return torch.cat((input_ids, *(tokens[:, None] for tokens in columns)), 1)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        speculate: Draft | bool = False,
        **how: Any,
    ) -> Iterator[Tensor]:
        """As `generate`: gives each new column, int64 `[batch]`, as soon as it is there."""
        from attnopt.compiler.decode.generate import read, stream
        from attnopt.compiler.decode.speculate import stream_speculatively

        settings = read(how)
        self._require_here(input_ids)
        draft = self._usual_draft if speculate is True else speculate or None
        if draft is None:
            return stream(self.decoder, input_ids, settings, attention_mask)
        return stream_speculatively(self.decoder, draft, input_ids, settings, attention_mask)

    def as_transformers(self, config: Any) -> Any:
        """The decoder as a `PreTrainedModel`: transformers' `generate()` and its pipelines run
        it.

        `config` is the original model's folder or its `PretrainedConfig`. Raises `Problem` A115
        without transformers, and A708 as `decoder` does.
        """
        from attnopt.compiler.decode.hf import as_transformers

        return as_transformers(self.decoder, config)

    @property
    def compiled(self) -> bool:
        """Whether calls run under torch.compile."""
        return isinstance(self.module, Compiled) and self.module.form is not None

    def __repr__(self) -> str:
        steps = [str(step.get("rewrite", "")) for step in self._plan.get("steps", ())]
        return (
            f"Optimized({self.folder}: {', '.join(steps) or 'unchanged'}; takes {self.signature})"
        )
