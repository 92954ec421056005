"""The transformer of a text tower: from a config, a pretrained folder or a model folder."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_services.schema import UsageError
from trainers.config import FromConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Names under which architectures know one and the same quantity.
_INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")
_HIDDEN_DROPOUT = ("hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "embd_pdrop", "resid_dropout")
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")

SILENT_ONE_IN = 4  # dimensions without gain, of `lexical_init`; chosen on the built-in corpus's validation split


def load_backbone(
    folder: Path, attention: str = "auto", trust_remote_code: bool = False, *, lexical_init: bool = False
) -> PreTrainedModel:
    """The transformer of a model folder in fp32: its weights, or random ones where it has none.

    lexical_init  how random ones begin, see `FromConfig`
    """
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    config.use_cache = False
    options = {"trust_remote_code": trust_remote_code, "dtype": torch.float32, **_class_options(config)}
    try:
        options["attn_implementation"] = _attention(attention, config)
        if any(folder.glob("model*.safetensors")):
            model = _loaded(folder, config=config, **options)
        else:
            model = AutoModel.from_config(config, **options)
            if lexical_init:
                _begin_lexical(model)
    except (ValueError, ImportError) as error:
        if isinstance(error, UsageError) or "attention" not in str(error).lower():
            raise
        raise UsageError(f"model.attention: {attention} is not to be had here: {error}") from error
    return model


def random_backbone(tower: FromConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> PreTrainedModel:
    """A transformer of these sizes from the current torch generator, to save the config of and to probe."""
    from transformers import AutoModel

    config = _tower_config(tower, tokenizer, max_tokens)
    model = AutoModel.from_config(config, **_class_options(config))
    if tower.lexical_init:
        _output_projections(model)
    return model


def _begin_lexical(model: PreTrainedModel) -> None:
    """Begin as a bag of tokens: layers that add nothing yet, and room for a token to weigh more or less.

    With output projections of zero the untrained vector is the mean of random token directions, which nearly keeps
    word overlap (Johnson & Lindenstrauss 1984); training starts from word matching, and words it never saw still
    match. The final norm would give every token the same weight in that mean. A share of the dimensions therefore
    gets no gain there: what a token's embedding, or a layer, puts into them takes weight off the token, and what
    leaves them adds it, as inverse document frequency does in BM25.
    """
    import torch
    from torch import nn

    table, norm = model.get_input_embeddings(), getattr(model, "norm", None)
    assert isinstance(table, nn.Embedding)
    assert norm is not None, "a model with o_proj and down_proj has a final norm"
    with torch.no_grad():
        table.weight.normal_(std=0.02)
        norm.weight[: len(norm.weight) // SILENT_ONE_IN] = 0
        for weight in _output_projections(model):
            weight.zero_()


def _output_projections(model: PreTrainedModel) -> list[Tensor]:
    """The weights by which layers add to the residual stream, of models built like Llama."""
    endings = ("o_proj.weight", "down_proj.weight")
    found: list[Tensor] = [p for name, p in model.named_parameters() if name.endswith(endings)]
    if not found:
        raise UsageError(
            f"model.config.lexical_init: {model.config.model_type} has no o_proj and down_proj to begin at zero; "
            "set it to false"
        )
    return found


def pretrained_backbone(source: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The transformer of a folder in transformers' format, in the type it was saved in."""
    from transformers import AutoConfig

    if not (source / "config.json").exists():
        raise UsageError(f"model.path: {source} has no config.json, so it is no transformers model")
    if not any(source.glob("*.safetensors")):
        raise UsageError(f"model.path: {source} has no safetensors weights; convert them, gyre loads no pickles")
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder:
        raise UsageError(
            f"model.path: {config.model_type} in {source} is an encoder-decoder; give a decoder or an encoder"
        )
    return _loaded(source, trust_remote_code=trust_remote_code, dtype="auto", **_class_options(config))


