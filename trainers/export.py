"""Out to a Sentence Transformers folder, and back.

The folder holds the model folder's files (config, tokenizer, gyre_model.json) with fp32 weights, and the files by
which `SentenceTransformer(folder).encode(texts, prompt_name=field)` is `LocalEncoder.encode(texts, field)`, in the
form that Sentence Transformers has read since version 2.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_services.schema import RunError, UsageError
from trainers.encoders.backbone import class_options, saved_shapes
from trainers.encoders.model_folder import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.encoders.text import TextEncoder

BACKBONE = "backbone."  # before the backbone's names in TextEncoder.state_dict()
_POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}
_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def export_sentence_transformer(weights: Mapping[str, Tensor], spec: ModelSpec, model_folder: Path, out: Path) -> Path:
    """Write `out`, whole or not at all, replacing what is there; returns it.

    weights       by the names of `TextEncoder.state_dict()`, any floating type, written as fp32
    model_folder  what `prepare_model_folder` made
    """
    making = out.with_name(f".{out.name}.making-{os.getpid()}")
    try:
        making.mkdir(parents=True)
        _write(weights, spec, model_folder, making)
        shutil.rmtree(out, ignore_errors=True)
        making.rename(out)
    except OSError as error:
        raise RunError(f"the export to {out} failed: {error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return out


def load_exported(folder: Path, attention: str = "auto") -> TextEncoder:
    """The encoder of a folder that `export_sentence_transformer` wrote, in evaluation mode, on the CPU."""
    from trainers.encoders.backbone import load_backbone
    from trainers.encoders.text import TextEncoder

    spec = ModelSpec.load(folder)
    if not (folder / "model.safetensors").exists():
        raise UsageError(f"{folder} has no model.safetensors, so it is no exported model")
    return TextEncoder(load_backbone(folder, attention, spec.trust_remote_code), spec).eval()


def _write(weights: Mapping[str, Tensor], spec: ModelSpec, model_folder: Path, out: Path) -> None:
    for file in model_folder.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy(file, out)
    _write_weights(weights, spec, out)
    config = json.loads((out / "config.json").read_text())
    _write_json(out / "config.json", config | {"dtype": "float32"})
    _write_json(out / "modules.json", _MODULES)
    _write_json(
        out / "sentence_bert_config.json",
        {
            "max_seq_length": spec.max_tokens,
            "do_lower_case": False,
            "model_args": class_options(out, spec.trust_remote_code),
        },
    )
    _write_json(out / "1_Pooling" / "config.json", _pooling(spec))
    _write_json(out / "2_Normalize" / "config.json", {})
    _write_json(
        out / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": spec.prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    (out / "README.md").write_text(_card(spec))


def _write_weights(weights: Mapping[str, Tensor], spec: ModelSpec, out: Path) -> None:
    """What the backbone saves, no more (an engine's dictionary may hold buffers that it computes itself)."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, shape in saved_shapes(out, spec.trust_remote_code).items():
        tensor = weights.get(BACKBONE + name)
        if tensor is None or tuple(tensor.shape) != shape:
            there = "missing" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"weights: {BACKBONE}{name} is {there}, the model folder's config makes it {shape}")
        tensors[name] = tensor.detach().to("cpu", torch.float32).clone().contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _pooling(spec: ModelSpec) -> dict[str, Any]:
    flags = {flag: mode == spec.pooling for mode, flag in _POOLING_FLAGS.items()}
    return {"word_embedding_dimension": spec.dim, **flags, "include_prompt": spec.pool_prompt}


def _card(spec: ModelSpec) -> str:
    """How to load the folder, with what can't be said inside it."""
    trusted = ", trust_remote_code=True" if spec.trust_remote_code else ""
    return f"""# A text embedding model trained with gyre

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this folder"{trusted})
queries = model.encode(["how to read a file"], prompt_name="query")
documents = model.encode(["def read(path): ..."], prompt_name="document")
similarity = model.similarity(queries, documents)
```

{spec.architecture}, {"bidirectional" if spec.bidirectional else "causal"} attention, {spec.pooling} pooling,
{spec.dim} dimensions, {spec.max_tokens} tokens. Needs transformers 5.2 or later.
"""


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
