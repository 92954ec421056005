"""A vision–language model as the tower of texts, images and items of both (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).

The model folder is that of a text tower, with preprocessor_config.json beside: how images are resized, so that each
has at most `model.vision.max_image_tokens` tokens, and scaled.

Shapes: n items, L tokens padded on the right, H the width of the language model; T patches of all images of a chunk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_services.schema import UsageError
from trainers.config import FromConfig, ModelConfig
from trainers.encoders.image import PREPROCESSOR, scaling
from trainers.encoders.spec import ModelSpec
from trainers.encoders.text import TextEncoder
from trainers.tower_config import VisionFromConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
READS = "vision"  # `ModelSpec.reads`
TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_MROPE_SHARES = (2, 3, 3)  # of the head's half, that turn with time, height and width
_PREPROCESSING: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "temporal_patch_size": 2,
}


class VisionLanguageEncoder(TextEncoder):
    """`TextEncoder` whose chunks may hold images: `arrays["patches"]` [T, 3·side²] uint8, `arrays["grids"]` [images, 2]
    rows and columns of patches, in the order of the places that the tokens have for them.

    A chunk without images gets one more item, an image of the smallest size, whose vector is dropped: at ZeRO-3 every
    worker must run the same parts in the same order.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        spec: ModelSpec,
        folder: Path,
        token_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(backbone, spec, token_dropout, dropout)
        self._scaling = scaling(
            json.loads((folder / PREPROCESSOR).read_text())
        )  # no buffers: the engine would round them to bf16
        vision = backbone.config.vision_config
        self._frames, self._merge, self._side = vision.temporal_patch_size, vision.spatial_merge_size, vision.patch_size

    def _hidden(self, ids: Tensor, mask: Tensor, layers: Sequence[int], arrays: Mapping[str, Tensor]) -> list[Tensor]:
        if len(arrays.get("grids", ())):
            return super()._hidden(ids, mask, layers, arrays)
        first = torch.zeros_like(ids[:1])
        first[:, 0] = 1
        blank = {
            "patches": ids.new_zeros(self._merge**2, 3 * self._side**2, dtype=torch.uint8),
            "grids": ids.new_full((1, 2), self._merge),
        }
        one_more = torch.cat([ids, first * self.backbone.config.image_token_id])
        hidden = super()._hidden(one_more, torch.cat([mask, first.to(mask)]), layers, blank)
        return [layer[:-1] for layer in hidden]

    def _seen(self, ids: Tensor, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
        if not arrays:
            return {}
        types = (ids == self.backbone.config.image_token_id).int()
        return self._images(arrays) | {"mm_token_type_ids": types}

    def _images(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the backbone takes of the images: a still is as many equal frames as a patch is deep."""
        patches, grids = arrays["patches"], arrays["grids"].long()
        scale, shift = (x.view(3, 1).to(patches.device) for x in self._scaling)
        values = patches.view(len(patches), 3, -1).float() * scale + shift
        frames = values[:, :, None].expand(-1, -1, self._frames, -1).reshape(len(patches), -1)
        one = torch.ones_like(grids[:, :1])
        return {"pixel_values": frames, "image_grid_thw": torch.cat([one, grids], dim=1)}


def random_vision_language(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> PreTrainedModel:
    """A model of the recipe's sizes from the current torch generator; the tokenizer gets the tokens of `TOKENS`."""
    from transformers import AutoModel

    assert config.config is not None, "ModelConfig has both sizes or neither"
    assert config.vision is not None, "asked for by a recipe that has one"
    assert config.vision.config is not None, "ModelConfig has both sizes or neither"
    tokenizer.add_tokens(list(TOKENS.values()), special_tokens=True)
    return AutoModel.from_config(vision_language_config(config.config, config.vision.config, tokenizer, max_tokens))


def vision_language_config(
    tower: FromConfig, vision: VisionFromConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> PretrainedConfig:
    """transformers' config of these sizes, whose tokenizer has the tokens of `TOKENS`."""
    from transformers import AutoConfig

    if tower.architecture not in FAMILIES:
        raise UsageError(
            f"model.vision.config: {tower.architecture} has no vision part; {', '.join(FAMILIES)} have one"
        )
    head = tower.head_dim or tower.hidden // tower.heads
    if head % 16 or tower.dropout:
        raise UsageError(
            f"model.config: heads of {head} and dropout {tower.dropout:g}, but {tower.architecture} wants heads of a "
            "multiple of 16, and has no dropout: set it to 0"
        )
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": tower.hidden,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "num_key_value_heads": tower.heads,
        "head_dim": head,
        "intermediate_size": tower.intermediate,
        "max_position_embeddings": max_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [head // 16 * share for share in _MROPE_SHARES],
        },
    }
    seen: dict[str, Any] = {
        "depth": vision.layers,
        "num_heads": vision.heads,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.merge,
    }
    if tower.architecture == "qwen2_vl":
        seen |= {
            "embed_dim": vision.hidden,
            "hidden_size": tower.hidden,
            "mlp_ratio": vision.intermediate // vision.hidden,
        }
    else:
        seen |= {
            "hidden_size": vision.hidden,
            "intermediate_size": vision.intermediate,
            "out_hidden_size": tower.hidden,
            "fullatt_block_indexes": list(range(vision.layers)),
            "deepstack_visual_indexes": list(range(min(vision.layers, tower.layers))),
        }
    return AutoConfig.for_model(tower.architecture, text_config=text, vision_config=seen, **ids)


def prepare_vision(config: ModelConfig, backbone: PreTrainedModel, source: Path | None, folder: Path) -> None:
    """Writes how images are prepared, bounded as the recipe says; UsageError where the model has no vision part."""
    vision = config.vision
    assert vision is not None, "asked for by a recipe that has one"
    if backbone.config.model_type not in FAMILIES:
        told = f"{backbone.config.model_type} is none of {', '.join(FAMILIES)}"
        raise UsageError(f"model.vision: {told}; for two towers set model.image instead")
    seen = backbone.config.vision_config
    preprocessing = _PREPROCESSING | {"patch_size": seen.patch_size, "merge_size": seen.spatial_merge_size}
    if source is not None:
        if not (source / PREPROCESSOR).exists():
            raise UsageError(f"model.path: {source} has no {PREPROCESSOR}, which says how images are prepared")
        preprocessing = json.loads((source / PREPROCESSOR).read_text())
    unit = (seen.patch_size * seen.spatial_merge_size) ** 2
    for name, wanted in (("patch_size", seen.patch_size), ("merge_size", seen.spatial_merge_size)):
        if preprocessing.get(name) != wanted:
            raise UsageError(
                f"model.path: {PREPROCESSOR} has {name} {preprocessing.get(name)}, the model {wanted}; they don't "
                "belong together"
            )
    size = preprocessing.get("size") or {}
    most = min(size.get("longest_edge", unit * vision.max_image_tokens), unit * vision.max_image_tokens)
    preprocessing["size"] = {"shortest_edge": min(size.get("shortest_edge", unit), most), "longest_edge": most}
    (folder / PREPROCESSOR).write_text(json.dumps(preprocessing, indent=2) + "\n")
