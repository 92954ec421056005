"""A model folder: everything that makes a text tower, in one place that every worker can read.

    config.json         transformers' config, `is_causal: false` where attention was made bidirectional
    tokenizer files     as transformers writes them
    gyre_model.json     ModelSpec: pooling, prompts, length
    model.safetensors   weights, where there are any yet: a tower from random weights has none

`prepare_model_folder` makes one from a recipe's `model:` section, before training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_services.schema import UsageError
from trainers.config import ModelConfig
from trainers.encoders.backbone import (
    added_dropout,
    longest_text,
    pretrained_backbone,
    random_backbone,
    set_direction,
)
from trainers.encoders.sentence_transformer import Settings, read_settings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPEC_FILE = "gyre_model.json"
DEFAULT_MAX_TOKENS = 192

TrainTokenizer = Callable[[int, Path], None]


@dataclass(frozen=True)
class ModelSpec:
    """What a model folder says beyond transformers' own config.

    architecture       transformers' model_type
    pooling            which tokens make the vector
    bidirectional      whether a token attends to later ones
    max_tokens         kept of a text, prompt and special tokens included
    prompts            put before a field's texts, by field ("query", "document")
    pool_prompt        whether the prompt's tokens take part in pooling
    dim                D
    added_dropout      share of hidden units that TextEncoder drops, the architecture having no such dropout
    trust_remote_code  whether loading it may run code from the folder
    """

    architecture: str
    pooling: Literal["mean", "cls", "last"]
    bidirectional: bool
    max_tokens: int
    prompts: dict[str, str]
    pool_prompt: bool
    dim: int
    added_dropout: float = 0.0
    trust_remote_code: bool = False

    def save(self, folder: Path) -> None:
        (folder / SPEC_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> ModelSpec:
        try:
            return cls(**json.loads((folder / SPEC_FILE).read_text()))
        except FileNotFoundError:
            raise UsageError(f"{folder} is no model folder of gyre: it has no {SPEC_FILE}") from None


def prepare_model_folder(config: ModelConfig, folder: Path, train_tokenizer: TrainTokenizer | None = None) -> ModelSpec:
    """Make the self-contained folder that `build_encoder` loads, from a recipe's `model:` section.

    train_tokenizer(vocabulary, folder) writes a trained tokenizer's files; needed for `model.config` without
    `model.init_from` (whose tokenizer is kept: its embeddings mean nothing under another). A folder that is
    there already is replaced once the new one is whole. UsageError names the key that can't be honoured.
    """
    import torch

    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here only probe the architecture
        spec = _prepare(config, making, train_tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
    return spec


def _prepare(config: ModelConfig, folder: Path, train_tokenizer: TrainTokenizer | None) -> ModelSpec:
    model, tokenizer, settings = _origin(config, folder, train_tokenizer)
    if config.init_from is not None:
        load_init_from(model, tokenizer, Path(config.init_from))
    spec = ModelSpec(
        architecture=model.config.model_type,
        pooling=_first(config.pooling, settings and settings.pooling, "mean"),
        bidirectional=set_direction(model, _first(config.bidirectional, None if settings else True)),
        max_tokens=_max_tokens(config, settings, longest_text(model)),
        prompts={
            "query": _first(config.query_prompt, settings and settings.prompts["query"], ""),
            "document": _first(config.document_prompt, settings and settings.prompts["document"], ""),
        },
        pool_prompt=_first(config.pool_prompt, settings.pool_prompt if settings else True),
        dim=model.config.get_text_config().hidden_size,
        added_dropout=added_dropout(config.config, model.config),
        trust_remote_code=config.trust_remote_code,
    )
    _check_prompts(config, spec, tokenizer)
    if config.config is not None and config.init_from is None:
        model.config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = spec.max_tokens
    tokenizer.save_pretrained(folder)
    spec.save(folder)
    return spec


def _origin(
    config: ModelConfig, folder: Path, train_tokenizer: TrainTokenizer | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Settings | None]:
    if config.config is not None:
        if config.init_from is not None:
            tokenizer = _tokenizer(Path(config.init_from), config.trust_remote_code)
        else:
            if train_tokenizer is None:
                raise ValueError("model.config without model.init_from needs `train_tokenizer`")
            train_tokenizer(config.config.vocabulary, folder)
            tokenizer = _tokenizer(folder, config.trust_remote_code)
        longest = _max_tokens(config, None, None)
        return random_backbone(config.config, tokenizer, longest), tokenizer, None
    assert config.path is not None, "ModelConfig has exactly one of path and config"
    root = resolve(config.path, config.trust_remote_code)
    settings = read_settings(root)
    source = root / settings.transformer if settings else root
    model = pretrained_backbone(source, config.trust_remote_code)
    return model, _tokenizer(source, config.trust_remote_code), settings


def resolve(path: str, trust_remote_code: bool = False, key: str = "model.path") -> Path:
    """A folder as it is; anything else is a hub id and downloaded (code only where it is trusted)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if Path(path).is_dir():
        return Path(path)
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
        raise UsageError(
            f"{key}: {path!r} is neither a folder here nor a model that could be downloaded "
            f"({str(error).splitlines()[0]})"
        ) from error


def load_init_from(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Path) -> None:
    """Give `model` the weights of another model folder or exported model of the same shape and tokens."""
    weights = folder_weights(source)
    if not weights:
        raise UsageError(f"model.init_from: {source} has no safetensors weights")
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in weights.items() if not name.startswith("pooler.")}
    for name in [*wanted, *there]:
        if wanted.get(name) != there.get(name):
            raise UsageError(
                f"model.init_from: {name} is {there.get(name, 'missing')} in {source} and "
                f"{wanted.get(name, 'missing')} in this recipe's model; give one of the same sizes"
            )
    if _tokenizer(source, False).get_vocab() != tokenizer.get_vocab():
        raise UsageError(f"model.init_from: {source} has another tokenizer than this recipe's model")
    model.load_state_dict({name: weights[name] for name in wanted})


def folder_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, {} where there are none."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def _tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise UsageError(f"{folder} has no tokenizer that transformers can read: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _max_tokens(config: ModelConfig, settings: Settings | None, limit: int | None) -> int:
    """What the recipe says, else the Sentence Transformers folder, else the default; at most `limit`."""
    if config.max_tokens is not None and limit is not None and config.max_tokens > limit:
        raise UsageError(f"model.max_tokens: {config.max_tokens} is more than the {limit} positions of the model")
    wanted = _first(config.max_tokens, settings and settings.max_tokens, DEFAULT_MAX_TOKENS)
    return wanted if limit is None else min(wanted, limit)


def _check_prompts(config: ModelConfig, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    if config.pool_prompt is not None and not any(spec.prompts.values()):
        raise UsageError("model.pool_prompt: there is no prompt; give a query_prompt or remove it")
    for field, prompt in spec.prompts.items():
        if prompt and (tokens := len(tokenizer(prompt)["input_ids"])) >= spec.max_tokens:
            raise UsageError(f"model.{field}_prompt: its {tokens} tokens leave no room in max_tokens {spec.max_tokens}")


def _first(*values: Any) -> Any:
    """The first that isn't None (None where all are)."""
    return next((value for value in values if value is not None), None)
