"""Reading the settings of a Sentence Transformers folder: how it pools, what it prompts, where it truncates.

The files, as `sentence_transformers` 2 to 6 write them:

    modules.json                       [{idx, name, path, type}]
    sentence_bert_config.json          max_seq_length, do_lower_case (in the transformer module's folder)
    1_Pooling/config.json              pooling_mode, or one pooling_mode_* flag a mode; include_prompt
    config_sentence_transformers.json  prompts, default_prompt_name
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_services.schema import UsageError

_MODES: dict[str, Literal["mean", "cls", "last"]] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_DOCUMENT_NAMES = ("document", "passage", "corpus")  # the order in which encode_document looks for one


@dataclass(frozen=True)
class Settings:
    """transformer: folder of the backbone and tokenizer, below the root ("" is the root itself)."""

    transformer: str
    pooling: Literal["mean", "cls", "last"]
    pool_prompt: bool
    max_tokens: int | None
    prompts: dict[str, str]


def read_settings(folder: Path) -> Settings | None:
    """The settings of a Sentence Transformers folder, None where `folder` isn't one.

    UsageError names the module or setting that a TextEncoder can't express.
    """
    if not (folder / "modules.json").exists():
        return None
    modules = _json(folder / "modules.json")
    kinds = [m["type"].rsplit(".", 1)[-1] for m in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        strange = next((k for k in kinds if k not in ("Transformer", "Pooling", "Normalize")), "the order")
        raise UsageError(
            f"model.path: {folder} has the modules {', '.join(kinds)}; gyre reads Transformer, Pooling and "
            f"Normalize, not {strange}"
        )
    transformer = folder / modules[0]["path"]
    bert = _json(transformer / "sentence_bert_config.json")
    if bert.get("do_lower_case"):
        raise UsageError(
            f"model.path: {transformer / 'sentence_bert_config.json'} sets do_lower_case, which gyre doesn't "
            "read; give the tokenizer a lower-casing normalizer instead"
        )
    pooling = _json(folder / modules[1]["path"] / "config.json")
    return Settings(
        transformer=modules[0]["path"],
        pooling=_pooling_mode(pooling, folder),
        pool_prompt=pooling.get("include_prompt", True),
        max_tokens=bert.get("max_seq_length"),
        prompts=_prompts(_json(folder / "config_sentence_transformers.json")),
    )


def _pooling_mode(config: dict[str, Any], folder: Path) -> Literal["mean", "cls", "last"]:
    modes = config.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if config.get(flag)] or "mean"
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _MODES:
        raise UsageError(
            f"model.path: {folder} pools by {' + '.join(modes)}; gyre knows {', '.join(_MODES)}, "
            "set model.pooling on the bare transformer instead"
        )
    return _MODES[modes[0]]


def _prompts(config: dict[str, Any]) -> dict[str, str]:
    named = config.get("prompts") or {}
    default = named.get(config.get("default_prompt_name") or "", "")
    document = next((named[name] for name in _DOCUMENT_NAMES if name in named), default)
    return {"query": named.get("query", default), "document": document}


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else {}
