"""A model folder: everything that makes a text tower, in one place that every worker can read.

    config.json           transformers' config, `is_causal: false` where attention was made bidirectional
    tokenizer files       as transformers writes them
    gyre_model.json       ModelSpec: pooling, prompts, length
    model.safetensors     weights, where there are any yet: a tower from random weights has none
    readout.safetensors   weights of `TextEncoder.readout`, where they begin as another model's

`prepare_model_folder` makes one from a recipe's `model:` section, before training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from data_services.schema import UsageError
from trainers.config import ModelConfig
from trainers.encoders.backbone import pretrained_backbone, random_backbone
from trainers.encoders.choices import check, max_tokens, readout_shapes, spec_of
from trainers.encoders.clip import is_dual, text_part
from trainers.encoders.sentence_transformer import Settings, read_settings, read_weights
from trainers.encoders.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

READOUT_FILE = "readout.safetensors"

TrainTokenizer = Callable[[int, Path], None]


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
    model, tokenizer, settings, source = _origin(config, folder, train_tokenizer)
    if config.init_from is not None:
        load_init_from(model, tokenizer, Path(config.init_from))
    spec = spec_of(config, settings, model, tokenizer)
    check(config, spec, model, tokenizer)
    as_it_is = config.init_from is None and not config.trust_remote_code  # remote code lies beside the weights
    as_it_is &= settings is None or not settings.part  # whose weights lie among those of the whole
    if as_it_is and (source is None or _copy_weights(source, folder)):
        model.config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    _save_readout(config, spec, settings, folder)
    if config.vision is not None:
        from trainers.encoders.vision_language import prepare_vision

        prepare_vision(config, model, source, folder)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = spec.max_tokens
    tokenizer.save_pretrained(folder)
    spec.save(folder)
    return spec


def _save_readout(config: ModelConfig, spec: ModelSpec, settings: Settings | None, folder: Path) -> None:
    """The weights with which the readout begins, where the recipe names a model that has some."""
    from safetensors.torch import save_file

    weights = {}
    if settings is not None:
        own = settings.projection
        weights = {} if settings.part else read_weights(settings)
        weights |= {} if own is None else {"head.0.weight": own.detach().clone()}
    if config.init_from is not None:
        weights |= read_readout(Path(config.init_from))
    wanted = readout_shapes(spec)
    for name, tensor in weights.items():
        if wanted.get(name) != (shape := tuple(tensor.shape)):
            raise UsageError(
                f"model.{'init_from' if config.init_from else 'path'}: readout.{name} is {shape} there and "
                f"{wanted.get(name, 'missing')} in this recipe's model; give the head or pooling that belongs to it"
            )
    if weights:
        save_file({name: t.contiguous() for name, t in weights.items()}, folder / READOUT_FILE)


def read_readout(folder: Path) -> dict[str, Tensor]:
    """The weights of `TextEncoder.readout` that a model folder or exported model has, by name."""
    from safetensors.torch import load_file

    if (folder / READOUT_FILE).exists():
        return load_file(folder / READOUT_FILE)
    settings = read_settings(folder)
    return read_weights(settings) if settings else {}


def _origin(
    config: ModelConfig, folder: Path, train_tokenizer: TrainTokenizer | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Settings | None, Path | None]:
    """The model, its tokenizer, what a Sentence Transformers folder says, and the folder of pretrained weights."""
    if config.config is not None:
        if config.init_from is not None:
            tokenizer = _tokenizer(Path(config.init_from), config.trust_remote_code)
        else:
            if train_tokenizer is None:
                raise ValueError("model.config without model.init_from needs `train_tokenizer`")
            train_tokenizer(config.config.vocabulary, folder)
            tokenizer = _tokenizer(folder, config.trust_remote_code)
        longest = max_tokens(config, None, None)
        if config.vision is not None:
            from trainers.encoders.vision_language import random_vision_language

            return random_vision_language(config, tokenizer, longest), tokenizer, None, None
        return random_backbone(config.config, tokenizer, longest), tokenizer, None, None
    assert config.path is not None, "ModelConfig has exactly one of path and config"
    root = resolve(config.path, config.trust_remote_code)
    settings = read_settings(root)
    source = root / settings.transformer if settings else root
    model = pretrained_backbone(source, config.trust_remote_code)
    if is_dual(model):
        model, settings = text_part(model, source)
    return model, _tokenizer(source, config.trust_remote_code), settings, source


def _copy_weights(source: Path, folder: Path) -> bool:
    """Copies the files that a model's weights lie in; False where they have unusual names.

    Writing them anew would hold them in memory twice, and Transformers imports DeepSpeed for it.
    """
    index = source / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = {index.name, *json.loads(index.read_text())["weight_map"].values()}
    if not all((source / name).is_file() for name in names):
        return False
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return True


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
    """All tensors of a folder's transformer, {} where there are none."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def _tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise UsageError(f"{folder} has no tokenizer that transformers can read: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
