"""Encoders, encoder-decoders, vision and audio models of `transformers`."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import VOCABULARY, Encoder, Inputs, Vision
from tests.zoo.architecture import (
    BOTH,
    Architecture,
    Bare,
    Seq2Seq,
    Speech,
    Wave,
    ids,
    image,
    masked,
    seq2seq,
    transformers,
)  # fmt: skip

_COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    **_COMMON,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {**_COMMON, "image_size": 32, "patch_size": 8, "num_channels": 3}
_BART: dict[str, Any] = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "vocab_size": VOCABULARY, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def _text(
    name: str, stem: str, sites: int = 2, *, bare: bool = False,
    spellings: tuple[str, ...] = BOTH, head: str = "", **settings: Any,
) -> Architecture:  # fmt: skip
    build = transformers(head or f"{stem}Model", f"{stem}Config", Bare if bare else Encoder,
                         **{**_TEXT, **settings})  # fmt: skip
    return Architecture(name, "transformers", build, ids if bare else masked, sites, spellings)


def _vision(
    name: str, stem: str, sites: int = 2, *, side: int = 32, spellings: tuple[str, ...] = BOTH,
    head: str = "", config: str = "", **settings: Any,
) -> Architecture:  # fmt: skip
    build = transformers(head or f"{stem}Model", config or f"{stem}Config", Vision, **settings)
    shapes = ((2, 0), (3, 0), (4, 0))
    return Architecture(name, "transformers", build, image(side), sites, spellings, shapes)


def _seq2seq(
    name: str, stem: str, sites: int = 6, *, spellings: tuple[str, ...] = BOTH, head: str = "",
    **settings: Any,
) -> Architecture:  # fmt: skip
    build = transformers(head or f"{stem}Model", f"{stem}Config", Seq2Seq, **settings)
    return Architecture(name, "transformers", build, seq2seq, sites, spellings)


def _spectrogram(batch: int, length: int) -> Inputs:
    return {"input_features": torch.randn(batch, 16, 64),
            "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, length))}  # fmt: skip


def _wave(batch: int, length: int) -> Inputs:
    return {"input_values": torch.randn(batch, 400 + 40 * length)}


_CONVOLUTIONS: dict[str, Any] = {
    "conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "vocab_size": 32,
}  # fmt: skip

ENCODERS = (
    _text("BERT", "Bert"),
    _text("RoBERTa", "Roberta"),
    _text("XLM-RoBERTa", "XLMRoberta"),
    _text("CamemBERT", "Camembert"),
    _text("DistilBERT", "DistilBert", dim=64, n_layers=2, n_heads=4, hidden_dim=96),
    _text("ALBERT (shared layers)", "Albert", embedding_size=32),
    _text("ELECTRA", "Electra", embedding_size=32),
    _text("MPNet", "MPNet", spellings=("eager",)),
    _text("ModernBERT", "ModernBert", bos_token_id=1, eos_token_id=2, cls_token_id=1,
          sep_token_id=2, local_attention=8, global_attn_every_n_layers=2),
    _text("DeBERTa-v2", "DebertaV2", spellings=("eager",), relative_attention=True,
          pos_att_type=["p2c", "c2p"]),
    _text("ESM", "Esm", position_embedding_type="rotary", mask_token_id=4),
    _text("RoFormer", "RoFormer", embedding_size=64, spellings=("eager",)),
    _text("ConvBERT", "ConvBert", embedding_size=64, head_ratio=2, conv_kernel_size=3,
          spellings=("eager",)),
    _text("SqueezeBERT", "SqueezeBert", embedding_size=64, spellings=("eager",), q_groups=1,
          k_groups=1, v_groups=1, post_attention_groups=1, intermediate_groups=1,
          output_groups=1),
    _text("CLIP (text)", "CLIPText", bos_token_id=1, eos_token_id=2),
    _text("SigLIP (text)", "SiglipText", bos_token_id=1, eos_token_id=2, bare=True),
    Architecture("XLNet", "transformers", transformers(
        "XLNetModel", "XLNetConfig", Encoder, vocab_size=VOCABULARY, d_model=64, n_layer=2,
        n_head=4, d_inner=96), masked, 2, ("eager",)),
    Architecture("T5 encoder", "transformers", transformers(
        "T5EncoderModel", "T5Config", Encoder, d_model=64, d_kv=16, d_ff=96, num_layers=2,
        num_heads=4, vocab_size=VOCABULARY), masked, 2),
)  # fmt: skip

SEQ2SEQ = (
    _seq2seq("T5", "T5", d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
             vocab_size=VOCABULARY, decoder_start_token_id=0),
    _seq2seq("BART", "Bart", **_BART),
    _seq2seq("mBART", "MBart", **_BART),
    _seq2seq("Pegasus", "Pegasus", **_BART),
    _seq2seq("Marian", "Marian", **_BART),
    _seq2seq("M2M-100", "M2M100", **_BART),
    Architecture("Whisper", "transformers", transformers(
        "WhisperModel", "WhisperConfig", Speech, **_BART, num_mel_bins=16,
        max_source_positions=32, max_target_positions=64), _spectrogram, 6),
)  # fmt: skip

VISION = (
    _vision("ViT", "ViT", **_VISION),
    _vision("DeiT", "DeiT", **_VISION),
    _vision("BEiT", "Beit", **_VISION, use_relative_position_bias=True),
    _vision("DINOv2", "Dinov2", **_VISION),
    _vision("DINOv3", "DINOv3ViT", **_VISION),
    _vision("Swin", "Swin", 2, image_size=32, patch_size=4, embed_dim=32, depths=[1, 1],
            num_heads=[2, 4], window_size=4),
    _vision("Swin v2", "Swinv2", 2, image_size=32, patch_size=4, embed_dim=32, depths=[1, 1],
            num_heads=[2, 4], window_size=4, spellings=("eager",)),
    _vision("CLIP (vision)", "CLIPVision", **_VISION),
    _vision("SigLIP (vision)", "SiglipVision", **_VISION),
    _vision("SAM (vision encoder)", "SamVision", hidden_size=64, output_channels=32,
            num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8,
            window_size=4, global_attn_indexes=[1], mlp_dim=96, side=64),
    _vision("DETR", "Detr", 6, side=64, spellings=("eager",), d_model=64, encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
            decoder_ffn_dim=96, num_queries=10, use_timm_backbone=False,
            use_pretrained_backbone=False, backbone=None, backbone_config={
                "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32],
                "depths": [1, 1], "out_features": ["stage2"]}),
    _vision("SegFormer", "Segformer", 4, side=64, hidden_sizes=[16, 32, 32, 64],
            depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], sr_ratios=[4, 2, 2, 1],
            decoder_hidden_size=32, spellings=("eager",)),
    _vision("YOLOS", "Yolos", **{**_VISION, "image_size": [32, 32]}, num_detection_tokens=5),
    _vision("PVT", "Pvt", 4, side=64, image_size=64, hidden_sizes=[16, 32, 32, 64],
            depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4],
            sequence_reduction_ratios=[4, 2, 2, 1], spellings=("eager",)),
    _vision("DPT (ViT)", "DPT", **_VISION),
)  # fmt: skip

AUDIO = (
    Architecture("Wav2Vec2", "transformers", transformers(
        "Wav2Vec2Model", "Wav2Vec2Config", Wave, **_COMMON, **_CONVOLUTIONS), _wave, 2),
    Architecture("HuBERT", "transformers", transformers(
        "HubertModel", "HubertConfig", Wave, **_COMMON, **_CONVOLUTIONS), _wave, 2),
)  # fmt: skip
