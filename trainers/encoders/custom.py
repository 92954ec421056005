"""A tower of the user's own (`model.encoder`): it does what the recipe asks of a tower, or it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from data_services.schema import UsageError
from trainers.config import ModelConfig
from trainers.encoders.freezing import frozen_names
from trainers.encoders.spec import ModelSpec
from trainers.encoders.text import TextEncoder
from trainers.export import BACKBONE, READOUT


def checked(made: Any, config: ModelConfig, spec: ModelSpec) -> TextEncoder:
    """What `config.encoder` returned for the model folder of `spec`.

    Raises UsageError where it isn't a TextEncoder, leaves out something that the recipe sets, or has a weight that an
    export can't hold.
    """
    named = config.encoder
    if not isinstance(made, TextEncoder):
        raise UsageError(f"model.encoder: {named} returned a {type(made).__name__}; it must return a TextEncoder")
    if lacking := next(_left_out(made, config, spec), None):
        raise UsageError(f"model.{lacking}; build it with build_encoder, or do as that does")
    outside = next((n for n, _ in made.named_parameters() if not n.startswith((BACKBONE, READOUT))), None)
    if outside:
        raise UsageError(
            f"model.encoder: {named} has the weight {outside}, which an export can't hold; move it into the backbone "
            "or the readout"
        )
    return made


def _left_out(made: TextEncoder, config: ModelConfig, spec: ModelSpec) -> Iterator[str]:
    """What the recipe sets and the encoder hasn't: the key, and both."""
    returned, weights = f"{config.encoder} returned an encoder", dict(made.named_parameters())
    if config.packing == "on" and not made.packed:
        yield f"packing: on, but {returned} that pads"
    if config.adapter is not None:
        part = {"lora": "lora_", "dora": "lora_magnitude_vector"}[config.adapter.kind]
        if not any(part in name for name in weights):
            yield f"adapter: {returned} without {config.adapter.kind}"
    if made.token_dropout != config.token_dropout:
        yield f"token_dropout: {config.token_dropout}, but {returned} with {made.token_dropout}"
    if made.dropout.p != spec.added_dropout:
        yield f"config.dropout: {spec.added_dropout}, but {returned} with {made.dropout.p}"
    if config.gradient_checkpointing and not made.backbone.is_gradient_checkpointing:
        yield f"gradient_checkpointing: true, but {returned} that keeps every activation"
    if trained := sorted(n for n in frozen_names(weights, config.freeze) if weights[n].requires_grad):
        yield f"freeze: {returned} that trains {trained[0]}"
    attention = made.backbone.config._attn_implementation
    if not made.packed and config.attention not in ("auto", attention):
        yield f"attention: {config.attention}, but {returned} whose attention is {attention}"
    for field in fields(spec):
        wanted, found = getattr(spec, field.name), getattr(made.spec, field.name)
        if wanted != found:
            yield f"encoder: {returned} with {field.name} {found}, and the model folder says {wanted}"
