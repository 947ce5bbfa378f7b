"""Models of `diffusers`, `x-transformers`, `vit-pytorch` and torch itself."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.families import VOCABULARY, Cross, Inputs, Nano, TorchEncoder, floats, ids
from tests.zoo.architecture import Architecture, image

_FIXED = ((2, 0), (3, 0), (4, 0))


class Given(nn.Module):
    """A model called with named tensors; the first tensor of what it gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def _first(self, *args: Tensor, **inputs: Any) -> Tensor:
        made = self.model(*args, **inputs)
        found: Tensor = made if isinstance(made, Tensor) else made[0]
        return found


class OneInput(Given):
    """Called with one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return self._first(x)


class Tokens(Given):
    """Called with token ids."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._first(input_ids)


class Classed(Given):
    """DiT: an image, a time and a class."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self._first(hidden_states, timestep=timestep, class_labels=class_labels)


class Conditioned(Given):
    """UNet: an image, a time and a text."""

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self._first(sample, timestep=timestep, encoder_hidden_states=encoder_hidden_states)


class Joint(Given):
    """MMDiT: an image and a text in one attention."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor,
        timestep: Tensor,
    ) -> Tensor:  # fmt: skip
        return self._first(
            hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections, timestep=timestep,
        )  # fmt: skip


