"""Each way of training that a recipe can ask for, from the recipe to the scored export, on one worker without Ray."""

import json
import math
import re

import pytest
import yaml

from tests.e2e.conftest import mini_recipe, write_pairs

HERE = {"cluster": {"workers": 1, "threads_per_worker": 1}, "engine": {"zero_stage": 2, "precision": "fp32"}}
TOKENS = {"pooling": "tokens", "token_dim": 16, "token_dropout": 0.0}
VARIANTS = {
    "several losses": {
        "objective": {"temperature": {"start": 0.1}},
        "terms": [{"kind": "spread_out", "weight": {"start": 0.5, "end": 0.1}}, {"kind": "uniformity", "weight": 0.1}],
        "matryoshka": {"dims": [32, 16]},
    },
    "layers": {"model": {"layers": [0, 1]}, "layers": {}, "queue": {"rows": 0}},
    "masked LM": {"masked_lm": {"weight": 0.1}},
    "late interaction": {"model": TOKENS, "objective": {"similarity": "max_sim", "temperature": 1.0}},
    "late interaction without a queue": {
        "model": TOKENS,
        "objective": {"similarity": "max_sim", "temperature": 1.0},
        "queue": {"rows": 0},
    },
    "two towers": {"model": {"towers": "separate"}},
    "momentum on both sides": {
        "objective": {"positive_encoding": "momentum", "batch_negatives": "none"},
        "queue": {"rows": 64, "others": [{"name": "queries", "rows": 64}]},
    },
    "hardest of a queue that is full": {
        "objective": {"hardest_share": 0.5, "only_same": ["tasks"]},
        "queue": {"rows": 64, "start": "filled", "max_age_steps": 3},
        "momentum": {"decay": {"start": 0.5, "end": 1.0, "shape": "cosine"}, "dropout": True, "export": True},
    },
    "sigmoid": {
        "objective": {"kind": "sigmoid"},
        "engine": {"zero_stage": 3, "precision": "fp32", "reduction": "per_chunk"},
    },
    "packed": {"model": {"packing": "on"}},
    "unlabelled text with two crops": {
        "data": {
            "sources": [
                {
                    "path": "PAIRS",
                    "query": "positive",
                    "views": {
                        "query": [{"kind": "crop", "min_share": 0.3, "max_share": 0.7}],
                        "positive": [{"kind": "crop", "min_share": 0.3, "max_share": 0.7}, {"kind": "delete"}],
                    },
                }
            ]
        },
        "evaluation": {"pool": "PAIRS"},
    },
    "triplets": {"data": {"sources": [{"path": "TRIPLETS"}], "negatives": 2}, "evaluation": {"pool": "PAIRS"}},
    "a BEIR folder with mined negatives": {
        "data": {
            "sources": [{"path": "MINED", "id": "id", "positive": "positives", "negatives": "negatives"}],
            "negatives": 2,
        },
        "evaluation": {"pool": {"path": "PAIRS"}},
    },
}


def merged(base: dict, more: dict) -> dict:
    """`more` laid over `base`, section by section; a loss replaces a loss whole."""
    out = dict(base)
    for key, value in more.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict) and key != "objective"
        out[key] = merged(out[key], value) if nested else value
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def sources(pairs, tmp_path_factory):
    """What the recipes' names stand for: the pairs, the same as triplets, and as a BEIR folder that was mined."""
    from cluster.mining import MiningJob, mine
    from data_services.mining.filters import FilterConfig
    from data_services.sources import SourceConfig

    folder = tmp_path_factory.mktemp("sources")
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    others = [row["positive"] for row in rows[1:] + rows[:1]]
    triplets = [
        {"anchor": row["query"], "positive": row["positive"], "negative_1": near, "negative_2": far}
        for row, near, far in zip(rows, others, reversed(others), strict=True)
    ]
    (folder / "triplets.jsonl").write_text("\n".join(map(json.dumps, triplets)))
    beir = folder / "beir"
    (beir / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": "", "text": row["positive"]} for i, row in enumerate(rows)]
    queries = [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(rows)]
    (beir / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (beir / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(len(rows)))
    (beir / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    job = MiningJob("bm25", SourceConfig(path=str(beir)), folder / "mined", FilterConfig(negatives=2))
    assert mine(job, folder / "home").keys["positive"] == "positives"
    return {"PAIRS": str(pairs), "TRIPLETS": str(folder / "triplets.jsonl"), "MINED": str(folder / "mined")}


def trained(recipe, home):
    """A whole run in this process: (metrics by step, scores of the held-out split, what it finds in a corpus)."""
    from cluster.config import load_recipe
    from cluster.prepare import prepare
    from cluster.scoring import score_split
    from cluster.worker import Task, train_on_worker
    from data_services.stream import LocalStream
    from tests.e2e.commands import steps_in

    ready = prepare(load_recipe(recipe), home, None)
    task = Task(ready.recipe, ready.run, ready.plan.steps, ready.lineage())
    by_field = ready.recipe.model.towers == "separate"
    stream = LocalStream(ready.reader, 1, 0, ready.recipe.engine.budget_tokens, by_field)
    assert train_on_worker(task, stream) == ready.plan.steps
    scored = score_split(ready.recipe, ready.run, "heldout", ready.pools["heldout"])
    return steps_in(ready.run.metrics), scored.rows, searched(ready.run.run_id, home)


CORPUS = {"first.txt": "abc def ghi", "second.txt": "sum of squares", "third.txt": "read a file", "fourth.txt": "x"}


def searched(run, home):
    """Of a copy of the run's export: its hits when it embeds the corpus and when it finds the vectors, and each
    document's similarity by definition."""
    from cluster.models import export, open_encoder, query

    corpus, asked = home / "corpus", "how to read a file"
    corpus.mkdir()
    for name, text in CORPUS.items():
        (corpus / name).write_text(text)
    model = export(run, home / "exported", home).folder
    found = [query(asked, str(model), str(corpus), k=3, root=home) for _ in range(2)]
    with open_encoder(model) as encoder:
        encode = encoder.encode_tokens if encoder.gives_tokens else encoder.encode
        (one,), documents = encode([asked], "query"), encode(list(CORPUS.values()), "document")
    similar = [max_sim(one, document) if encoder.gives_tokens else float(one @ document) for document in documents]
    return *(result.hits for result in found), dict(zip(CORPUS, similar, strict=True))


def max_sim(query, document):
    return float(sum(max(token @ other for other in document) for token in query))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_exports_and_is_scored(gloo, pairs, sources, tmp_path, variant):
    base = mini_recipe(pairs) | {"name": "variant"}
    base = merged(base, {"data": {"steps": 6}, "checkpoint": {"every_steps": 6}, **HERE})
    path = tmp_path / "recipe.yaml"
    text = yaml.safe_dump(merged(base, VARIANTS[variant]))
    path.write_text(re.sub("PAIRS|TRIPLETS|MINED", lambda name: sources[name[0]], text))
    ((steps, rows, (hits, again, similar)),) = gloo(1, trained, path, tmp_path / "home")
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps[1:])
    assert all(0 <= rows["trained"][metric] <= 1 for metric in rows["trained"])
    assert hits == again
    best = sorted(similar, key=similar.get, reverse=True)[:3]
    assert {hit.name: hit.score for hit in hits} == pytest.approx({name: similar[name] for name in best}, abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
