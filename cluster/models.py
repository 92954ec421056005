"""What is done with a trained model: open it, search with it, hand it out, look at its checkpoints.

MODEL everywhere is a folder, a run (its id, the beginning of one, or its folder), `models:/NAME@ALIAS`,
`models:/NAME/VERSION`, or a hub id.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.paths import find_run, home
from data_services.schema import Encoder, Item, Media, RunError, Undecodable, UsageError, item_id

if TYPE_CHECKING:
    import numpy as np


BUILTIN = "builtin:stdlib-code"
MAX_FILE_BYTES = 1_000_000
MAX_IMAGE_BYTES = 100_000_000
_OF_A_MODEL = ("config.json", "modules.json", "gyre_towers.json")


@dataclass(frozen=True)
class ModelRef:
    """A model on this machine: how it was named, and its folder."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Hit:
    """A document that answers a query: its similarity (the cosine, of token vectors the sum of their maxima), its name,
    its text (of an image none)."""

    score: float
    name: str
    text: str


@dataclass(frozen=True)
class QueryResult:
    """The best hits of one query, best first."""

    query: str
    model: str
    corpus: str
    documents: int
    hits: list[Hit]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Export:
    """An exported Sentence Transformers folder."""

    run_id: str
    folder: Path

    def as_dict(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "folder": str(self.folder)}


@dataclass(frozen=True)
class SavedStep:
    """A committed checkpoint. damage: one sentence, empty where every file is as it was written."""

    step: int
    world_size: int
    folder: Path
    size_bytes: int
    damage: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}


def resolve(model: str, root: Path | None = None) -> ModelRef:
    """MODEL as a folder on this machine. Raises UsageError that says what was tried."""
    if model.startswith("models:"):
        from cluster.registry import model_folder

        folder, version = model_folder(model, root)
        return ModelRef(f"{version.name}/{version.version}", folder)
    path = Path(model).expanduser()
    if any((path / name).is_file() for name in _OF_A_MODEL):
        return ModelRef(path.name, path.absolute())
    if path.is_dir() and not (path / "recipe.json").is_file():
        raise UsageError(f"{path} is no model: it has neither config.json nor modules.json")
    if "/" in model and not path.is_dir():
        from trainers.encoders.model_folder import resolve as download

        return ModelRef(model, download(model, key="MODEL"))
    run = find_run(model, root)
    if not run.export.is_dir():
        raise UsageError(
            f"run {run.run_id} has no exported model yet; finish it: gyre train RECIPE --resume {run.run_id}"
        )
    return ModelRef(run.run_id, run.export)


def fingerprint(folder: Path) -> str:
    """Of a model: sha256 over its files' names and bytes."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def open_encoder(folder: Path, device: str = "cpu") -> Iterator[Encoder]:
    """The model of a folder as an encoder, with its prompts, length and pooling."""
    from cluster.prepare import tokenizer_of
    from trainers.config import ModelConfig
    from trainers.encoders.local import LocalEncoder
    from trainers.encoders.model_folder import prepare_model_folder
    from trainers.encoders.spec import SPEC_FILE
    from trainers.encoders.text import build_encoder
    from trainers.encoders.towers import Layout

    if (folder / SPEC_FILE).exists() or Layout.load(folder):
        yield exported_encoder(folder, device)
        return
    config = ModelConfig(path=str(folder))
    with tempfile.TemporaryDirectory(prefix="gyre-") as place:
        made = Path(place) / "model"
        prepare_model_folder(config, made)
        yield LocalEncoder(build_encoder(config, made).to(device), tokenizer_of(made))


def exported_encoder(folder: Path, device: str = "cpu") -> Encoder:
    """The model of a folder that gyre exported, one tower or several."""
    from cluster.prepare import tokenizer_of
    from trainers.encoders.local import LocalEncoder
    from trainers.encoders.towers import Layout, load_towers
    from trainers.export import load_exported

    tower = load_towers(folder) if Layout.load(folder) else load_exported(folder)
    return LocalEncoder(tower.to(device), tokenizer_of(folder))


def query(
    text: str | None,
    model: str,
    corpus: str = BUILTIN,
    k: int = 5,
    root: Path | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
    image: Path | None = None,
) -> QueryResult:
    """The k documents of a corpus nearest to `text`, or to the picture in the file `image`.

    corpus: the built-in one, or a folder of text files (one document a file) and, for a model with a tower for them,
    images. The corpus's vectors are kept under the home, by the contents of model and corpus: only the first query of
    a corpus waits for them.
    """
    from evaluation.search import rank, rank_tokens

    ref = resolve(model, root)
    kinds = kinds_of(ref.folder)
    asked = _asked(text, image, kinds, ref.name)
    names, items = _corpus(corpus, root or home(), kinds)
    with open_encoder(ref.folder) as encoder:
        documents = _corpus_vectors(encoder, ref.folder, items, (root or home()) / "vectors", on_progress)
        nearest: Any = rank_tokens if _gives_tokens(encoder) else rank
        try:
            looking = _vectors(encoder, [asked], "query")
        except Undecodable as error:
            raise UsageError(f"{image}: {error}") from error
        positions, scores = nearest(looking, documents, min(k, len(items)))
    found = [(float(score), names[i], items[i]) for i, score in zip(positions[0], scores[0], strict=True)]
    hits = [Hit(score, name, item if isinstance(item, str) else "") for score, name, item in found]
    return QueryResult(text or str(image), ref.name, corpus, len(items), hits)


def kinds_of(folder: Path) -> tuple[str, ...]:
    """Of items that a model on this machine encodes."""
    from trainers.encoders.towers import Layout

    layout = Layout.load(folder)
    return tuple(layout.towers) if layout and layout.by == "kind" else ("text",)


def _asked(text: str | None, image: Path | None, kinds: tuple[str, ...], model: str) -> Item:
    """What a query looks for. UsageError where it is nothing, or of a kind that the model doesn't encode."""
    if (text is None) == (image is None):
        raise UsageError("give a text to look for, or --image FILE; one of the two")
    if image is None:
        assert text is not None, "one of the two is there"
        if not text.strip():
            raise UsageError("the query is empty")
        return text
    if "image" not in kinds:
        raise UsageError(
            f"{model} encodes {' and '.join(kinds)}, no images; give a model that was trained with model.image"
        )
    try:
        return Media("image", image.expanduser().read_bytes())
    except OSError as error:
        raise UsageError(f"--image {image}: {error.strerror}") from error


