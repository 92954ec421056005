"""Sections of a recipe's `model:` that are of one tower, or of low-rank updates of one.

Apart from the classes that they configure, as in `trainers.config`, so that reading a recipe never imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_services.schema import Section


class AdapterConfig(Section):
    """`model.adapter:` what trains beside a frozen base: low-rank updates of its matrices, by PEFT.

    lora  W + alpha/rank B A                                                    (Hu et al. 2021)
    dora  the same, with the length of each output's weights trained by itself  (Liu et al. 2024)
    """

    kind: Literal["lora", "dora"] = "lora"
    rank: int = Field(16, gt=0, description="columns of B and rows of A")
    alpha: float = Field(32.0, gt=0, description="alpha / rank scales the update")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the updates' inputs dropped in training")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="modules that get an update, by the end of their names: [q_proj, v_proj]"
    )
    modules_to_save: list[str] = Field([], description="modules trained whole, by the end of their names")
    merge: bool = Field(
        True, description="export one model; false: the adapter alone, in PEFT's format, which names its base"
    )


class Sizes(Section):
    """Of any transformer built with random weights."""

    hidden: int = Field(256, gt=0, description="width of the residual stream")
    layers: int = Field(2, gt=0, description="of attention and feed-forward")
    heads: int = Field(4, gt=0, description="of the attention")
    intermediate: int = Field(768, gt=0, description="width of the feed-forward layer")


class EncoderSizes(Sizes):
    """Of one whose heads share its width."""

    @model_validator(mode="after")
    def _whole_heads(self) -> EncoderSizes:
        if self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")
        return self


class ImageFromConfig(EncoderSizes):
    """A vision transformer built from a config with random weights."""

    architecture: str = Field("siglip_vision_model", description="a vision model_type known to transformers")
    image_size: int = Field(224, gt=0, description="pixels of a side; images are resized to it")
    patch_size: int = Field(16, gt=0, description="pixels of a patch's side")

    @model_validator(mode="after")
    def _whole_patches(self) -> ImageFromConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})")
        return self


class ImageConfig(Section):
    """`model.image:` a tower for images beside the text tower. Exactly one of `path` and `config`."""

    path: str | None = Field(None, description="folder or hub id of a vision model, or of a CLIP or SigLIP")
    config: ImageFromConfig | None = Field(None, description="build from random weights instead")
    pooling: Literal["own", "mean", "cls", "max", "tokens"] | None = Field(
        None,
        description="own: as the architecture pools, cls: its first token, tokens: one a patch (late interaction); "
        "None: own of a pretrained CLIP or SigLIP, tokens where the texts have them, else mean",
    )
    adapter: AdapterConfig | None = Field(None, description="train low-rank updates only; None: every weight")
    freeze: list[str] = Field(
        [],
        description='patterns of weight names that training leaves alone; ["backbone.*"]: only the projection trains',
    )
    gradient_checkpointing: bool = Field(False, description="as model.gradient_checkpointing")

    @model_validator(mode="after")
    def _one_origin(self) -> ImageConfig:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of `path` (a pretrained model) and `config` (random weights)")
        if self.adapter is not None and (self.path is None or self.freeze):
            raise ValueError("an `adapter` needs a `path`, and leaves the weights alone without `freeze`")
        return self


class AudioConfig(Section):
    """`model.audio:` a tower for sounds beside the text tower: small and convolutional, or the encoder of a Whisper."""

    path: str | None = Field(
        None, description="folder or hub id of a Whisper, whose encoder and spectrogram this takes; sizes are its own"
    )
    encoder: EncoderSizes | None = Field(
        None, description="a Whisper's encoder of these sizes from random weights, in the place of convolutions"
    )
    freeze: list[str] = Field([], description="patterns of weight names that training leaves alone: backbone.*")
    rate: int = Field(16_000, gt=0, description="samples a second that sounds are resampled to")
    mels: int = Field(64, gt=0, description="bands of the log-mel spectrogram")
    window: int = Field(400, gt=0, description="samples of a frame")
    hop: int = Field(160, gt=0, description="samples from one frame to the next")
    max_seconds: float = Field(10.0, gt=0, description="what comes later is cut off")
    hidden: int = Field(128, gt=0, description="channels of each layer")
    layers: int = Field(3, gt=0, description="convolutions, each of which halves the frames")
    kernel: int = Field(5, gt=0, description="frames that a convolution sees")

    @model_validator(mode="after")
    def _one_architecture(self) -> AudioConfig:
        given = self.model_fields_set - {"freeze"}
        if self.path is not None and (more := sorted(given - {"path"})):
            raise ValueError(f"{more[0]}: a Whisper at `path` has sizes of its own; leave it out")
        if self.encoder is not None and (more := sorted(given & {"hidden", "layers", "kernel"})):
            raise ValueError(f"{more[0]} is of convolutions; `encoder` has the sizes of a Whisper's: leave it out")
        return self


class FieldsConfig(Section):
    """`model.fields:` items of several parts; their vector is the weighted sum of the parts'."""

    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1, description="of each part, by its name")
    learned: bool = Field(False, description="whether the weights are trained; they start as given")


class OwnConfig(Section):
    """`model.own:` by kind, a tower of yours beside the text tower; see docs/multimodal.md."""

    path: str = Field(pattern="^[^:]+:[^:]+$", description="your modality, package.module:Name")
    allow_code: bool = Field(
        False, description="must be true: this code runs on every worker and wherever it is loaded"
    )
    options: dict[str, Any] = Field({}, description="what your modality is made with")

    @model_validator(mode="after")
    def _allowed(self) -> OwnConfig:
        if not self.allow_code:
            raise ValueError(f"{self.path} is code of yours: set allow_code: true to let it run")
        return self


class VisionFromConfig(EncoderSizes):
    """The vision part of a vision–language model from random weights."""

    patch_size: int = Field(14, gt=0, description="pixels of a patch's side")
    merge: int = Field(2, gt=0, description="so many patches by so many become one token")


class VisionConfig(Section):
    """`model.vision:` the model reads images, and items of texts and images: a vision–language model."""

    config: VisionFromConfig | None = Field(None, description="sizes of the vision part beside model.config")
    max_image_tokens: int = Field(256, gt=0, description="tokens of an image, at most; larger ones are resized")
    template: str | None = Field(
        None,
        description="order of an item's parts, by name in braces: {photo} {title}; None: as the source names them",
    )
