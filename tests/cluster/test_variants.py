"""Each way of training that a recipe can ask for, from the recipe to the scored export, on one worker without Ray."""

import math

import pytest
import yaml

from tests.e2e.conftest import mini_recipe, write_pairs

HERE = {"cluster": {"workers": 1, "threads_per_worker": 1}, "engine": {"zero_stage": 2, "precision": "fp32"}}
TOKENS = {"pooling": "tokens", "token_dim": 16, "token_dropout": 0.0}
TAUGHT = {"objective": {"kind": "kl_distill"}, "terms": [{"kind": "contrastive"}]}
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


def trained(recipe, home):
    """A whole run in this process: (metrics by step, scores of the held-out split, what it finds in a corpus)."""
    from cluster.config import load_recipe
    from cluster.evidence.scoring import score_split
    from cluster.prepare import prepare
    from cluster.worker import Task, train_on_worker
    from data_services.stream import LocalStream
    from tests.e2e.commands import steps_in

    ready = prepare(load_recipe(recipe), home, None)
    task = Task(ready.recipe, ready.run, ready.plan.steps, ready.lineage())
    stream = LocalStream(ready.reader, 1, 0, ready.recipe.engine.budget_tokens)
    assert train_on_worker(task, stream) == ready.plan.steps
    scored = score_split(ready.recipe, ready.run, "heldout", ready.pools["heldout"], ready.sources[0])
    return steps_in(ready.run.metrics), scored.rows, searched(ready.run.run_id, home)


CORPUS = {"first.txt": "abc def ghi", "second.txt": "sum of squares", "third.txt": "read a file", "fourth.txt": "x"}


def searched(run, home):
    """Of a copy of the run's export: its hits when it embeds the corpus and when it finds the vectors, and each
    document's similarity by definition."""
    from cluster.models import export, open_encoder, query

    corpus, asked = home / f"corpus-{run}", "how to read a file"
    corpus.mkdir()
    for name, text in CORPUS.items():
        (corpus / name).write_text(text)
    model = export(run, home / f"exported-{run}", home).folder
    found = [query(asked, str(model), str(corpus), k=3, root=home) for _ in range(2)]
    with open_encoder(model) as encoder:
        encode = encoder.encode_tokens if encoder.gives_tokens else encoder.encode
        (one,), documents = encode([asked], "query"), encode(list(CORPUS.values()), "document")
    similar = [max_sim(one, document) if encoder.gives_tokens else float(one @ document) for document in documents]
    return *(result.hits for result in found), dict(zip(CORPUS, similar, strict=True))


def max_sim(query, document):
    return float(sum(max(token @ other for other in document) for token in query))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_exports_and_is_scored(gloo, pairs, tmp_path, variant):
    check_trains(gloo, pairs, VARIANTS[variant], tmp_path)


def check_trains(gloo, pairs, variant, tmp_path):
    """A whole run of the small recipe with that variant; returns its home."""
    base = mini_recipe(pairs) | {"name": "variant"}
    base = merged(base, {"data": {"steps": 6}, "checkpoint": {"every_steps": 6}, **HERE})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(merged(base, variant)))
    ((steps, rows, (hits, again, similar)),) = gloo(1, trained, path, tmp_path / "home")
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps[1:])
    assert all(0 <= rows["trained"][metric] <= 1 for metric in rows["trained"])
    assert hits == again
    best = sorted(similar, key=similar.get, reverse=True)[:3]
    assert {hit.name: hit.score for hit in hits} == pytest.approx({name: similar[name] for name in best}, abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    return tmp_path / "home"


def score(queries, documents):
    """A teacher of pairs: words in common."""
    return [len(set(q.split()) & set(d.split())) for q, d in zip(queries, documents, strict=True)]


def test_a_run_teaches_the_next_one_by_vectors_and_a_function_by_scores(gloo, pairs, tmp_path):
    home = check_trains(
        gloo, pairs, {"data": {"teacher": {"path": f"{__name__}:score"}, "positives": 1}, **TAUGHT}, tmp_path
    )
    (export,) = home.glob("*/export")
    losses = {
        "objective": {"kind": "similarity_distill", "teacher": "data"},
        "terms": [{"kind": "embedding_distill", "teacher": "data"}, {"kind": "contrastive"}],
    }
    check_trains(gloo, pairs, {"data": {"teacher": {"model": str(export)}}, **losses}, tmp_path)
    kept = sorted(path.name for path in home.glob("teachers/*/*"))
    assert kept == ["document", "pair", "query"]
    parts = {path: path.stat().st_mtime_ns for path in home.glob("teachers/*/*/part-*")}
    check_trains(gloo, pairs, {"data": {"teacher": {"model": str(export)}}, **losses, "seed": 1}, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in home.glob("teachers/*/*/part-*")} == parts, (
        "nothing is computed again"
    )