def _corpus(corpus: str, root: Path, kinds: tuple[str, ...]) -> tuple[list[str], list[Item]]:
    from data_services.sources import builtin_corpus

    if corpus == BUILTIN:
        found = builtin_corpus(root)
        return found.names, list(found.texts)
    folder = Path(corpus).expanduser()
    if not folder.is_dir():
        raise UsageError(f"no corpus {corpus!r}: give a folder of files, or {BUILTIN}")
    named = [(str(p.relative_to(folder)), item) for p in sorted(folder.rglob("*")) if (item := _item_of(p, kinds))]
    if not named:
        raise UsageError(f"{folder} has no {' or '.join(kinds)} file to search")
    return [name for name, _ in named], [item for _, item in named]


def _item_of(path: Path, kinds: tuple[str, ...]) -> Item | None:
    """A UTF-8 file of up to a megabyte as a text, an image as such where the model encodes images; None for anything
    else and for hidden files."""
    from data_services.media.image import decode_image
    from data_services.media.kinds import kind_of

    if path.name.startswith(".") or not path.is_file() or path.stat().st_size > MAX_IMAGE_BYTES:
        return None
    data = path.read_bytes()
    if kind_of(data) == "image":
        if "image" not in kinds:
            return None
        try:
            decode_image(data)
        except Undecodable:
            return None
        return Media("image", data)
    try:
        return None if len(data) > MAX_FILE_BYTES else data.decode().strip() or None
    except UnicodeDecodeError:
        return None


def _corpus_vectors(
    encoder: Encoder, folder: Path, items: list[Item], cache: Path, on_progress: Callable[[str], None]
) -> np.ndarray | list[np.ndarray]:
    """As `_vectors` of the documents; token vectors are kept end to end, with their numbers."""
    import numpy as np

    digest = hashlib.sha256(json.dumps([item_id(item) for item in items]).encode())
    digest.update(fingerprint(folder).encode())
    tokens = _gives_tokens(encoder)
    kept = cache / f"{digest.hexdigest()[:32]}.{'npz' if tokens else 'npy'}"
    if kept.is_file():
        there = np.load(kept)
        return np.split(there["tokens"], there["lengths"].cumsum()[:-1]) if tokens else there
    on_progress(f"embedding {len(items):,} documents, once for this model and corpus")
    vectors = _vectors(encoder, items, "document")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache, suffix=".making", delete=False) as making:
        if tokens:
            np.savez(making, tokens=np.concatenate(vectors), lengths=np.array([len(each) for each in vectors]))
        else:
            np.save(making, vectors)
    Path(making.name).replace(kept)
    return vectors


def _vectors(encoder: Any, texts: list[str], field: str) -> np.ndarray | list[np.ndarray]:
    """[n, D], or [m, D] of each text from a model that has a vector for each token."""
    return encoder.encode_tokens(texts, field) if _gives_tokens(encoder) else encoder.encode(texts, field)


def _gives_tokens(encoder: Encoder) -> bool:
    return getattr(encoder, "gives_tokens", False)


def export(run: str, folder: Path, root: Path | None = None) -> Export:
    """Copies a run's Sentence Transformers folder to `folder`, whole or not at all.

    Raises UsageError for a run that isn't there or hasn't finished, and for a folder that isn't empty.
    """
    found = find_run(run, root)
    if not found.export.is_dir():
        raise UsageError(
            f"run {found.run_id} has no exported model yet; finish it: gyre train RECIPE --resume {found.run_id}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty; name a new folder")
    making = folder.with_name(folder.name + ".making")
    try:
        shutil.rmtree(making, ignore_errors=True)
        shutil.copytree(found.export, making)
        if folder.exists():
            folder.rmdir()
        making.rename(folder)
    except OSError as error:
        shutil.rmtree(making, ignore_errors=True)
        raise RunError(f"{folder} can't be written: {error}") from error
    return Export(found.run_id, folder.absolute())


def checkpoints(run: str, root: Path | None = None) -> list[SavedStep]:
    """The committed checkpoints of a run, oldest first, every file verified."""
    from trainers.checkpoint import committed

    found = find_run(run, root)
    saved = []
    for checkpoint in committed(found.checkpoints):
        damage = ""
        try:
            checkpoint.verify()
        except RunError as error:
            damage = str(error)
        size = sum(p.stat().st_size for p in checkpoint.folder.iterdir())
        saved.append(SavedStep(checkpoint.step, checkpoint.world_size, checkpoint.folder, size, damage))
    return saved
