"""Several towers whose vectors are compared with each other: of queries and documents, or of texts and images.

    model.towers: separate      `query` and `document`, of one architecture, by the field of an item
    model.image, model.audio    `text`, `image`, `audio`, by the kind of an item

Chunks are cut by tower (`data_services.collate.share_batch`), so a chunk runs through one, and the n-th chunk through
the same one on every worker: at ZeRO-3 each call gathers weights, and all workers must gather the same.

A folder of several towers, model folder or export, has a folder of each, which loads by itself (in a model folder the
first tower's is the root), and beside them:

    gyre_towers.json                    the towers in order, where each lies, and what chooses between them
    modules.json, router_config.json    of an export: Sentence Transformers sees one model
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from data_services.schema import UsageError
from trainers.encoders import fields
from trainers.encoders.backbone import saved_shapes
from trainers.encoders.inputs import TowerInputs
from trainers.encoders.modality import modality_of
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.spec import TOWERS_FILE, ModelSpec
from trainers.encoders.text import TextEncoder, build_encoder
from trainers.encoders.tower import Tower
from trainers.export import export_sentence_transformer, load_exported, whole_folder

if TYPE_CHECKING:
    from trainers.config import ModelConfig

QUERY, DOCUMENT = "query", "document"
TEXT = "text"
_ROUTER = "router_config.json"


@dataclass(frozen=True)
class Layout:
    """What a folder says of its towers.

    towers  by name, in the order by which batches number them: the folder of each, below this one
    by      what the names are: of an item's field ("query", "document") or of its kind ("text", "image", …)
    """

    towers: dict[str, str]
    by: Literal["field", "kind"]

    def save(self, folder: Path) -> None:
        _write_json(folder / TOWERS_FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Layout | None:
        """None: the folder is of one tower."""
        if (folder / TOWERS_FILE).exists():
            return cls(**json.loads((folder / TOWERS_FILE).read_text()))
        if all((folder / part).exists() for part in (_ROUTER, QUERY, DOCUMENT)):  # exported before there was the file
            return cls({QUERY: QUERY, DOCUMENT: DOCUMENT}, "field")
        return None


class Towers(nn.Module):
    """Encoders of one width, called as one of them is; `TowerInputs.tower` says which."""

    def __init__(self, towers: Mapping[str, Tower]) -> None:
        super().__init__()
        self.names = tuple(towers)
        for name, tower in towers.items():
            self.add_module(name, tower)
        if isinstance(parts := towers.get(fields.READS), fields.FieldsTower):
            parts.towers = {name: tower for name, tower in towers.items() if tower is not parts}

    def forward(self, inputs: TowerInputs) -> Tensor:
        """What its tower makes of a chunk, see `Tower`."""
        return self.of(inputs.tower)(inputs)

    def embed(self, inputs: TowerInputs) -> Tensor:
        return self.of(inputs.tower).embed(inputs)

    def token_counts(self, inputs: TowerInputs) -> Tensor:
        return self.of(inputs.tower).token_counts(inputs)

    @property
    def numbers(self) -> tuple[int | None, ...]:
        """What `TowerInputs.tower` may be."""
        return tuple(range(len(self.names)))

    def of(self, tower: int | None) -> Tower:
        assert tower is not None, "chunks are cut by tower"
        return self[self.names[tower]]

    def __getitem__(self, name: str) -> Tower:
        return cast(Tower, getattr(self, name))

    @property
    def spec(self) -> ModelSpec:
        return self.of(0).spec

    @property
    def dim(self) -> int:
        return self.of(0).dim

    @property
    def training_dim(self) -> int:
        return self.of(0).training_dim

    @property
    def gives_tokens(self) -> bool:
        return self.of(0).gives_tokens

    @property
    def packed(self) -> bool:
        return self.of(0).packed

    @property
    def parameter_count(self) -> int:
        return sum(self[name].parameter_count for name in self.names)


def prepare_towers(config: ModelConfig, folder: Path) -> None:
    """Adds to a model folder, which is that of the first tower, those of the others that a recipe has.

    UsageError names the key that can't be honoured.
    """
    others = config.kinds[1:]
    if others and config.vision is None:
        for kind in others:
            (folder / kind).mkdir()
            modality_of(kind, config).prepare(config, folder / kind, ModelSpec.load(folder))
        Layout({TEXT: "."} | {kind: kind for kind in others}, "kind").save(folder)
    elif config.towers == "separate":
        _prepare_document_tower(config, folder)
        Layout({QUERY: ".", DOCUMENT: DOCUMENT if (folder / DOCUMENT).exists() else "."}, "field").save(folder)


def _prepare_document_tower(config: ModelConfig, folder: Path) -> None:
    """The document tower's folder, where `model.document_path` names its weights.

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
    """The encoders of a model folder that `prepare_towers` made. Query and document towers are equal where
    `model.document_path` gives the second none of its own.

    Random weights come from the current torch generator, which is left by the two as by a single encoder.
    """
    layout = Layout.load(folder)
    assert layout is not None, "prepare_towers says which towers there are"
    if layout.by == "kind":
        others = {kind: modality_of(kind, config).build(config, folder / kind) for kind in config.kinds[1:]}
        return Towers({TEXT: build(config, folder)} | others)
    query, other = build(config, folder), folder / layout.towers[DOCUMENT]
    if other.samefile(folder):
        with torch.random.fork_rng(devices=[]):
            document = build(config, folder)
        document.load_state_dict(query.state_dict())
    else:
        document = build(config, other)
    return Towers({QUERY: query, DOCUMENT: document})


