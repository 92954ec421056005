"""What can be measured of a model's folder alone: its size, speed, file types, and whether it is what was trained."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from cluster.model_card import licence_of
from evaluation.gates import ModelFacts

# Of several lengths and kinds; one is cut at any model's length.
PROBES = (
    "how to read a file",
    "",
    "Grüße aus Köln – 東京 🙂",
    "def read(path):\n    return open(path).read()",
    "one word after another " * 400,
)
_TIMED = " ".join(f"word{i}" for i in range(32))
_WARM_UP, _REPEATS = 5, 50
_PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}


def measure(folder: Path, latency: bool = False, parity: bool = False) -> ModelFacts:
    """The facts of an exported folder; what needs the model to be loaded only where it is asked for."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return ModelFacts(
        size_mb=sum(p.stat().st_size for p in files) / 1e6,
        safetensors=sum(p.suffix == ".safetensors" for p in files),
        pickles=tuple(str(p.relative_to(folder)) for p in files if is_pickle(p)),
        licence=licence_of(folder),
        latency_p95_ms=latency_p95_ms(folder) if latency else None,
        export_parity=export_parity(folder) if parity else None,
    )


def is_pickle(path: Path) -> bool:
    """By its name, or by the first bytes that a pickle, or torch's archive of one, begins with."""
    if path.suffix in _PICKLED:
        return True
    with path.open("rb") as file:
        head = file.read(4)
    return (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 1) or head == b"PK\x03\x04"


def latency_p95_ms(folder: Path) -> float:
    """95th percentile of the milliseconds that one text of 32 words takes, one at a time, on this machine."""
    from cluster.embedding import load_encoder

    encoder = load_encoder(folder, "query")
    taken: list[float] = []
    for _ in range(_WARM_UP + _REPEATS):
        began = time.perf_counter()
        encoder.encode([_TIMED], "query")
        taken.append(1000 * (time.perf_counter() - began))
    return float(np.quantile(taken[_WARM_UP:], 0.95))


def export_parity(folder: Path) -> float:
    """The largest difference of an element between gyre's vectors of PROBES and Sentence Transformers', both fields."""
    from cluster.models.folder import exported_encoder

    ours, theirs = exported_encoder(folder), _sentence_transformer(folder)
    apart = 0.0
    for field, encode in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        if getattr(ours, "gives_tokens", False):
            found = ours.encode_tokens(PROBES, field)  # type: ignore[attr-defined]
        else:
            found = list(ours.encode(PROBES, field))
        for mine, other in zip(found, encode(list(PROBES), convert_to_numpy=True), strict=True):
            if mine.shape != np.shape(other):
                return float("inf")
            apart = max(apart, float(np.abs(mine - np.asarray(other)).max(initial=0.0)))
    return apart


def _sentence_transformer(folder: Path) -> Any:
    import sentence_transformers

    from trainers.encoders.spec import ModelSpec
    from trainers.encoders.towers import Layout

    layout = Layout.load(folder)
    spec = ModelSpec.load(folder / next(iter(layout.towers.values())) if layout else folder)
    trusted = spec.trust_remote_code or spec.latent is not None  # latent attention's code is ours
    kind = "MultiVectorEncoder" if spec.pooling == "tokens" else "SentenceTransformer"
    return getattr(sentence_transformers, kind)(str(folder), device="cpu", trust_remote_code=trusted)
