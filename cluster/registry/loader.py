"""MLflow's loader of an export with two towers, or with a vector for each token.

This file goes into the registered model and is imported there as `gyre_loader`, where gyre need not be installed: it
imports Sentence Transformers alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SIDES = ("document", "query")


class Embedder:
    """What `mlflow.pyfunc.load_model` wraps. predict(texts, params={"prompt_name": "query" | "document"}) gives vectors
    [n, D], or of token vectors a list of [m, D] lists, m tokens of each text."""

    def __init__(self, folder: Path) -> None:
        import sentence_transformers

        settings = json.loads((folder / "config_sentence_transformers.json").read_text())
        self._tokens = settings.get("model_type") == "MultiVectorEncoder"
        kind = "MultiVectorEncoder" if self._tokens else "SentenceTransformer"
        self._model = getattr(sentence_transformers, kind)(str(folder))

    def predict(self, texts: Any, params: Mapping[str, Any] | None = None) -> Any:
        """texts: a text, several, or a table whose first column they are."""
        side = (params or {}).get("prompt_name", SIDES[0])
        if side not in SIDES:
            raise ValueError(f"prompt_name is {side!r}: it is one of {', '.join(SIDES)}")
        encode = self._model.encode_query if side == "query" else self._model.encode_document
        vectors = encode(_listed(texts), convert_to_numpy=True)
        return [each.tolist() for each in vectors] if self._tokens else vectors


def _listed(texts: Any) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    column = texts.iloc[:, 0] if hasattr(texts, "iloc") else texts
    return [str(text) for text in column] if isinstance(column, Iterable) else [str(column)]


def _load_pyfunc(path: str) -> Embedder:
    """The name that MLflow calls."""
    return Embedder(Path(path))
