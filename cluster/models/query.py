"""`gyre query`: the documents of a corpus nearest to a text or a picture."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.models.folder import fingerprint, kinds_of, open_encoder
from cluster.models.reference import resolve
from cluster.paths import home
from data_services.schema import Encoder, Item, Media, Undecodable, UsageError, item_id

if TYPE_CHECKING:
    import numpy as np


BUILTIN = "builtin:stdlib-code"
MAX_FILE_BYTES = 1_000_000
MAX_IMAGE_BYTES = 100_000_000


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


def _vectors(encoder: Any, texts: list[Item], field: str) -> np.ndarray | list[np.ndarray]:
    """[n, D], or [m, D] of each text from a model that has a vector for each token."""
    return encoder.encode_tokens(texts, field) if _gives_tokens(encoder) else encoder.encode(texts, field)


def _gives_tokens(encoder: Encoder) -> bool:
    return getattr(encoder, "gives_tokens", False)
