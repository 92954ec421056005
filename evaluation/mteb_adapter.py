"""mteb's own tasks with our model: `--suite mteb:TASK,…`. mteb loads its data and writes its result files.

Needs `pip install mteb`. What a model exported by gyre is to mteb without this file, a Sentence Transformers folder,
has the same scores wherever the texts get the same prompts: mteb gives a text of a symmetric task no prompt of ours.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_services.schema import Encoder, RunError, UsageError
from evaluation.stored import TaskResult
from evaluation.vectors import encode

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.models.model_meta import ModelMeta
    from torch import Tensor

PREFIX = "mteb:"
MAIN = "main_score"


class MtebModel:
    """An `Encoder` as mteb asks for one (its EncoderProtocol). name, revision: of its result files."""

    def __init__(self, encoder: Encoder, name: str, revision: str) -> None:
        if getattr(encoder, "gives_tokens", False):
            raise UsageError("mteb tasks need one vector a text; this model has one for each token")
        self._encoder, self._name, self._revision = encoder, name, revision

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **_: Any,
    ) -> np.ndarray:
        """[n, D] float32. inputs: batches with "text" [n]; documents of retrieval as documents, all else as queries."""
        side = "document" if prompt_type is not None and prompt_type.value == "document" else "query"
        return encode(self._encoder, [text for batch in inputs for text in batch["text"]], side)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """[n, m] inner products: cosines, where the model gives vectors of length 1."""
        a, b = _tensors(embeddings1, embeddings2)
        return a @ b.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """[n] inner products of the rows."""
        a, b = _tensors(embeddings1, embeddings2)
        return (a * b).sum(-1)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        similarity = ScoringFunction("cosine" if getattr(self._encoder, "unit_vectors", True) else "dot")
        told = {"name": self._name, "revision": self._revision, "similarity_fn_name": similarity}
        return ModelMeta.create_empty(overwrites=told)


def tasks_named(names: Sequence[str]) -> list[AbsTask]:
    """mteb's tasks. UsageError where mteb isn't installed, or has no such task, with the nearest name."""
    try:
        import mteb
    except ImportError as error:
        raise UsageError("--suite mteb:… needs the package mteb: pip install mteb") from error
    known = [task.metadata.name for task in mteb.get_tasks()]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UsageError(f"mteb has no task {name!r}: did you mean {near}?")
    return [mteb.get_task(name) for name in names]


def score(model: MtebModel, tasks: Sequence[AbsTask], folder: Path) -> dict[str, TaskResult]:
    """Runs the tasks; mteb's result files go to `folder`. {task: its scores, means over its splits and subsets}.

    RunError where a task's data can't be had.
    """
    import mteb

    results = {}
    cache = mteb.ResultCache(folder)
    for task in tasks:
        name = task.metadata.name
        try:
            task.load_data()
        except (OSError, ValueError) as error:  # what the hub, the network and `datasets` raise
            raise RunError(
                f"mteb's task {name} can't load its data: {(str(error) or repr(error)).splitlines()[0]}"
            ) from error
        (found,) = mteb.evaluate(
            model,  # type: ignore[arg-type]
            task,
            cache=cache,
            overwrite_strategy="always",
            show_progress_bar=False,
            co2_tracker=False,
        ).task_results
        task.unload_data()
        scores = [subset for subsets in found.scores.values() for subset in subsets]
        results[name] = TaskResult(
            kind=f"mteb {task.metadata.type}",
            main=MAIN,
            metrics={MAIN: float(found.get_score()), **_means(scores)},
            counts={"subsets": len(scores)},
        )
    return results


def fingerprint(tasks: Sequence[AbsTask]) -> str:
    """Of the tasks and the revisions of their data, with mteb's version: what decides the scores beside the model."""
    from importlib.metadata import version

    told = [version("mteb"), *([task.metadata.name, task.metadata.dataset.get("revision")] for task in tasks)]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def _means(scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers that all subsets have, but the main one."""
    shared = set.intersection(*(set(subset) for subset in scores)) - {MAIN}
    numbers = [key for key in scores[0] if key in shared and all(_is_number(subset[key]) for subset in scores)]
    return {key: float(np.mean([subset[key] for subset in scores])) for key in numbers}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and bool(np.isfinite(float(value)))


def _tensors(*vectors: Any) -> list[Tensor]:
    import torch

    return [torch.as_tensor(v, dtype=torch.float32) for v in vectors]
