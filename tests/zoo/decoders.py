"""Decoders of `transformers`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.families import VOCABULARY, Decoder
from tests.zoo.architecture import (
    BOTH,
    Architecture,
    Masked,
    Packed,
    ids,
    masked,
    packed,
    transformers,
)

_COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 192, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_PLAIN = {**_COMMON, "num_key_value_heads": 2}
_GROUPED = {**_PLAIN, "head_dim": 16}
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GPT = {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 192}


def _decoder(
    name: str, stem: str, sites: int = 2, *, head: str = "", config: str = "",
    spellings: tuple[str, ...] = BOTH, padded: bool = False, double: bool = True,
    **settings: Any,
) -> Architecture:  # fmt: skip
    build = transformers(
        head or f"{stem}ForCausalLM", config or f"{stem}Config", Masked if padded else Decoder,
        **settings,
    )  # fmt: skip
    inputs = masked if padded else ids
    return Architecture(name, "transformers", build, inputs, sites, spellings, double=double)


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    **_COMMON, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip

DECODERS = (
    _decoder("Llama", "Llama", **_GROUPED),
    _decoder("Llama, padded", "Llama", padded=True, **_GROUPED),
    _decoder("Llama-3 (scaled rotary)", "Llama", **_GROUPED, rope_parameters={
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    _decoder("Llama, linear rotary", "Llama", **_GROUPED, rope_parameters={
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
    _decoder("Llama, YaRN rotary", "Llama", **_GROUPED, rope_parameters={
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 32}),
    _decoder("Llama, dynamic rotary", "Llama", **_GROUPED, rope_parameters={
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
    replace(_decoder("Llama, packed", "Llama", **_GROUPED), inputs=packed,
            build=transformers("LlamaForCausalLM", "LlamaConfig", Packed, **_GROUPED)),
    _decoder("Qwen2-VL (text)", "Qwen2VL", head="Qwen2VLTextModel", config="Qwen2VLTextConfig",
             **_PLAIN, rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                                        "mrope_section": [2, 3, 3]}),
    _decoder("LLaVA (text)", "Llava", head="LlavaForConditionalGeneration",
             text_config={"model_type": "llama", **_GROUPED},
             vision_config={"model_type": "clip_vision_model", "hidden_size": 32,
                            "intermediate_size": 32, "num_hidden_layers": 1,
                            "num_attention_heads": 2, "image_size": 8, "patch_size": 4}),
    _decoder("Llama 4 (text)", "Llama4", config="Llama4TextConfig", **_GROUPED,
             intermediate_size_mlp=96, num_local_experts=2, interleave_moe_layer_step=2,
             attention_chunk_size=8),
    _decoder("Mistral", "Mistral", **_GROUPED, sliding_window=6),
    _decoder("Mixtral", "Mixtral", double=False, **_GROUPED,
             num_local_experts=4, num_experts_per_tok=2),
    _decoder("Qwen2", "Qwen2", **_PLAIN),
    _decoder("Qwen2-MoE", "Qwen2Moe", double=False, **_PLAIN,
             **_EXPERTS, shared_expert_intermediate_size=32),
    _decoder("Qwen3", "Qwen3", **_GROUPED),
    _decoder("Qwen3-MoE", "Qwen3Moe", double=False, **_GROUPED, **_EXPERTS),
    _decoder("Gemma", "Gemma", **_GROUPED),
    _decoder("Gemma 2", "Gemma2", spellings=("eager",), **_GROUPED,
             sliding_window=6, query_pre_attn_scalar=16),
    _decoder("Gemma 3", "Gemma3", config="Gemma3TextConfig", **_GROUPED, sliding_window=6,
             query_pre_attn_scalar=16,
             layer_types=["sliding_attention", "full_attention"]),
    _decoder("Phi", "Phi", **_COMMON, partial_rotary_factor=0.5),
    _decoder("Phi-3", "Phi3", **_PLAIN),
    _decoder("GPT-2", "GPT2", head="GPT2LMHeadModel", **_GPT),
    _decoder("GPT-J", "GPTJ", spellings=("eager",), double=False, **_GPT, rotary_dim=8),
    _decoder("GPT-Neo", "GPTNeo", double=False, **_TOKENS, hidden_size=64, num_layers=2,
             num_heads=4,
             intermediate_size=96, max_position_embeddings=192, window_size=6,
             attention_types=[[["global", "local"], 1]], spellings=("eager",)),
    _decoder("GPT-NeoX", "GPTNeoX", **_COMMON, rotary_pct=0.25),
    _decoder("GPT-BigCode (MQA)", "GPTBigCode", **_GPT, multi_query=True),
    _decoder("Falcon, multi-query", "Falcon", **_TOKENS, hidden_size=64, num_hidden_layers=2,
             num_attention_heads=4, multi_query=True, new_decoder_architecture=False,
             parallel_attn=True),
    _decoder("Falcon, new decoder", "Falcon", **_TOKENS, hidden_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True),
    _decoder("Falcon, ALiBi", "Falcon", **_TOKENS, hidden_size=64, num_hidden_layers=2,
             num_attention_heads=4, multi_query=False, new_decoder_architecture=False,
             alibi=True, parallel_attn=False),
    _decoder("MPT (ALiBi)", "Mpt", **_TOKENS, d_model=64, n_heads=4, n_layers=2, max_seq_len=192,
             spellings=("eager",)),
    _decoder("BLOOM (ALiBi)", "Bloom", **_TOKENS, hidden_size=64, n_layer=2, n_head=4,
             spellings=("eager",)),
    _decoder("OPT", "OPT", **_TOKENS, hidden_size=64, ffn_dim=96, num_hidden_layers=2,
             num_attention_heads=4, max_position_embeddings=192, word_embed_proj_dim=64),
    _decoder("StableLM", "StableLm", **_PLAIN),
    _decoder("OLMo2", "Olmo2", **_PLAIN),
    _decoder("Cohere", "Cohere", **_PLAIN),
    _decoder("Cohere 2", "Cohere2", **_GROUPED, sliding_window=6),
    _decoder("Granite", "Granite", **_PLAIN),
    _decoder("DeepSeek-V2 (MLA)", "DeepseekV2", double=False, **_LATENT),
    _decoder("DeepSeek-V3 (MLA)", "DeepseekV3", double=False, **_LATENT),
    _decoder("GPT-OSS (sinks)", "GptOss", double=False, **_GROUPED,
             num_local_experts=4, num_experts_per_tok=2,
             sliding_window=6, spellings=("eager",)),
    _decoder("SmolLM3", "SmolLM3", **_PLAIN),
    _decoder("StarCoder2", "Starcoder2", **_PLAIN),
    _decoder("GLM-4", "Glm", **_GROUPED),
    _decoder("Nemotron", "Nemotron", **_GROUPED),
    _decoder("Persimmon", "Persimmon", **_COMMON),
    _decoder("CodeGen", "CodeGen", double=False, **_GPT, rotary_dim=8, spellings=("eager",)),
    _decoder("BioGPT", "BioGpt", **_COMMON),
    _decoder("XGLM", "XGLM", double=False, **_TOKENS, d_model=64, ffn_dim=96, num_layers=2,
             attention_heads=4,
             max_position_embeddings=192, spellings=("eager",)),
    _decoder("Helium", "Helium", **_GROUPED),
    _decoder("ERNIE 4.5", "Ernie4_5", **_GROUPED),
    _decoder("EXAONE 4", "Exaone4", **_PLAIN,
             sliding_window=6, sliding_window_pattern=2),
    _decoder("Seed-OSS", "SeedOss", **_GROUPED),
    _decoder("Apertus", "Apertus", **_PLAIN),
    _decoder("ImageGPT", "ImageGPT", head="ImageGPTModel",
             **{**_GPT, "vocab_size": VOCABULARY}, spellings=("eager",)),
)  # fmt: skip