class Placed(Given):
    """Flux: image and text tokens with their positions."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor,
        timestep: Tensor, img_ids: Tensor, txt_ids: Tensor,
    ) -> Tensor:  # fmt: skip
        return self._first(
            hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections, timestep=timestep, img_ids=img_ids,
            txt_ids=txt_ids,
        )  # fmt: skip


def _diffusers(kind: str, wrapper: type[Given], **settings: Any) -> Callable[[str], nn.Module]:
    def build(spelling: str) -> nn.Module:
        import diffusers
        from diffusers.models.attention_processor import AttnProcessor

        torch.manual_seed(0)
        model = getattr(diffusers, kind)(**settings)
        if spelling == "eager":
            model.set_attn_processor(AttnProcessor())
        return wrapper(model).eval()

    return build


def _latents(batch: int, length: int) -> Tensor:
    return torch.randn(batch, 4, 8, 8)


def _classed(batch: int, length: int) -> Inputs:
    return {"hidden_states": _latents(batch, 0), "timestep": torch.randint(0, 100, (batch,)),
            "class_labels": torch.randint(0, 10, (batch,))}  # fmt: skip


def _conditioned(batch: int, length: int) -> Inputs:
    return {"sample": torch.randn(batch, 4, 16, 16), "timestep": torch.randint(0, 100, (batch,)),
            "encoder_hidden_states": torch.randn(batch, length, 32)}  # fmt: skip


def _joint(batch: int, length: int) -> Inputs:
    return {"hidden_states": _latents(batch, 0),
            "encoder_hidden_states": torch.randn(batch, length, 32),
            "pooled_projections": torch.randn(batch, 32),
            "timestep": torch.randint(0, 100, (batch,))}  # fmt: skip


def _placed(batch: int, length: int) -> Inputs:
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(length * 1.0))
    return {"hidden_states": torch.randn(batch, 4 * length, 4),
            "encoder_hidden_states": torch.randn(batch, length + 1, 32),
            "pooled_projections": torch.randn(batch, 32), "timestep": torch.rand(batch),
            "img_ids": grid, "txt_ids": torch.zeros(length + 1, 3)}  # fmt: skip


DIFFUSERS = (
    Architecture("DiT", "diffusers", _diffusers(
        "DiTTransformer2DModel", Classed, num_attention_heads=4, attention_head_dim=16,
        in_channels=4, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
        norm_num_groups=8), _classed, 2, ("sdpa",), _FIXED),
    Architecture("SD3 (MMDiT)", "diffusers", _diffusers(
        "SD3Transformer2DModel", Joint, sample_size=8, patch_size=2, in_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=64, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=16), _joint, 2, ("sdpa",)),
    Architecture("Flux", "diffusers", _diffusers(
        "FluxTransformer2DModel", Placed, patch_size=1, in_channels=4, num_layers=1,
        num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8)),
        _placed, 2, ("sdpa",)),
    Architecture("UNet2DCondition", "diffusers", _diffusers(
        "UNet2DConditionModel", Conditioned, sample_size=16, in_channels=4, out_channels=4,
        layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32,
        attention_head_dim=4, norm_num_groups=8), _conditioned, 8),
)  # fmt: skip


def _x(**settings: Any) -> Callable[[str], nn.Module]:
    def build(spelling: str) -> nn.Module:
        import x_transformers

        torch.manual_seed(0)
        kind = getattr(x_transformers, settings.get("kind", "Decoder"))
        layers = {k: v for k, v in settings.items() if k != "kind"}
        return Tokens(x_transformers.TransformerWrapper(
            num_tokens=VOCABULARY, max_seq_len=64,
            attn_layers=kind(dim=64, depth=2, heads=4, attn_dim_head=16,
                             attn_flash=spelling == "sdpa", **layers))).eval()  # fmt: skip

    return build


X_TRANSFORMERS = (
    Architecture("x-transformers decoder", "x-transformers", _x(), ids, 2),
    Architecture("x-transformers encoder", "x-transformers", _x(kind="Encoder"), ids, 2),
    Architecture("x-transformers rotary", "x-transformers", _x(rotary_pos_emb=True), ids, 2),
    Architecture("x-transformers ALiBi", "x-transformers", _x(alibi_pos_bias=True), ids, 2),
    Architecture(
        "x-transformers relative bias", "x-transformers", _x(rel_pos_bias=True), ids, 2, ("eager",)
    ),
    Architecture("x-transformers grouped", "x-transformers", _x(attn_kv_heads=2), ids, 2),
    Architecture("x-transformers qk norm", "x-transformers", _x(attn_qk_norm=True), ids, 2),
)


def _vit(file: str, kind: str, **settings: Any) -> Callable[[str], nn.Module]:
    """A module of `vit-pytorch`, loaded by file: the package as a whole imports torchvision."""

    def build(spelling: str) -> nn.Module:
        root = importlib.util.find_spec("vit_pytorch")
        if root is None or not root.submodule_search_locations:
            raise ModuleNotFoundError("vit-pytorch", name="vit_pytorch")
        path = Path(root.submodule_search_locations[0]) / f"{file}.py"
        spec = importlib.util.spec_from_file_location(f"vit_pytorch_{file}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        return OneInput(getattr(module, kind)(**settings)).eval()

    return build


_PICTURE = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 64, "heads": 4,
            "mlp_dim": 96}  # fmt: skip


def _pictures(batch: int, length: int) -> Inputs:
    return {"x": image(32)(batch, length)["pixel_values"]}


def _picture(name: str, file: str, kind: str, sites: int = 2, **settings: Any) -> Architecture:
    build = _vit(file, kind, **{**_PICTURE, "dim_head": 16, "depth": 2, **settings})
    return Architecture(name, "vit-pytorch", build, _pictures, sites, ("eager",), _FIXED)


VIT_PYTORCH = (
    _picture("vit-pytorch ViT", "vit", "ViT"),
    _picture("vit-pytorch SimpleViT", "simple_vit", "SimpleViT"),
    _picture("vit-pytorch CaiT", "cait", "CaiT", 3, cls_depth=1),
    _picture("vit-pytorch DeepViT", "deepvit", "DeepViT"),
)


def _torch(kind: Callable[[], nn.Module]) -> Callable[[str], nn.Module]:
    def build(spelling: str) -> nn.Module:
        torch.manual_seed(0)
        return kind().eval()

    return build


class TorchDecoder(nn.Module):
    """`nn.TransformerDecoder` with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(64, 4, 96, batch_first=True)
        self.layers = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        made: Tensor = self.layers(x, memory, tgt_mask=mask, tgt_is_causal=True)
        return made


class SequenceFirst(nn.Module):
    """`nn.TransformerEncoder` on `[seq, batch, width]`."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 96)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layers(x)
        return made


def _two(batch: int, length: int) -> Inputs:
    return {**floats(batch, length), "memory": torch.randn(batch, length + 4, 64)}


TORCH = (
    Architecture("nn.TransformerEncoder", "torch", _torch(TorchEncoder), floats, 2, ("sdpa",)),
    Architecture("nn.TransformerEncoder, sequence first", "torch", _torch(SequenceFirst),
                 floats, 2, ("sdpa",)),
    Architecture("nn.TransformerDecoder", "torch", _torch(TorchDecoder), _two, 4, ("sdpa",)),
    Architecture("nn.MultiheadAttention", "torch", _torch(lambda: Cross(False)), _two, 1,
                 ("sdpa",)),
    Architecture("nn.MultiheadAttention, weights", "torch", _torch(lambda: Cross(True)), _two, 1,
                 ("eager",)),
    Architecture("nanoGPT-style", "torch", _torch(Nano), floats, 2, ("eager",)),
)  # fmt: skip

OTHERS = (*DIFFUSERS, *X_TRANSFORMERS, *VIT_PYTORCH, *TORCH)
