"""The teacher of a recipe: opened, and asked about the texts that it hasn't seen, before training."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import Recipe
from data_services.schema import UsageError
from data_services.teacher import Predict, Progress, Teacher, adopt_vectors, teach_pairs, teach_vectors

if TYPE_CHECKING:
    from data_services.embedding.texts import Field as Side
    from data_services.mining.texts import TextTable
    from data_services.mining.vectors import Vectors
    from data_services.store import StoredSource

SIDES: tuple[Side, ...] = ("query", "document")


def teacher_of(
    recipe: Recipe,
    sources: Sequence[StoredSource],
    root: Path,
    on_progress: Progress = lambda what, done, of: None,
) -> Teacher | None:
    """What a recipe's batches take of its teacher, with everything that they need of it computed and kept.

    Vectors are computed over the cluster where one is up, as `gyre embed` does; pairs are scored in this process.
    Raises UsageError for a teacher that isn't there or doesn't fit.
    """
    config = recipe.data.teacher
    if config is None:
        return None
    wanted = any("teacher_vectors" in term.needs for term in recipe.losses)
    if config.model is not None:
        return _by_model(config.model, sources, root, wanted, on_progress)
    if config.embeddings is not None:
        return _by_embeddings(Path(config.embeddings.queries), Path(config.embeddings.documents), sources, root, wanted)
    predict, name = _of_pairs(config.cross_encoder, config.path)
    folder = _folder(root, name)
    teach_pairs(sources, folder, predict, on_progress)
    return Teacher(folder, pairs=True)


def _folder(root: Path, name: str) -> Path:
    """Where what a teacher says is kept; name: the fingerprint of what computes it."""
    return root / "teachers" / hashlib.blake2b(name.encode(), digest_size=8).hexdigest()


def _by_model(model: str, sources: Sequence[StoredSource], root: Path, wanted: bool, on_progress: Progress) -> Teacher:
    from cluster.embedding import vectors_at, workers_up
    from cluster.models.folder import fingerprint
    from cluster.models.reference import resolve

    ref = resolve(model, root)
    of_model = fingerprint(ref.folder)
    folder = _folder(root, of_model)
    for side in SIDES:
        tell = partial(on_progress, f"the teacher's {side} texts")

        def encoded(texts: TextTable, path: Path, side: Side = side, tell: partial[None] = tell) -> Vectors:
            return vectors_at(path, texts, side, ref.folder, of_model, workers_up(), tell)

        teach_vectors(sources, side, folder, encoded)
    return Teacher(folder, pairs=False, vectors=wanted)


def _by_embeddings(
    queries: Path, documents: Path, sources: Sequence[StoredSource], root: Path, wanted: bool
) -> Teacher:
    from data_services.embed import EmbeddedCorpus
    from data_services.embedding.corpus import MANIFEST

    opened = [EmbeddedCorpus.open(folder) for folder in (queries, documents)]
    for side, corpus in zip(SIDES, opened, strict=True):
        if corpus.field != side:
            told = f"{corpus.folder} has the vectors of {corpus.field} texts, not {side}"
            raise UsageError(f"data.teacher.embeddings: {told}")
    if opened[0].dimensions != opened[1].dimensions:
        widths = " and ".join(str(corpus.dimensions) for corpus in opened)
        raise UsageError(f"data.teacher.embeddings: vectors of {widths} dimensions are of two models; take one's")
    folder = _folder(root, "".join((corpus.folder / MANIFEST).read_text() for corpus in opened))
    for side, corpus in zip(SIDES, opened, strict=True):
        adopt_vectors(sources, side, folder, corpus)
    return Teacher(folder, pairs=False, vectors=wanted)


def _of_pairs(encoder: str | None, path: str | None) -> tuple[Predict, str]:
    """What scores pairs, and what it is made of: a folder's fingerprint, a hub's id, or a module's source."""
    if encoder is not None:
        from cluster.mining import cross_encoder
        from cluster.models.folder import fingerprint

        return cross_encoder(encoder, "data.teacher.cross_encoder"), (
            fingerprint(Path(encoder)) if Path(encoder).is_dir() else encoder
        )
    from data_services.imports import import_object

    assert path is not None
    predict = import_object(path, "data.teacher.path")
    module = sys.modules[predict.__module__]
    return predict, f"{path}\n{inspect.getsource(module)}"
