"""A derived decoder as a model of transformers, so that its `generate()` and its pipelines run
it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.decode.decoder import Decoder
from attnopt.compiler.decode.state import State
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.hf_config import require_transformers
from attnopt.compiler.program import attribute

ROOM = 256  # tokens that a state has room for beyond the prompt; it doubles when they are used up

_MISSING = ("labels", "inputs_embeds", "output_hidden_states", "output_attentions")


class Past:
    """The tokens read so far, with the methods that transformers asks of a cache. The state is made
    with the first of them."""

    is_compileable = False

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.state: State | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens there are."""
        return 0 if self.state is None else self.state.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The most tokens that fit: as many as are wanted."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from row `beam_idx[i]`."""
        if self.state is not None:
            self.decoder.reorder(self.state, beam_idx)

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens; numbers up to 0 count those to take back."""
        if self.state is not None:
            wanted = max_length if max_length > 0 else self.state.length + max_length
            self.decoder.rewind(self.state, min(wanted, self.state.length))

    def activate_past_recording(self) -> None:
        """Nothing has to be prepared for `crop`; a window takes back its slack."""

    def read(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, last: bool
    ) -> Tensor:
        """Read new tokens int64 `[batch, S]`; `mask` `[batch, n]` reaches over those before too."""
        decoder = self.decoder
        if self.state is None:
            rows, prompt = ids.shape
            seen = None if mask is None else mask[:, :prompt]
            decoder = self.decoder = decoder.taking(seen)
            given = decoder.masks(seen)
            try:
                self.state = decoder.state(rows, prompt + ROOM, given)
            except Problem:  # the model has no positions for so many
                self.state = decoder.state(rows, prompt, given)
        needed = self.state.length + ids.shape[1]
        if needed > self.state.capacity:
            try:
                decoder.grow(self.state, 2 * needed)
            except Problem:
                decoder.grow(self.state, needed)
        if mask is not None and not bool(mask[:, self.state.length : needed].all()):
            if not decoder.split.masks:
                raise _no(
                    "padding after tokens that were read without",
                    "pad the first prompt on the left",
                )
            decoder.pad(self.state, decoder.masks(mask[:, :needed]))
        if positions is None:
            at = torch.arange(self.state.length, needed, device=ids.device)
            positions = at.expand(ids.shape)
        read = [positions if "position" in name else ids for name in decoder.split.tokens]
        return decoder.step(self.state, *read, last=last)


def as_transformers(decoder: Decoder, config: Any) -> Any:
    """A `PreTrainedModel` that generates with a decoder.

    `config` is the original model's configuration, its folder or its `PreTrainedConfig`; a
    `generation_config.json` beside it is taken too. Raises `Problem` A115 without transformers.
    """
    transformers = require_transformers("")
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class DecoderForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):  # type: ignore[name-defined]
        main_input_name = "input_ids"
        # Whatever the configuration asks for, the attentions are the decoder's own.
        _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

        def __init__(self, settings: Any) -> None:
            super().__init__(settings)
            self.weights = decoder.program.module

        def _prepare_cache_for_generation(
            self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
        ) -> None:
            if generation_config.use_cache is not False:
                model_kwargs.setdefault("past_key_values", Past(decoder))

        def get_input_embeddings(self) -> torch.nn.Module:
            """The table of the tokens, with the decoder's own weights. Raises `Problem` A707 where
            they are looked up in none, or in several."""
            return _embeddings(decoder)

        def set_input_embeddings(self, value: torch.nn.Module) -> None:
            """Raises `Problem` A707: the graph has its table."""
            raise _no("other embeddings", "change them in the original model, and derive it again")

        def resize_token_embeddings(self, *_: Any, **__: Any) -> torch.nn.Module:
            """Raises `Problem` A707: the graph has its table."""
            raise _no("other embeddings", "change them in the original model, and derive it again")

        @torch.no_grad()
        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            past_key_values: Past | None = None,
            use_cache: bool | None = None,
            logits_to_keep: int | Tensor = 0,
            return_dict: bool | None = None,
            **more: Any,
        ) -> CausalLMOutputWithPast | tuple[Any, ...]:
            """Logits `[batch, S, vocabulary]` and the tokens read so far, as a tuple where
            `return_dict` says so. `logits_to_keep` is how many of the last positions have logits (0
            for all), or which, int64 `[n]`. Raises `Problem` A707 where losses, hidden states or
            attentions are asked for, or another cache is given."""
            given = {name: more.get(name) for name in _MISSING}
            asked = [name for name, x in given.items() if x is not None and x is not False]
            if asked or not isinstance(past_key_values, Past | None):
                what = ", ".join(asked) or type(past_key_values).__name__
                raise _no(what, "it gives logits, from tokens and its own cache")
            past = past_key_values or Past(decoder)
            single = False
            kept: slice | Tensor
            if isinstance(logits_to_keep, int):
                single, kept = logits_to_keep == 1, slice(-logits_to_keep, None)
            else:
                kept = logits_to_keep
            logits = past.read(input_ids, attention_mask, position_ids, single)
            if not single:
                logits = logits[:, kept]
            made = CausalLMOutputWithPast(
                logits=logits,
                past_key_values=past if use_cache is not False else None,  # type: ignore[arg-type]
            )
            whole = self.config.return_dict if return_dict is None else return_dict
            return made if whole else made.to_tuple()

    made = DecoderForCausalLM(_config(transformers, config)).eval()
    if not isinstance(config, transformers.PretrainedConfig):
        with_settings = transformers.GenerationConfig
        try:
            made.generation_config = with_settings.from_pretrained(config, local_files_only=True)
        except OSError:
            made.generation_config = with_settings.from_model_config(made.config)
    return made


def _no(what: str, help: str) -> Problem:
    return Problem("A707", f"the decoder has no use for {what}", help=help)


def _embeddings(decoder: Decoder) -> torch.nn.Embedding:
    """The table in which a decoder looks its tokens up."""
    program = decoder.program
    tokens = [program.node(name) for name in decoder.split.tokens if "position" not in name]
    tables = {
        str(table.target)
        for node in tokens
        for user in node.users
        if user.target is torch.ops.aten.embedding.default
        and isinstance(table := user.args[0], torch.fx.Node)
        and table.op == "get_attr"
    }
    if len(tables) != 1:
        raise Problem(
            "A707", f"the decoder has no one table of embeddings, but {len(tables)}",
            help="take it from the original model",
        )  # fmt: skip
    weight = attribute(program.module, tables.pop()).detach()
    made: torch.nn.Embedding = torch.nn.Embedding.from_pretrained(weight)
    return made


def _config(transformers: Any, config: Any) -> Any:
    if isinstance(config, transformers.PretrainedConfig):
        return config
    try:
        return transformers.AutoConfig.from_pretrained(config, local_files_only=True)
    except (OSError, ValueError) as error:
        raise Problem(
            "A707", f"no configuration of transformers in {config}",
            why=str(error).splitlines()[0], help="give the folder of the original model",
        ) from error  # fmt: skip
