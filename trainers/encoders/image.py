"""The tower of images: any vision transformer of transformers, pooled to vectors as wide as those of the texts.

    config.json, model.safetensors   as transformers writes them
    preprocessor_config.json         how images are resized and scaled, as transformers' processors read it
    gyre_model.json                  ModelSpec: pooling, projection, tokens of an image
    readout.safetensors              the projection, where it begins as another model's

Shapes: n images, L patches (with a first token where the architecture has one), H the backbone's width, D dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from data_services.schema import UsageError
from trainers.config import ModelConfig, PoolingMode
from trainers.encoders.adapters import add_adapter
from trainers.encoders.backbone import check_checkpointing, checkpoint_gradients, load_backbone
from trainers.encoders.freezing import freeze
from trainers.encoders.inputs import TowerInputs
from trainers.encoders.model_folder import READOUT_FILE, read_readout, resolve
from trainers.encoders.spec import Dense, ModelSpec
from trainers.encoders.tower import MediaTower
from trainers.tower_config import ImageConfig, ImageFromConfig

PREPROCESSOR = "preprocessor_config.json"
# Where a recipe builds the tower itself: both sides resized, numbers from -1 to 1, as SigLIP does.
_PREPROCESSING: dict[str, Any] = {
    "image_processor_type": "SiglipImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


class ImageEncoder(MediaTower):
    """The tower of images. Of a chunk it reads `arrays["pixels"]` [n, 3, height, width] uint8."""

    def __init__(self, backbone: PreTrainedModel, spec: ModelSpec, preprocessing: Mapping[str, Any]) -> None:
        super().__init__(backbone, spec)
        self._scaling = scaling(preprocessing)  # no buffers: the engine would round them to bf16
        self._blank = _image_shape(preprocessing, backbone)

    def read(self, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The states of the last layer, or the one that the backbone pools; all are pooled."""
        weight = next(self.backbone.parameters())
        pixels = arrays.get("pixels")
        if pixels is None or not len(pixels):
            pixels = torch.zeros(1, *self._blank, device=weight.device)
        scale, shift = (x.to(pixels.device) for x in self._scaling)
        output = self.backbone(pixel_values=(pixels.float() * scale + shift).to(weight.dtype))
        hidden = output.pooler_output[:, None] if self.spec.own_pooling else output.last_hidden_state
        return hidden, hidden.new_ones(hidden.shape[:2], dtype=torch.bool)


