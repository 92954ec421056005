"""The text part of a pretrained CLIP as a text tower: the state of a text's last token, projected."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_services.schema import UsageError
from trainers.encoders.sentence_transformer import Settings
from trainers.encoders.spec import Dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_dual(model: PreTrainedModel) -> bool:
    """Whether it has a text part and a vision part that are compared, not one that reads the other's tokens."""
    return hasattr(model, "text_model") and hasattr(model, "vision_model")


def text_part(model: PreTrainedModel, source: Path) -> tuple[PreTrainedModel, Settings]:
    """Its text tower, and how it makes a vector of a text. UsageError of a model that does so otherwise than CLIP."""
    whole: Any = model
    if model.config.model_type != "clip":
        raise UsageError(
            f"model.path: the text part of {model.config.model_type} in {source} reads padding too, as gyre doesn't: "
            "give a text model, and this one as model.image.path"
        )
    projection = whole.text_projection.weight
    return whole.text_model, Settings(
        folder=source,
        transformer="",
        pooling="last",  # CLIP's tokenizer ends every text with the token that it pools
        pool_prompt=True,
        max_tokens=whole.config.text_config.max_position_embeddings,
        prompts={},
        normalize=True,
        head=(Dense(projection.shape[1], projection.shape[0], bias=False),),
        latent=None,
        mean_layers=1,
        query_length=None,
        skipped=[],
        projection=projection,
    )