def _loaded(folder: Path, **options: Any) -> PreTrainedModel:
    """A folder's model, every weight of it from there; without Transformers' bars and reports."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar a load would drown a run's own lines
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = AutoModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise UsageError(
            f"model.path: {folder} lacks {len(missing)} weights of its {type(model).__name__}, {missing[0]} among "
            "them, which would begin at random; give the whole model, or one of another architecture in config.json"
        )
    return model


def added_dropout(tower: FromConfig | None, config: PretrainedConfig) -> float:
    """The share of hidden units that TextEncoder drops itself, for architectures without such dropout."""
    if tower is None or any(hasattr(config, name) for name in _HIDDEN_DROPOUT):
        return 0.0
    return tower.dropout


def check_checkpointing(model: PreTrainedModel) -> None:
    """UsageError where the architecture can't compute a layer again in the backward pass."""
    if not model.supports_gradient_checkpointing:
        raise UsageError(f"model.gradient_checkpointing: {model.config.model_type} can't do it; set it to false")


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Keep only what enters each layer, and compute the layer again in the backward pass (Chen et al. 2016).

    Random masks are drawn again as they were, so that gradients are the same.
    """
    check_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})


def _attention(attention: str, config: PretrainedConfig) -> str:
    """auto: on a CPU our own eager attention (sdpa's bf16 backward is slow there), on a GPU sdpa; where the
    architecture can't have its attention replaced, its eager one."""
    import torch

    if attention != "auto":
        return attention
    model_class = _model_class(config)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):  # eager is the one that has it
        return "eager"
    if not (
        getattr(model_class, "_supports_sdpa", False) and getattr(model_class, "_supports_attention_backend", False)
    ):
        return "eager"
    if torch.cuda.is_available():
        return "sdpa"
    from trainers.encoders import cpu_kernels

    return cpu_kernels.ATTENTION


def class_options(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Arguments for the class of the folder's config: no BERT pooler, it would get no gradient."""
    from transformers import AutoConfig

    return _class_options(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))


def saved_shapes(folder: Path, trust_remote_code: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the folder's architecture saves, without making them."""
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=trust_remote_code, **_class_options(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _class_options(config: PretrainedConfig) -> dict[str, Any]:
    model_class = _model_class(config)
    if model_class is None or "add_pooling_layer" not in inspect.signature(model_class).parameters:
        return {}
    return {"add_pooling_layer": False}


def _model_class(config: PretrainedConfig) -> Any:
    """The class that AutoModel would build, None where it comes from remote code."""
    from transformers import AutoModel

    from trainers.encoders.clip import make_known

    make_known(config)
    return AutoModel._model_mapping.get(type(config), None)


def _tower_config(tower: FromConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> PretrainedConfig:
    """transformers' config of a tower of these sizes, under whatever names its architecture has for them."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    from trainers.encoders.clip import FILLED

    known = tower.architecture in MODEL_MAPPING_NAMES or tower.architecture in FILLED
    if tower.architecture not in CONFIG_MAPPING_NAMES or not known:
        near = difflib.get_close_matches(tower.architecture, list(MODEL_MAPPING_NAMES), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"model.config.architecture: transformers knows no model_type {tower.architecture!r}{hint}")
    head_dim, rest = (tower.head_dim, 0) if tower.head_dim else divmod(tower.hidden, tower.heads)
    if rest or head_dim % 2:
        raise UsageError(
            f"model.config.heads: {tower.hidden} hidden units over {tower.heads} heads leave "
            f"{tower.hidden / tower.heads:g} for each; it must be a whole, even number"
        )
    default = AutoConfig.for_model(tower.architecture)
    names = set(default.to_dict()) | set(default.attribute_map)
    if tower.head_dim and "head_dim" not in names:
        raise UsageError(f"model.config.head_dim: {tower.architecture} always has hidden / heads; leave it out")
    wanted: dict[str, Any] = {
        "num_key_value_heads": tower.heads,
        "head_dim": head_dim,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        # RoBERTa and its kin number positions from pad_token_id + 1
        "max_position_embeddings": max_tokens + (tokenizer.pad_token_id or 0) + 1,
        **dict.fromkeys(_INTERMEDIATE, tower.intermediate),
        **dict.fromkeys(_HIDDEN_DROPOUT, tower.dropout),
        **dict.fromkeys(_ATTENTION_DROPOUT, 0.0),
    }
    return AutoConfig.for_model(
        tower.architecture,
        vocab_size=len(tokenizer),
        hidden_size=tower.hidden,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        **{name: value for name, value in wanted.items() if name in names},
    )


def longest_text(model: PreTrainedModel) -> int | None:
    """Tokens the architecture has positions for, None where it names no limit."""
    from torch import nn

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for module in model.modules():  # RoBERTa and its kin number positions from padding_idx + 1
        padding = getattr(module, "padding_idx", None)
        if limit and padding is not None and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return limit - padding - 1
    return limit