def export_towers(
    weights: Mapping[str, Tensor], model_folder: Path, out: Path, model: ModelConfig | None = None
) -> Path:
    """Write `out`, whole or not at all, replacing what is there; returns it.

    weights  by the names of `Towers.state_dict()`
    model    the recipe's section, needed where it has an adapter

    `SentenceTransformer(out)` encodes queries by `encode_query` and documents by `encode_document`; with pooling
    "tokens" `MultiVectorEncoder(out)` does. Of towers by kind it encodes texts and images alike; where there is another
    kind, gyre loads the folder (`cluster.models.exported_encoder`), and each of the others by itself.
    """
    layout = Layout.load(model_folder)
    assert layout is not None, "prepare_towers says which towers there are"
    with whole_folder(out) as making:
        for name, place in layout.towers.items():
            own = {key.removeprefix(f"{name}."): t for key, t in weights.items() if key.startswith(f"{name}.")}
            spec = ModelSpec.load(model_folder / place)
            export_sentence_transformer(own, spec, model_folder / place, making / name, model)
        Layout({name: name for name in layout.towers}, layout.by).save(making)
        if all((making / name / "modules.json").exists() for name in layout.towers):
            _write_router(making, layout)
        else:  # a kind that Sentence Transformers doesn't know
            tokens = ModelSpec.load(model_folder).pooling == "tokens"
            (making / "README.md").write_text(_BY_GYRE.replace("CALL", "encode_tokens" if tokens else "encode"))
    return out


def load_towers(folder: Path, attention: str = "auto") -> Towers:
    """The encoders of a folder that `export_towers` wrote, in evaluation mode, on the CPU."""
    layout = Layout.load(folder)
    if layout is None:
        raise UsageError(f"{folder} has no {TOWERS_FILE}, so it is no export of several towers")
    return Towers({name: load_exported(folder / place, attention) for name, place in layout.towers.items()}).eval()


def _write_router(folder: Path, layout: Layout) -> None:
    """The files by which Sentence Transformers sees the folders as one model."""
    types: dict[str, str] = {}
    structure: dict[str, list[str]] = {}
    for name in layout.towers:
        modules = json.loads((folder / name / "modules.json").read_text())
        places = [f"{name}/{module['path']}".rstrip("/") for module in modules]
        types |= {place: module["type"] for place, module in zip(places, modules, strict=True)}
        structure[name] = places
    parameters: dict[str, Any] = {"default_route": [*layout.towers][-1], "allow_empty_key": True}
    if layout.by == "kind":
        parameters["default_route"] = next(iter(layout.towers))
        parameters["route_mappings"] = {str((None, name)): name for name in layout.towers}
    _write_json(folder / _ROUTER, {"types": types, "structure": structure, "parameters": parameters})
    router = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}
    _write_json(folder / "modules.json", [router])
    first = folder / next(iter(layout.towers))
    for file in (first / "config_sentence_transformers.json", *first.glob("*.py")):
        shutil.copy(file, folder)
    kind = json.loads((folder / "config_sentence_transformers.json").read_text())["model_type"]
    card = _BY_FIELD if layout.by == "field" else _BY_KIND
    listed = " and ".join(f"`{name}/`" for name in layout.towers)
    (folder / "README.md").write_text(card.replace("SentenceTransformer", kind).replace("FOLDERS", listed))


_BY_FIELD = """# A text embedding model of two towers trained with gyre

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this folder")
queries = model.encode_query(["how to read a file"])
documents = model.encode_document(["def read(path): ..."])
similarity = model.similarity(queries, documents)
```

Each of FOLDERS is a model by itself; its README says more.
"""
_BY_KIND = """# An embedding model of several towers trained with gyre

```python
from PIL import Image
from sentence_transformers import SentenceTransformer  # version 6 or later

model = SentenceTransformer("this folder")
texts = model.encode(["a cat on a chair"])
images = model.encode([Image.open("cat.png").convert("RGB")])
similarity = model.similarity(texts, images)
```

Each of FOLDERS is a model by itself; its README says more.
"""
_BY_GYRE = """# An embedding model of several towers trained with gyre

```python
from pathlib import Path

from cluster.models import exported_encoder
from data_services.schema import Media

model = exported_encoder(Path("this folder"))
texts = model.CALL(["a low tone"], "query")
others = model.CALL([Media("audio", Path("tone.wav").read_bytes())], "document")  # or another kind
```
"""


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
