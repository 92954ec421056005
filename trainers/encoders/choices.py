"""A recipe's `model:` section and what its model says of itself, settled into one ModelSpec, or refused."""

from __future__ import annotations

import string
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from data_services.schema import UsageError
from trainers.config import LatentConfig, ModelConfig, PoolingMode
from trainers.encoders.backbone import added_dropout, check_checkpointing, longest_text
from trainers.encoders.clip import FILLED
from trainers.encoders.direction import set_direction
from trainers.encoders.freezing import frozen_names
from trainers.encoders.spec import Dense, Latent, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trainers.encoders.sentence_transformer import Settings

DEFAULT_MAX_TOKENS = 192


def spec_of(
    config: ModelConfig, settings: Settings | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> ModelSpec:
    """What the recipe says; what it leaves open as the Sentence Transformers folder says, else the default.

    Makes the model's attention bidirectional where that is the choice.
    """
    text = model.config.get_text_config()
    pooling: PoolingMode = _first(config.pooling, settings and settings.pooling, "mean")
    head = _head(config, settings, text.hidden_size)
    use = config.head.use if config.head else "kept"
    of_tokens = settings if pooling == "tokens" else None
    query_length = _first(config.query_length, of_tokens and of_tokens.query_length)
    filled = model.config.model_type in FILLED
    return ModelSpec(
        architecture=model.config.model_type,
        pooling=pooling,
        bidirectional=set_direction(model, _first(config.bidirectional, None if settings else True)),
        max_tokens=max_tokens(config, settings, longest_text(model)),
        prompts=_prompts(config, settings.prompts if settings else {}),
        pool_prompt=_first(config.pool_prompt, settings.pool_prompt if settings else True),
        dim=head[-1].outputs if head and use == "kept" else text.hidden_size,
        added_dropout=added_dropout(config.config, model.config),
        trust_remote_code=config.trust_remote_code,
        normalize=_first(config.normalize, settings.normalize if settings else True),
        latent=_latent(config, settings) if pooling == "latent" else None,
        mean_layers=_first(config.mean_layers, settings and settings.mean_layers, 1),
        layers=_layers(config.layers, text.num_hidden_layers),
        head=head,
        head_use=use,
        query_length=query_length,
        mask_id=None if query_length is None else _mask_id(tokenizer),
        skipped=_skipped(config, of_tokens, tokenizer),
        reads="text" if config.vision is None else "vision",
        own_pooling=filled,
        filler=tokenizer.pad_token_id if filled else None,
        template=config.vision.template if config.vision else None,
    )


def check(config: ModelConfig, spec: ModelSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """UsageError for choices that don't go together, or not with this model."""
    tokens = spec.pooling == "tokens"
    layers = model.config.get_text_config().num_hidden_layers
    heads = spec.latent.heads if spec.latent else 1
    no_tokens = f"is for pooling tokens, and it is {spec.pooling}; remove it"
    for wrong, message in (
        (not tokens and config.token_dim, f"token_dim: {no_tokens} (model.head projects a pooled vector)"),
        (not tokens and spec.query_length, f"query_length: {no_tokens}"),
        (not tokens and spec.skipped, f"skip_punctuation: {no_tokens}"),
        (tokens and config.head, "head: pooling tokens has model.token_dim in its place"),
        (tokens and spec.layers, "layers: pooling tokens takes those of the last layer; remove it"),
        (tokens and not spec.pool_prompt, "pool_prompt: false, but pooling tokens keeps the prompt's; set it to true"),
        (tokens and config.token_dropout, "token_dropout: pooling tokens keeps them all; set it to 0"),
        (
            (spec.query_length or 0) > spec.max_tokens,
            f"query_length: {spec.query_length} is more than max_tokens {spec.max_tokens}",
        ),
        (config.latent and not spec.latent, f"latent: is for pooling latent, and it is {spec.pooling}; remove it"),
        (spec.hidden % heads, f"latent.heads: {spec.hidden} hidden units can't be dealt to {heads} heads"),
        (
            spec.own_pooling and (config.pooling or spec.layers or spec.mean_layers > 1 or config.token_dropout),
            f"pooling: {spec.architecture} pools by itself, over all its places; remove it, layers, mean_layers and "
            "token_dropout",
        ),
        (
            spec.filler is not None and tokenizer.padding_side == "left",
            f"path: the tokenizer pads {spec.architecture} on the left, and gyre fills its texts on the right; set "
            "padding_side in tokenizer_config.json to right if it was trained so",
        ),
        (spec.layers and spec.mean_layers > 1, "layers: has no meaning beside mean_layers; remove one of them"),
        (config.adapter and config.freeze, "freeze: model.adapter already leaves the tower's weights alone; remove it"),
        (spec.mean_layers > layers + 1, f"mean_layers: {spec.mean_layers}, but the model has {layers} layers"),
        (
            config.pool_prompt is not None and not any(spec.prompts.values()),
            "pool_prompt: there is no prompt; give a query_prompt or remove it",
        ),
    ):
        if wrong:
            raise UsageError(f"model.{message}")
    _check_prompts(spec, tokenizer)
    if config.gradient_checkpointing:
        check_checkpointing(model)
    weights = [f"backbone.{name}" for name, _ in model.named_parameters()]
    frozen_names([*weights, *(f"readout.{name}" for name in readout_shapes(spec))], config.freeze)


def readout_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of `TextEncoder.readout`, without making them."""
    import torch

    from trainers.encoders.heads import Readout

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Readout(spec).state_dict().items()}


def max_tokens(config: ModelConfig, settings: Settings | None, limit: int | None) -> int:
    """What the recipe says, else the Sentence Transformers folder, else the default; at most `limit`."""
    if config.max_tokens is not None and limit is not None and config.max_tokens > limit:
        raise UsageError(f"model.max_tokens: {config.max_tokens} is more than the {limit} positions of the model")
    wanted = _first(config.max_tokens, settings and settings.max_tokens, DEFAULT_MAX_TOKENS)
    return wanted if limit is None else min(wanted, limit)


def _prompts(config: ModelConfig, named: dict[str, str]) -> dict[str, str]:
    own = {"query": config.query_prompt, "document": config.document_prompt}
    own |= {f"{task}-{field}": text for task, fields in config.task_prompts.items() for field, text in fields.items()}
    return {"query": "", "document": ""} | named | {name: text for name, text in own.items() if text is not None}


def _check_prompts(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    for name, prompt in spec.prompts.items():
        if prompt and (tokens := len(tokenizer(prompt)["input_ids"])) >= spec.max_tokens:
            key = f"{name}_prompt: its" if name in ("query", "document") else f"task_prompts: {name} of"
            raise UsageError(f"model.{key} {tokens} tokens leave no room in max_tokens {spec.max_tokens}")


def _head(config: ModelConfig, settings: Settings | None, hidden: int) -> tuple[Dense, ...]:
    if settings and settings.head:
        if config.head or config.token_dim:
            key = "head" if config.head else "token_dim"
            raise UsageError(
                f"model.{key}: {config.path} has a projection of its own; remove the key, or set model.path to "
                "the transformer alone"
            )
        return settings.head
    if config.token_dim:
        return (Dense(hidden, config.token_dim, bias=False),)
    if config.head is None:
        return ()
    chosen, last = config.head, len(config.head.sizes) - 1
    return tuple(
        Dense(inputs, outputs, chosen.bias, chosen.last_activation if i == last else chosen.activation)
        for i, (inputs, outputs) in enumerate(pairwise([hidden, *chosen.sizes]))
    )


def _latent(config: ModelConfig, settings: Settings | None) -> Latent:
    if settings and settings.latent:
        if config.latent:
            raise UsageError(f"model.latent: {config.path} has latents of its own; remove the key")
        return settings.latent
    return Latent(**(config.latent or LatentConfig()).model_dump())


def _layers(asked: list[int], last: int) -> tuple[int, ...]:
    layers = tuple(i + last + 1 if i < 0 else i for i in asked)
    rising = all(a < b for a, b in pairwise(layers))
    if layers and not (rising and layers[0] >= 0 and layers[-1] == last):
        raise UsageError(
            f"model.layers: {asked} of a model of {last} layers; give rising numbers of layers that end with the "
            f"last, {last} or -1"
        )
    return layers


def _mask_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills queries, chosen as Sentence Transformers does."""
    for token in (tokenizer.mask_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UsageError("model.query_length: the tokenizer has neither a mask token nor an end token; remove the key")


def _skipped(config: ModelConfig, settings: Settings | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """By word, the tokens of the words that documents skip; a word that is no token is never met."""
    words = list(string.punctuation) if config.skip_punctuation else []
    if config.skip_punctuation is None and settings:
        words = settings.skipped
    vocabulary = tokenizer.get_vocab()
    skipped = {word: vocabulary[word] for word in words if word in vocabulary}
    if words and not skipped:
        raise UsageError("model.skip_punctuation: the tokenizer has no token for it; set it to false")
    return skipped


def _first(*values: Any) -> Any:
    """The first that isn't None (None where all are)."""
    return next((value for value in values if value is not None), None)