def scaling(preprocessing: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(scale, shift) [3, 1, 1]: pixels · scale + shift is (pixels · rescale − mean) / std of each colour."""
    rescale = preprocessing.get("rescale_factor", 1 / 255) if preprocessing.get("do_rescale", True) else 1.0
    mean, std = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    if preprocessing.get("do_normalize", True):
        mean, std = (torch.tensor(preprocessing[name], dtype=torch.float64) for name in ("image_mean", "image_std"))
    return (rescale / std).float().view(3, 1, 1), (-mean / std).float().view(3, 1, 1)


def _image_shape(preprocessing: Mapping[str, Any], backbone: PreTrainedModel) -> tuple[int, int, int]:
    """(3, height, width) that images are brought to, the architecture's own where that has no such sides."""
    size = preprocessing.get("crop_size" if preprocessing.get("do_center_crop") else "size")
    if isinstance(size, Mapping):
        size = (size["height"], size["width"]) if {"height", "width"} <= set(size) else None
    size = size or backbone.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return 3, height, width


def prepare(config: ModelConfig, folder: Path, texts: ModelSpec) -> None:
    """Make the folder that `build` loads. texts: of the tower that its vectors are compared with.

    UsageError names the key that can't be honoured.
    """
    image = config.image
    assert image is not None, "asked for by a recipe that has one"
    with torch.random.fork_rng(devices=[]):  # the weights drawn here only probe the architecture
        backbone, preprocessing, projection = _origin(image, folder)
        spec = _spec(image, backbone, _image_shape(preprocessing, backbone), projection, texts)
    if image.gradient_checkpointing:
        check_checkpointing(backbone)
    if image.path is None:
        backbone.config.save_pretrained(folder)
    else:
        backbone.save_pretrained(folder)
    (folder / PREPROCESSOR).write_text(json.dumps(preprocessing, indent=2) + "\n")
    if projection is not None and projection.shape[0] == spec.dim:
        from safetensors.torch import save_file

        save_file({"head.0.weight": projection.detach().clone()}, folder / READOUT_FILE)
    spec.save(folder)


def _origin(image: ImageConfig, folder: Path) -> tuple[PreTrainedModel, dict[str, Any], Tensor | None]:
    """The backbone, how images are prepared for it, and the projection that a CLIP has."""
    if image.config is not None:
        side = {"height": image.config.image_size, "width": image.config.image_size}
        return AutoModel.from_config(_config(image.config, image.pooling)), _PREPROCESSING | {"size": side}, None
    assert image.path is not None, "ImageConfig has exactly one of path and config"
    source = resolve(image.path, key="model.image.path")
    if not (source / PREPROCESSOR).exists():
        raise UsageError(f"model.image.path: {source} has no {PREPROCESSOR}, so it is no model of images")
    if not any(source.glob("*.safetensors")):
        raise UsageError(f"model.image.path: {source} has no safetensors weights; convert them, gyre loads no pickles")
    whole = AutoModel.from_pretrained(source, use_safetensors=True)
    projection = getattr(whole, "visual_projection", None)
    backbone = getattr(whole, "vision_model", whole)
    preprocessing = json.loads((source / PREPROCESSOR).read_text())
    return backbone, preprocessing, None if projection is None else projection.weight


def _config(wanted: ImageFromConfig, pooling: str | None) -> Any:
    try:
        default = AutoConfig.for_model(wanted.architecture)
    except ValueError:
        default = None
    if default is None or not hasattr(default, "patch_size"):
        raise UsageError(
            f"model.image.config.architecture: transformers knows no vision transformer {wanted.architecture!r}; "
            "siglip_vision_model, clip_vision_model, vit and dinov2 are some"
        )
    sizes = {
        "hidden_size": wanted.hidden,
        "num_hidden_layers": wanted.layers,
        "num_attention_heads": wanted.heads,
        "intermediate_size": wanted.intermediate,
        "image_size": wanted.image_size,
        "patch_size": wanted.patch_size,
    }
    if hasattr(default, "vision_use_head"):  # else its weights would get no gradient
        sizes["vision_use_head"] = pooling == "own"
    return AutoConfig.for_model(wanted.architecture, **sizes)


def _spec(
    image: ImageConfig,
    backbone: PreTrainedModel,
    shape: tuple[int, int, int],
    projection: Tensor | None,
    texts: ModelSpec,
) -> ModelSpec:
    hidden, dim = backbone.config.hidden_size, texts.dim
    pretrained = image.path is not None and type(backbone).__name__.startswith(("CLIP", "Siglip"))
    tokens = texts.pooling == "tokens"
    chosen = image.pooling or ("tokens" if tokens else "own" if pretrained else "mean")
    if (chosen == "tokens") != tokens:
        raise UsageError(f"model.image.pooling: {chosen}, but model.pooling is {texts.pooling}; tokens go with tokens")
    try:
        with torch.inference_mode():
            output = backbone.eval()(pixel_values=torch.zeros(1, *shape))
    except (ValueError, RuntimeError) as error:  # by architecture
        raise UsageError(
            f"model.image.path: {image.path}: {PREPROCESSOR} brings images to {shape[1]} x {shape[2]} pixels, which "
            f"the model doesn't read ({str(error).splitlines()[0]}); they don't belong together"
        ) from error
    if chosen == "own" and getattr(output, "pooler_output", None) is None:
        raise UsageError(f"model.image.pooling: own, but {backbone.config.model_type} doesn't pool; choose mean or cls")
    pooling: PoolingMode = "mean" if chosen == "own" else chosen
    projected = projection is not None or hidden != dim or image.config is not None
    return ModelSpec(
        architecture=backbone.config.model_type,
        pooling=pooling,
        bidirectional=True,
        max_tokens=output.last_hidden_state.shape[1],
        prompts={"query": "", "document": ""},
        pool_prompt=True,
        dim=dim,
        normalize=texts.normalize,
        head=(Dense(hidden, dim, bias=False),) if projected else (),
        reads="image",
        own_pooling=chosen == "own",
    )


def build(config: ModelConfig, folder: Path) -> ImageEncoder:
    """The encoder of a folder made by `prepare`, in fp32, on the CPU.

    Weights come from the folder where it has some, else from the current torch generator.
    """
    image = config.image
    assert image is not None, "asked for by a recipe that has one"
    encoder = load(folder, config.attention).train()
    if image.gradient_checkpointing:
        checkpoint_gradients(encoder.backbone)
    if image.adapter is not None:
        add_adapter(encoder.backbone, image.adapter)
    _leave_unread(encoder)
    freeze(encoder, image.freeze, "model.image.freeze")
    return encoder


def load(folder: Path, attention: str = "auto") -> ImageEncoder:
    """The encoder of a model folder or export, in evaluation mode, on the CPU."""
    preprocessing = json.loads((folder / PREPROCESSOR).read_text())
    encoder = ImageEncoder(load_backbone(folder, attention), ModelSpec.load(folder), preprocessing)
    encoder.readout.load_state_dict(read_readout(folder), strict=False)
    return encoder.eval()


def _leave_unread(encoder: ImageEncoder) -> None:
    """Takes the weights that don't reach the vectors out of training: a norm before a pooling that isn't used, say."""
    nowhere = torch.zeros(1, 1, dtype=torch.int64)
    trained = [(name, p) for name, p in encoder.named_parameters() if p.requires_grad]
    training = encoder.training
    with torch.random.fork_rng(devices=[]):
        total = encoder.eval()(TowerInputs(nowhere, nowhere)).sum()
    encoder.train(training)
    found = torch.autograd.grad(total, [p for _, p in trained], allow_unused=True)
    for (_, parameter), gradient in zip(trained, found, strict=True):
        parameter.requires_grad_(gradient is not None)
