"""Two towers: queries and documents have encoders of their own, of one architecture (`model.towers: separate`).

Chunks are cut by field (`data_services.collate.share_batch`), so a chunk runs through one tower, and the n-th chunk
through the same one on every worker: at ZeRO-3 each call gathers weights, and all workers must gather the same.

The model folder is the query tower's; the document tower has one of its own in it where `model.document_path` gives
it weights, else it starts as a copy. The export is a Sentence Transformers folder with two whole ones in it:

    modules.json, router_config.json    `encode_query` goes to one, `encode_document` to the other
    query/, document/                   each loads by itself
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from data_services.schema import UsageError
from trainers.encoders.backbone import saved_shapes
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.spec import ModelSpec
from trainers.encoders.text import LocalEncoder, TextEncoder, build_encoder
from trainers.export import export_sentence_transformer, load_exported, whole_folder

if TYPE_CHECKING:
    from trainers.config import ModelConfig

QUERY, DOCUMENT = "query", "document"
_ROUTER = "router_config.json"


class Towers(nn.Module):
    """A query encoder and a document encoder whose vectors are compared with each other; called as one of them is."""

    def __init__(self, query: TextEncoder, document: TextEncoder) -> None:
        super().__init__()
        self.query, self.document = query, document

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_tokens: Tensor | None, queries: Tensor
    ) -> Tensor:
        """What the texts' own tower makes of them, see `TextEncoder.forward`.

        queries  [n] bool, all of them or none: a chunk runs through one tower
        """
        return self._of(queries)(input_ids, attention_mask, prompt_tokens, queries)

    def token_counts(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_tokens: Tensor | None, queries: Tensor
    ) -> Tensor:
        """[n] int64, see `TextEncoder.token_counts`."""
        return self._of(queries).token_counts(input_ids, attention_mask, prompt_tokens, queries)

    def _of(self, queries: Tensor) -> TextEncoder:
        found = queries.unique().tolist()
        if len(found) != 1:
            raise ValueError("queries [n]: a chunk of two towers holds queries or documents, this one has both")
        return self.query if found[0] else self.document

    @property
    def spec(self) -> ModelSpec:
        return self.query.spec

    @property
    def dim(self) -> int:
        return self.query.dim

    @property
    def training_dim(self) -> int:
        return self.query.training_dim

    @property
    def gives_tokens(self) -> bool:
        return self.query.gives_tokens

    @property
    def packed(self) -> bool:
        return self.query.packed

    @property
    def parameter_count(self) -> int:
        return self.query.parameter_count + self.document.parameter_count

    def flops_per_token(self, length: int) -> float:
        """As `TextEncoder.flops_per_token`: a token runs through one tower, and both are of one size."""
        return self.query.flops_per_token(length)


def prepare_document_tower(config: ModelConfig, folder: Path) -> None:
    """Adds the document tower's folder to the model folder, where `model.document_path` names its weights.

    UsageError where they are of another architecture, tokenizer, pooling, length or prompt than the query tower's.
    """
    if config.document_path is None:
        return
    try:
        changes = {"path": config.document_path, "init_from": None}
        prepare_model_folder(config.model_copy(update=changes), folder / DOCUMENT)
    except UsageError as error:
        raise UsageError(str(error).replace("model.path", "model.document_path")) from error
    mine, theirs = (_shared(each) for each in (folder / DOCUMENT, folder))
    for name, wanted in theirs.items():
        if mine[name] != wanted:
            shutil.rmtree(folder / DOCUMENT)
            values = "" if len(str(wanted)) > 100 else f": {mine[name]} and {wanted}"
            raise UsageError(
                f"model.document_path: {config.document_path} differs from the query tower in {name}{values}; "
                "two towers share one architecture, tokenizer and way of pooling"
            )


def _shared(folder: Path) -> dict[str, Any]:
    """What two towers must have in common."""
    from transformers import AutoTokenizer

    spec = ModelSpec.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    return {
        **asdict(spec),
        "its weights": saved_shapes(folder, spec.trust_remote_code),
        "its tokenizer": tokenizer.get_vocab(),
    }


def build_towers(
    config: ModelConfig, folder: Path, build: Callable[[ModelConfig, Path], TextEncoder] = build_encoder
) -> Towers:
    """Both encoders from a model folder; equal where `model.document_path` gives the second none of its own.

    Random weights come from the current torch generator, which is left as for a single encoder.
    """
    query, other = build(config, folder), _own_folder(folder, DOCUMENT)
    if other != folder:
        return Towers(query, build(config, other))
    with torch.random.fork_rng(devices=[]):
        document = build(config, folder)
    document.load_state_dict(query.state_dict())
    return Towers(query, document)


def _own_folder(folder: Path, field: str) -> Path:
    """The model folder of one tower, of two whose model folder is `folder`."""
    return folder / DOCUMENT if field == DOCUMENT and (folder / DOCUMENT).exists() else folder


class LocalTowers:
    """Both encoders on this process's device, `LocalEncoder` each; a field's texts go to its own."""

    def __init__(self, query: LocalEncoder, document: LocalEncoder) -> None:
        self.query, self.document = query, document
        self.gives_tokens, self.unit_vectors = query.gives_tokens, query.unit_vectors

    def encode(self, texts: Sequence[str], field: str) -> np.ndarray:
        """Vectors [n, D] float32 of texts of one field, see `LocalEncoder.encode`."""
        return self._of(field).encode(texts, field)

    def encode_tokens(self, texts: Sequence[str], field: str) -> list[np.ndarray]:
        """The token vectors [m, D] float32 of each text, see `LocalEncoder.encode_tokens`."""
        return self._of(field).encode_tokens(texts, field)

    def _of(self, field: str) -> LocalEncoder:
        return self.query if field.endswith(QUERY) else self.document


def export_towers(
    weights: Mapping[str, Tensor],
    spec: ModelSpec,
    model_folder: Path,
    out: Path,
    export: Callable[[Mapping[str, Tensor], ModelSpec, Path, Path], Path] = export_sentence_transformer,
) -> Path:
    """Write `out`, whole or not at all, replacing what is there; returns it.

    weights  by the names of `Towers.state_dict()`
    export   writes one tower's folder, called with (weights, spec, model_folder, out)

    `SentenceTransformer(out)` encodes queries by `encode_query` and documents by `encode_document`; with pooling
    "tokens" `MultiVectorEncoder(out)` does.
    """
    with whole_folder(out) as making:
        for field in (QUERY, DOCUMENT):
            prefix = f"{field}."
            own = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
            export(own, spec, _own_folder(model_folder, field), making / field)
        _write_router(making)
    return out


def has_towers(folder: Path) -> bool:
    """Whether `export_towers` wrote it."""
    return all((folder / part).exists() for part in (_ROUTER, QUERY, DOCUMENT))


def load_towers(folder: Path, attention: str = "auto") -> Towers:
    """The encoders of a folder that `export_towers` wrote, in evaluation mode, on the CPU."""
    if not has_towers(folder):
        raise UsageError(f"{folder} has no {_ROUTER} beside {QUERY}/ and {DOCUMENT}/, so it is no export of two towers")
    return Towers(*(load_exported(folder / field, attention) for field in (QUERY, DOCUMENT))).eval()


def _write_router(folder: Path) -> None:
    """The files by which Sentence Transformers sees the two folders as one model."""
    types: dict[str, str] = {}
    structure: dict[str, list[str]] = {}
    for field in (QUERY, DOCUMENT):
        modules = json.loads((folder / field / "modules.json").read_text())
        places = [f"{field}/{module['path']}".rstrip("/") for module in modules]
        types |= {place: module["type"] for place, module in zip(places, modules, strict=True)}
        structure[field] = places
    parameters = {"default_route": DOCUMENT, "allow_empty_key": True}
    _write_json(folder / _ROUTER, {"types": types, "structure": structure, "parameters": parameters})
    router = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}
    _write_json(folder / "modules.json", [router])
    for file in (folder / QUERY / "config_sentence_transformers.json", *(folder / QUERY).glob("*.py")):
        shutil.copy(file, folder)
    kind = json.loads((folder / "config_sentence_transformers.json").read_text())["model_type"]
    (folder / "README.md").write_text(_CARD.replace("SentenceTransformer", kind))


_CARD = """# A text embedding model of two towers trained with gyre

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this folder")
queries = model.encode_query(["how to read a file"])
documents = model.encode_document(["def read(path): ..."])
similarity = model.similarity(queries, documents)
```

Each of `query/` and `document/` is a model by itself; its README says more.
"""


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
