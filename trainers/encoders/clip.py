"""The text parts of pretrained duals as text towers.

CLIP's vector of a text is the projected state of its last token. SigLIP, and SigLIP 2 where its images are of one
resolution, were trained on texts that are filled up to one length with padding, which counts; theirs is the state at
the last place, by the architecture's head.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_services.schema import UsageError
from trainers.encoders.sentence_transformer import Settings
from trainers.encoders.spec import Dense

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FILLED = {"siglip_text_model": "siglip"}  # architecture: module of transformers


def is_dual(model: PreTrainedModel) -> bool:
    """Whether it has a text part and a vision part that are compared, not one that reads the other's tokens."""
    return hasattr(model, "text_model") and hasattr(model, "vision_model")


def text_part(model: PreTrainedModel, source: Path) -> tuple[PreTrainedModel, Settings]:
    """Its text tower, and how it makes a vector of a text. UsageError of a model that does so in a way of its own."""
    whole: Any = model
    filled = whole.text_model.config.model_type in FILLED
    if model.config.model_type != "clip" and not filled:
        raise UsageError(
            f"model.path: gyre doesn't know how {model.config.model_type} in {source} makes a vector of a text: give a "
            "text model, and this one as model.image.path"
        )
    projection = None if filled else whole.text_projection.weight
    return whole.text_model, Settings(
        folder=source,
        transformer="",
        pooling="last",  # CLIP's tokenizer ends every text with the token that it pools
        pool_prompt=True,
        max_tokens=whole.config.text_config.max_position_embeddings,
        prompts={},
        normalize=True,
        head=() if projection is None else (Dense(projection.shape[1], projection.shape[0], bias=False),),
        latent=None,
        mean_layers=1,
        query_length=None,
        skipped=[],
        projection=projection,
        part=True,
    )


def make_known(config: PretrainedConfig) -> None:
    """Lets AutoModel build SigLIP's text part, of which transformers' list has the vision part alone."""
    from transformers import AutoModel

    if (name := FILLED.get(config.model_type)) is not None:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        AutoModel.register(
            type(config), getattr(module, type(config).__name__.replace("Config", "Model")), exist_ok=True
        )
