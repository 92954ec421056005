"""Reading the settings of a Sentence Transformers folder: how it pools, what it prompts, where it truncates.

The files, as `sentence_transformers` 2 to 6 write them:

    modules.json                       [{idx, name, path, type}]
    sentence_bert_config.json          max_seq_length, do_lower_case (in the transformer module's folder)
    1_Pooling/config.json              pooling_mode, or one pooling_mode_* flag a mode; include_prompt
    2_Dense/, …                        config.json and model.safetensors of a linear layer
    config_sentence_transformers.json  prompts, default_prompt_name, similarity_fn_name
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_services.schema import UsageError
from trainers.config import Activation, PoolingMode
from trainers.encoders.spec import Dense, Latent

if TYPE_CHECKING:
    from torch import Tensor

POOLING: dict[PoolingMode, str] = {
    "mean": "mean",
    "cls": "cls",
    "last": "lasttoken",
    "max": "max",
    "weighted_mean": "weightedmean",
}
POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
ACTIVATIONS: dict[Activation, str] = {
    "none": "torch.nn.modules.linear.Identity",
    "tanh": "torch.nn.modules.activation.Tanh",
    "relu": "torch.nn.modules.activation.ReLU",
    "gelu": "torch.nn.modules.activation.GELU",
    "silu": "torch.nn.modules.activation.SiLU",
}
_ONE_VECTOR = r"Transformer (WeightedLayerPooling )?(LatentAttentionModule )?Pooling (Dense )*(Normalize )?"
_ONE_A_TOKEN = (
    r"Transformer (WeightedLayerPooling )?(Dense )*(MultiVectorMask (Normalize )?|Normalize MultiVectorMask )"
)
_DOCUMENT_NAMES = ("document", "passage", "corpus")  # the order in which encode_document looks for one


@dataclass(frozen=True)
class Settings:
    """What a folder says; the names are those of `ModelSpec`.

    folder       the root
    transformer  folder of the backbone and tokenizer, below the root ("" is the root itself)
    skipped      words without a vector in documents
    projection   of a CLIP's text part, None of others
    part         whether it is the text part of a CLIP or SigLIP, whose folder says all this otherwise
    """

    folder: Path
    transformer: str
    pooling: PoolingMode
    pool_prompt: bool
    max_tokens: int | None
    prompts: dict[str, str]
    normalize: bool
    head: tuple[Dense, ...]
    latent: Latent | None
    mean_layers: int
    query_length: int | None
    skipped: list[str]
    projection: Tensor | None = None
    part: bool = False


@dataclass(frozen=True)
class _Module:
    """One of modules.json: its class's name, its folder and what its config.json says."""

    kind: str
    folder: Path
    config: dict[str, Any]


def read_settings(folder: Path) -> Settings | None:
    """The settings of a Sentence Transformers folder, None where `folder` isn't one.

    UsageError names the module or setting that a TextEncoder can't express.
    """
    if not (folder / "modules.json").exists():
        return None
    modules = _modules(folder)
    kinds = "".join(f"{module.kind} " for module in modules)
    tokens = re.fullmatch(_ONE_A_TOKEN, kinds) is not None
    if not tokens and not re.fullmatch(_ONE_VECTOR, kinds):
        raise UsageError(
            f"model.path: {folder} has the modules {', '.join(kinds.split())}; gyre reads Transformer, Pooling, Dense "
            "and Normalize in this order, or Transformer, Dense, MultiVectorMask and Normalize"
        )
    named = {module.kind: module for module in modules}
    transformer = _transformer(named["Transformer"])
    general = _json(folder / "config_sentence_transformers.json")
    pooling = _pooling_mode(named["Pooling"].config, folder) if not tokens else "tokens"
    latent = named.get("LatentAttentionModule")
    return Settings(
        folder=folder,
        transformer=str(named["Transformer"].folder.relative_to(folder)),
        pooling=pooling if latent is None else "latent",
        pool_prompt=tokens or named["Pooling"].config.get("include_prompt", True),
        max_tokens=transformer.get("max_seq_length"),
        prompts=_prompts(general),
        normalize=_normalize(named.get("Normalize"), general.get("similarity_fn_name"), tokens),
        head=tuple(_dense(module, tokens) for module in modules if module.kind == "Dense"),
        latent=None if latent is None else _latent(latent, pooling, folder),
        mean_layers=_mean_layers(named["WeightedLayerPooling"]) if "WeightedLayerPooling" in named else 1,
        query_length=_query_length(transformer.get("query_expansion"), folder),
        skipped=_skipped(named["MultiVectorMask"].config, folder) if tokens else [],
    )


def read_weights(settings: Settings) -> dict[str, Tensor]:
    """The weights of the modules behind the transformer, by their names in `TextEncoder.readout`."""
    modules = _modules(settings.folder)
    dense = [module for module in modules if module.kind == "Dense"]
    weights = {f"head.{i}.{n}": t for i, module in enumerate(dense) for n, t in _weights(module, "linear.")}
    for module in modules:
        if module.kind == "LatentAttentionModule":
            weights |= {f"latent.{name}": tensor for name, tensor in _weights(module)}
    return weights


