"""A derived decoder as a model of transformers, so that its `generate()`, pipelines and evaluation
harnesses run it unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.decode.decoder import Decoder, State
from attnopt.compiler.intake.hf_config import require_transformers

ROOM = 256  # tokens that a state has room for beyond the prompt; it doubles when they are used up


class Past:
    """The tokens read so far, with the methods that transformers asks of a cache."""

    is_compileable = False

    def __init__(self, decoder: Decoder, state: State) -> None:
        self.decoder, self.state = decoder, state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens there are."""
        return self.state.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The most tokens that fit: as many as are wanted."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from row `beam_idx[i]`."""
        self.decoder.reorder(self.state, beam_idx)

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens; negative numbers count those to take back."""
        wanted = max_length if max_length >= 0 else self.state.length + max_length
        self.decoder.rewind(self.state, min(wanted, self.state.length))


def as_transformers(decoder: Decoder, config: Any) -> Any:
    """A `PreTrainedModel` that generates with a decoder.

    `config` is the original model's configuration, its folder or its `PreTrainedConfig`; a
    `generation_config.json` beside it is taken too. Raises `Problem` A115 without transformers.
    """
    transformers = require_transformers("")
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class DecoderForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):  # type: ignore[name-defined]
        main_input_name = "input_ids"

        def __init__(self, settings: Any) -> None:
            super().__init__(settings)
            self.weights = decoder.program.module

        @classmethod
        def _supports_default_dynamic_cache(cls) -> bool:
            return False  # the cache is the decoder's own

        @torch.no_grad()
        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            position_ids: Tensor | None = None,
            past_key_values: Past | None = None,
            use_cache: bool | None = None,
            logits_to_keep: int = 0,
            **_: Any,
        ) -> CausalLMOutputWithPast:
            """Logits `[batch, S, vocabulary]`, or those of the last position where
            `logits_to_keep` is 1, and the tokens read so far."""
            past = past_key_values or Past(decoder, _started(decoder, input_ids, attention_mask))
            logits = _read(past, input_ids, position_ids, last=logits_to_keep == 1)
            return CausalLMOutputWithPast(
                logits=logits,
                past_key_values=past if use_cache is not False else None,  # type: ignore[arg-type]
            )

    made = DecoderForCausalLM(_config(transformers, config)).eval()
    if not isinstance(config, transformers.PretrainedConfig):
        with_settings = transformers.GenerationConfig
        try:
            made.generation_config = with_settings.from_pretrained(config, local_files_only=True)
        except OSError:
            made.generation_config = with_settings.from_model_config(made.config)
    return made


def _config(transformers: Any, config: Any) -> Any:
    if isinstance(config, transformers.PretrainedConfig):
        return config
    return transformers.AutoConfig.from_pretrained(config, local_files_only=True)


def _started(decoder: Decoder, ids: Tensor, mask: Tensor | None) -> State:
    masks = decoder.masks(mask)
    return decoder.state(ids.shape[0], ids.shape[1] + ROOM, masks)


def _read(past: Past, ids: Tensor, positions: Tensor | None, last: bool) -> Tensor:
    decoder, state = past.decoder, past.state
    needed = state.length + ids.shape[1]
    if needed > state.capacity:
        decoder.grow(state, max(needed, 2 * state.capacity))
    if positions is None:
        at = torch.arange(state.length, needed, device=ids.device)
        positions = at.expand(ids.shape)
    given = [positions if "position" in name else ids for name in decoder.split.tokens]
    return decoder.step(state, *given, last=last)
