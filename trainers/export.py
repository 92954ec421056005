"""Out to a Sentence Transformers folder, and back.

The folder holds the model folder's files (config, tokenizer, gyre_model.json) with fp32 weights, and the files by
which `SentenceTransformer(folder).encode(texts, prompt_name=field)` is `LocalEncoder.encode(texts, field)`, in the
form that Sentence Transformers has read since version 2. With pooling "tokens" it is a `MultiVectorEncoder` (version
6), whose `encode_query` and `encode_document` are `LocalEncoder.encode_tokens`.

What only training saw (a training-only head, further layers) is left out. An adapter is merged into the weights,
or stands alone in place of them and of config.json (trainers/encoders/adapters.py).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_services.schema import RunError, UsageError
from trainers.cards import card_of
from trainers.encoders.adapters import ADAPTER_FILE, base_of, load_adapted, merged, write_adapter
from trainers.encoders.backbone import class_options, saved_shapes
from trainers.encoders.choices import readout_shapes
from trainers.encoders.model_folder import READOUT_FILE, read_readout
from trainers.encoders.sentence_transformer import ACTIVATIONS, POOLING, POOLING_FLAGS
from trainers.encoders.spec import TOWERS_FILE, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.config import ModelConfig
    from trainers.encoders.tower import Tower

WEIGHTS = "model.safetensors"
BACKBONE, READOUT = "backbone.", "readout."  # before the names of their weights in TextEncoder.state_dict()
_LATENT_CODE = Path(__file__).parent / "encoders" / "latent_attention.py"


def export_sentence_transformer(
    weights: Mapping[str, Tensor], spec: ModelSpec, model_folder: Path, out: Path, model: ModelConfig | None = None
) -> Path:
    """Write `out`, whole or not at all, replacing what is there; returns it.

    weights       by the names of `TextEncoder.state_dict()`, any floating type, written as fp32
    model_folder  what `prepare_model_folder` made
    model         the recipe's section, needed where it has an adapter
    """
    with whole_folder(out) as making:
        _write(weights, spec.exported(), model_folder, making, model)
    return out


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of `out` at the end. RunError where the disk fails."""
    making = out.with_name(f".{out.name}.making-{os.getpid()}")
    try:
        making.mkdir(parents=True)
        yield making
        shutil.rmtree(out, ignore_errors=True)
        making.rename(out)
    except OSError as error:
        raise RunError(f"the export to {out} failed: {error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def load_exported(folder: Path, attention: str = "auto") -> Tower:
    """The encoder of a folder that `export_sentence_transformer` wrote, in evaluation mode, on the CPU."""
    from trainers.encoders.backbone import load_backbone
    from trainers.encoders.modality import loader_of
    from trainers.encoders.text import text_encoder

    spec = ModelSpec.load(folder)
    if spec.reads not in ("text", "vision"):
        return loader_of(spec)(folder, attention)
    if (folder / ADAPTER_FILE).exists():
        backbone = load_adapted(folder, attention, spec.trust_remote_code)
    elif (folder / "model.safetensors").exists():
        backbone = load_backbone(folder, attention, spec.trust_remote_code)
    else:
        raise UsageError(f"{folder} has no model.safetensors, so it is no exported model")
    encoder = text_encoder(backbone, spec, folder)
    encoder.readout.load_state_dict(read_readout(folder))
    return encoder.eval()


def _write(
    weights: Mapping[str, Tensor], spec: ModelSpec, model_folder: Path, out: Path, model: ModelConfig | None
) -> None:
    import torch

    for file in model_folder.iterdir():
        if file.is_file() and ".safetensors" not in file.name and file.name != TOWERS_FILE:
            shutil.copy(file, out)
    spec.save(out)
    if not (out / "config.json").exists():  # a tower that is none of transformers': its own file loads it
        _save({name: t.detach().to("cpu", torch.float32).contiguous() for name, t in weights.items()}, out / WEIGHTS)
        (out / "README.md").write_text(card_of(spec, ""))
        return
    config = json.loads((out / "config.json").read_text())
    _write_json(out / "config.json", config | {"dtype": "float32"})
    base = _write_backbone(weights, spec, model_folder, out, model)
    readout = _chosen(weights, READOUT, readout_shapes(spec))
    if readout and not (spec.reads == "text" and spec.in_sentence_transformers):
        _save(readout, out / READOUT_FILE)
    if spec.in_sentence_transformers:
        _write_modules(spec, readout, out)
        _write_json(out / "config_sentence_transformers.json", _model_settings(spec))
    (out / "README.md").write_text(card_of(spec, base))
    if base:
        (out / "config.json").unlink()  # where there is one, transformers looks for the base's weights beside it


def _model_settings(spec: ModelSpec) -> dict[str, Any]:
    return {
        "model_type": "MultiVectorEncoder" if spec.pooling == "tokens" else "SentenceTransformer",
        "prompts": spec.prompts,
        "default_prompt_name": None,
        "similarity_fn_name": _similarity(spec),
    }


def _write_backbone(
    weights: Mapping[str, Tensor], spec: ModelSpec, model_folder: Path, out: Path, model: ModelConfig | None
) -> str:
    """The backbone's weights, or its adapter alone: then the base that this one names, else nothing."""
    of_tower = model.image if model and spec.reads == "image" else model
    adapter = of_tower.adapter if of_tower else None
    own = {name.removeprefix(BACKBONE): t for name, t in weights.items() if name.startswith(BACKBONE)}
    if model is not None and adapter is not None and not adapter.merge:
        base = base_of(model, model_folder)
        write_adapter(own, adapter, model_folder, base, out)
        return base
    if adapter is not None:
        weights = {BACKBONE + name: t for name, t in merged(own, adapter, model_folder).items()}
    _save(_chosen(weights, BACKBONE, saved_shapes(out, spec.trust_remote_code)), out / "model.safetensors")
    return ""


def _similarity(spec: ModelSpec) -> str:
    if spec.pooling == "tokens":
        return "maxsim"
    return "cosine" if spec.normalize else "dot"


def _chosen(weights: Mapping[str, Tensor], part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The weights of a part in fp32 on the CPU, what its model saves and no more (an engine's dictionary may hold
    buffers that it computes itself)."""
    import torch

    tensors = {}
    for name, shape in shapes.items():
        tensor = weights.get(part + name)
        if tensor is None or tuple(tensor.shape) != shape:
            there = "missing" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"weights: {part}{name} is {there}, the model folder makes it {shape}")
        tensors[name] = tensor.detach().to("cpu", torch.float32).clone().contiguous()
    return tensors


@dataclass(frozen=True)
class _Module:
    """One module of a Sentence Transformers folder: its class, its settings and its weights."""

    type: str
    settings: dict[str, Any]
    weights: dict[str, Tensor] = field(default_factory=dict)


def _write_modules(spec: ModelSpec, readout: Mapping[str, Tensor], out: Path) -> None:
    listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    _write_json(out / "sentence_bert_config.json", _transformer(spec, out))
    for i, module in enumerate(_modules(spec, readout, out), start=1):
        place = f"{i}_{module.type.rsplit('.', 1)[-1]}"
        listed.append({"idx": i, "name": str(i), "path": place, "type": module.type})
        _write_json(out / place / "config.json", module.settings)
        if module.weights:
            _save(module.weights, out / place / "model.safetensors")
    _write_json(out / "modules.json", listed)
    if spec.latent:
        shutil.copy(_LATENT_CODE, out)


def _transformer(spec: ModelSpec, out: Path) -> dict[str, Any]:
    if spec.reads != "text":
        output = "pooler_output" if spec.own_pooling else "last_hidden_state"
        return {
            "model_args": class_options(out),
            "modality_config": {spec.reads: {"method": "forward", "method_output_name": output}},
            "module_output_name": "sentence_embedding" if spec.own_pooling else "token_embeddings",
        }
    settings = {
        "max_seq_length": spec.max_tokens,
        "do_lower_case": False,
        "model_args": class_options(out, spec.trust_remote_code),
    }
    if spec.mean_layers > 1:
        settings["config_args"] = {"output_hidden_states": True}
    if spec.query_length is not None:
        settings["query_expansion"] = {"strategy": "min", "attend": True, "length": spec.query_length}
    return settings


def _modules(spec: ModelSpec, readout: Mapping[str, Tensor], out: Path) -> Iterator[_Module]:
    """What follows the transformer, in order."""
    tokens = spec.pooling == "tokens"
    ends = {"module_input_name": "token_embeddings"} if tokens else {}
    if spec.mean_layers > 1:
        yield _mean_of_layers(spec, out)
    if spec.latent:
        own = {name.removeprefix("latent."): t for name, t in readout.items() if name.startswith("latent.")}
        sizes = {"hidden": spec.hidden, "count": spec.latent.count, "heads": spec.latent.heads}
        yield _Module(f"{_LATENT_CODE.stem}.LatentAttentionModule", sizes, own)
    if not tokens and not spec.own_pooling:
        yield _Module("sentence_transformers.models.Pooling", _pooling(spec))
    for i, layer in enumerate(spec.head):
        settings = {
            "in_features": layer.inputs,
            "out_features": layer.outputs,
            "bias": layer.bias,
            "activation_function": ACTIVATIONS[layer.activation],
        }
        own = {f"linear.{n}": readout[f"head.{i}.{n}"] for n in ("weight", "bias") if f"head.{i}.{n}" in readout}
        yield _Module("sentence_transformers.models.Dense", settings | ends, own)
    if tokens:
        mask = {"skiplist_words": list(spec.skipped), "skiplist_tasks": ["document"], "keep_only_token_ids": None}
        yield _Module("sentence_transformers.multi_vector_encoder.modules.MultiVectorMask", mask)
    if spec.normalize:
        yield _Module("sentence_transformers.models.Normalize", ends)


def _mean_of_layers(spec: ModelSpec, out: Path) -> _Module:
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(out, trust_remote_code=spec.trust_remote_code)
    layers = config.get_text_config().num_hidden_layers
    settings = {
        "word_embedding_dimension": spec.hidden,
        "num_hidden_layers": layers,
        "layer_start": layers + 1 - spec.mean_layers,
    }
    equal = {"layer_weights": torch.ones(spec.mean_layers)}
    return _Module("sentence_transformers.models.WeightedLayerPooling", settings, equal)


def _pooling(spec: ModelSpec) -> dict[str, Any]:
    theirs = POOLING["mean" if spec.latent else spec.pooling]
    flags = {flag: mode == theirs for mode, flag in POOLING_FLAGS.items()}
    return {"word_embedding_dimension": spec.hidden, **flags, "include_prompt": spec.pool_prompt}


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), file, metadata={"format": "pt"})


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