def _modules(folder: Path) -> list[_Module]:
    found = []
    for listed in _json(folder / "modules.json"):
        place = folder / listed["path"]
        found.append(_Module(listed["type"].rsplit(".", 1)[-1], place, _json(place / "config.json")))
    return found


def _weights(module: _Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    file = module.folder / "model.safetensors"
    if not file.exists():
        raise UsageError(f"model.path: {file} is missing; gyre loads no pickles, convert the module to safetensors")
    for name, tensor in load_file(file).items():
        yield name.removeprefix(prefix), tensor


def _transformer(module: _Module) -> dict[str, Any]:
    file = module.folder / "sentence_bert_config.json"
    settings = _json(file)
    for name, instead in (
        ("do_lower_case", "give the tokenizer a lower-casing normalizer instead"),
        ("query_length", "set model.max_tokens on the bare transformer instead"),
        ("document_length", "set model.max_tokens on the bare transformer instead"),
    ):
        if settings.get(name):
            raise UsageError(f"model.path: {file} sets {name}, which gyre doesn't read; {instead}")
    return settings


def _pooling_mode(config: dict[str, Any], folder: Path) -> PoolingMode:
    modes = config.get("pooling_mode") or [mode for mode, flag in POOLING_FLAGS.items() if config.get(flag)] or "mean"
    modes = [modes] if isinstance(modes, str) else list(modes)
    ours = {theirs: mode for mode, theirs in POOLING.items()}
    if len(modes) != 1 or modes[0] not in ours:
        raise UsageError(
            f"model.path: {folder} pools by {' + '.join(modes)}; gyre knows {', '.join(ours)}, "
            "set model.pooling on the bare transformer instead"
        )
    return ours[modes[0]]


def _dense(module: _Module, tokens: bool) -> Dense:
    config, source = module.config, _vectors(tokens)
    ours = {theirs: activation for activation, theirs in ACTIVATIONS.items()}
    activation = config.get("activation_function", ACTIVATIONS["tanh"])
    ends = {config.get(end) or source for end in ("module_input_name", "module_output_name")}
    if config.get("use_residual") or activation not in ours or ends != {source}:
        raise UsageError(
            f"model.path: {module.folder} is a Dense module with a residual, an end other than {source} or the "
            f"activation {activation}, which gyre can't express; set model.head on the bare transformer instead"
        )
    return Dense(config["in_features"], config["out_features"], config.get("bias", True), ours[activation])


def _normalize(module: _Module | None, similarity: str | None, tokens: bool) -> bool:
    """Single vectors that are compared by cosine may be normalised as well, and gyre's losses want them so."""
    if module is None:
        return not tokens and similarity not in ("dot", "dot_product")
    source = module.config.get("module_input_name", "sentence_embedding")
    if source != _vectors(tokens):
        raise UsageError(f"model.path: {module.folder} normalises {source}, which gyre can't express")
    return True


def _vectors(tokens: bool) -> str:
    """Sentence Transformers' name of what the modules behind pooling work on."""
    return "token_embeddings" if tokens else "sentence_embedding"


def _latent(module: _Module, pooling: PoolingMode, folder: Path) -> Latent:
    if pooling != "mean":
        raise UsageError(f"model.path: {folder} pools by {pooling} after latent attention; gyre takes the mean there")
    return Latent(module.config["count"], module.config["heads"])


def _mean_layers(module: _Module) -> int:
    (weights,) = (tensor for _, tensor in _weights(module))
    if (weights != weights[0]).any():
        raise UsageError(f"model.path: {module.folder} weighs its layers differently; gyre takes their plain mean")
    return len(weights)


def _query_length(expansion: dict[str, Any] | None, folder: Path) -> int | None:
    if expansion is None:
        return None
    if expansion.get("strategy") != "min" or not expansion.get("attend") or expansion.get("token") is not None:
        raise UsageError(
            f"model.path: {folder} expands queries by {expansion}; gyre knows strategy min with attend true and the "
            "tokenizer's own mask token, set model.query_length on the bare transformer instead"
        )
    return expansion["length"]


def _skipped(config: dict[str, Any], folder: Path) -> list[str]:
    if config.get("keep_only_token_ids") or config.get("skiplist_tasks", ["document"]) != ["document"]:
        raise UsageError(
            f"model.path: {folder} has a MultiVectorMask that gyre can't express; it knows a skip list of documents"
        )
    return config.get("skiplist_words") or []


def _prompts(config: dict[str, Any]) -> dict[str, str]:
    named = config.get("prompts") or {}
    default = named.get(config.get("default_prompt_name") or "", "")
    document = next((named[name] for name in _DOCUMENT_NAMES if name in named), default)
    return named | {"query": named.get("query", default), "document": document}


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else {}
