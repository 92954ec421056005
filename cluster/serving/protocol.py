"""OpenAI's `/v1/embeddings`: a request checked, a response written, an error in the form that its clients read.

    {"input": "text" or ["text", …], "model": NAME, "encoding_format": "float" or "base64", "dimensions": 256,
     "input_type": "query" or "document", "user": …}

`input_type` is ours: which of the model's prompts goes before the texts; "document" where it is left out.
"""

from __future__ import annotations

import base64
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

KEYS = ("input", "model", "encoding_format", "dimensions", "input_type", "user")
FIELDS = ("document", "query")


@dataclass(frozen=True)
class Limits:
    """What a request may hold. Longer texts than the model reads are refused too, not cut."""

    max_body_bytes: int = 4_000_000
    max_texts: int = 256


@dataclass(frozen=True)
class Asked:
    """A request that may be answered. dimensions: the prefix of each vector to keep, None: all of it."""

    texts: tuple[str, ...]
    field: str
    as_base64: bool
    dimensions: int | None


class BadRequest(Exception):
    """What is wrong with a request: its HTTP status, a sentence, the key it is about, and a code for machines."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = "authentication_error" if self.status == 401 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def parse(body: bytes, limits: Limits, names: Sequence[str], dimensions: int) -> Asked:
    """The request in `body`. names: by which the model may be asked for; dimensions: D of its vectors.

    Raises BadRequest: 400, and 404 for a model that isn't served here.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(request, dict):
        raise BadRequest(400, "the body is no JSON object", code="invalid_json")
    for key in request:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            raise BadRequest(
                400, f"unknown key {key!r}; {f'did you mean {near[0]}?' if near else f'known: {KEYS}'}", key
            )
    if request.get("model") not in (None, *names):
        told = f"model {request['model']!r} is not served here; {names[0]} is"
        raise BadRequest(404, told, "model", "model_not_found")
    return Asked(
        _texts(request.get("input"), limits),
        _choice(request, "input_type", FIELDS),
        _choice(request, "encoding_format", ("float", "base64")) == "base64",
        _prefix(request.get("dimensions"), dimensions),
    )


def response(asked: Asked, vectors: np.ndarray, tokens: int, model: str) -> bytes:
    """The answer as JSON. vectors [n, D] float32; kept prefixes have length one again."""
    if asked.dimensions is not None and asked.dimensions < vectors.shape[1]:
        vectors = vectors[:, : asked.dimensions]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return json.dumps(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": _written(row, asked.as_base64)}
                for i, row in enumerate(vectors)
            ],
            "model": model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        },
        separators=(",", ":"),
    ).encode()


def _written(row: np.ndarray, as_base64: bool) -> str | list[float]:
    return base64.b64encode(row.astype("<f4").tobytes()).decode() if as_base64 else row.tolist()


def _texts(given: Any, limits: Limits) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts:
        raise BadRequest(400, "input must be a text or a list of at least one text", "input")
    if len(texts) > limits.max_texts:
        raise BadRequest(400, f"input has {len(texts)} texts, {limits.max_texts} at most are taken at once", "input")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise BadRequest(400, f"input[{i}] is {type(text).__name__}; this server takes texts, not tokens", "input")
        if not text:
            raise BadRequest(400, f"input[{i}] is empty", "input")
    return tuple(texts)


def _choice(request: dict[str, Any], key: str, choices: Sequence[str]) -> str:
    chosen = request.get(key) or choices[0]
    if chosen not in choices:
        raise BadRequest(400, f"{key} is {chosen!r}; it must be {' or '.join(choices)}", key)
    return str(chosen)


def _prefix(given: Any, dimensions: int) -> int | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= dimensions:
        raise BadRequest(400, f"dimensions is {given!r}; the model's vectors have {dimensions}", "dimensions")
    return given
