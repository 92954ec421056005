"""What a report shows of a model: similarities, the queries it answers best and worst, what items look like."""

import base64
import io

import numpy as np
import pytest

from data_services.schema import Media
from evaluation.excerpts import CHARACTERS, SIDE, excerpt
from evaluation.look import BINS, Look, histogram, look
from evaluation.retrieval import evaluate_encoder
from evaluation.vectors import Remembered
from tests.evaluation.worlds import Table, random_table

QUERIES, DOCUMENTS = [f"q{i}" for i in range(30)], [f"d{i}" for i in range(40)]
RELEVANT = [{i, (7 * i) % 40} for i in range(30)]


def unit(seed, count):
    vectors = np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_similarities_are_counted_as_one_by_one():
    queries, documents = unit(0, 30), unit(1, 40)
    found = histogram(queries, documents, RELEVANT)
    pairs, others = [], []
    for i, row in enumerate(queries @ documents.T):
        for j, cosine in enumerate(row):
            (pairs if j in RELEVANT[i] else others).append(cosine)
    for cosines, counts in ((pairs, found.positives), (others, found.negatives)):
        assert counts == np.histogram(cosines, BINS, (-1, 1))[0].tolist()


def test_of_many_vectors_some_are_drawn_and_nothing_else_changes(monkeypatch):
    queries, documents = unit(0, 30), unit(1, 40)
    monkeypatch.setattr("evaluation.geometry.MOST_VECTORS", 10)
    found = histogram(queries, documents, RELEVANT)
    assert sum(found.positives) + sum(found.negatives) == 100


@pytest.fixture
def seen():
    """A model that knows the even queries' documents, and takes every odd query for document 39."""
    vectors = {f"d{i}": row for i, row in enumerate(np.eye(40))}
    vectors |= {f"q{i}": vectors[f"d{i}"] if i % 2 == 0 else vectors["d39"] + 0.01 * i for i in range(30)}
    models = {"untrained": random_table([*QUERIES, *DOCUMENTS]), "trained": Table(vectors)}
    answers = [{i} for i in range(30)]
    kept = {name: Remembered(model) for name, model in models.items()}
    scores = {name: evaluate_encoder(model, QUERIES, DOCUMENTS, answers, 5) for name, model in kept.items()}
    return models, look({n: (kept[n], scores[n]) for n in models}, QUERIES, DOCUMENTS, answers, "ndcg@5")


def test_the_best_and_worst_queries_stand_with_their_hits(seen):
    _, found = seen
    assert all(int(example.query.text[1:]) % 2 == 0 for example in found.best)
    assert [(e.score, e.place, e.hits[0].right) for e in found.best] == [(1.0, 1, True)] * 5
    for example in found.worst:
        assert int(example.query.text[1:]) % 2 == 1
        assert (example.score, example.place) == (0.0, None)
        assert example.answer.text == f"d{example.query.text[1:]}"
        assert (example.hits[0].item.text, example.hits[0].right) == ("d39", False)
    assert found.best[0].hits[0].similarity == pytest.approx(1.0)


def test_a_look_is_read_as_it_was_written_and_nothing_is_encoded_twice(seen):
    models, found = seen
    assert Look.model_validate_json(found.model_dump_json()) == found
    assert set(found.similarities) == set(found.geometry) == {"untrained", "trained"}
    assert {"modality_gap", "uniformity_queries", "uniformity_documents"} <= set(found.geometry["trained"])
    assert sorted(models["trained"].asked) == sorted([*QUERIES, *DOCUMENTS])


def test_one_query_is_best_and_none_is_worst():
    table = Remembered(random_table(["q", "d"]))
    scores = evaluate_encoder(table, ["q"], ["d"], [{0}], 1)
    found = look({"trained": (table, scores)}, ["q"], ["d"], [{0}], "ndcg@1")
    assert (len(found.best), len(found.worst)) == (1, 0)


class Tokens:
    """Two vectors for each text: the same for all but the first document."""

    gives_tokens, unit_vectors = True, True

    def encode_tokens(self, texts, field):
        return [np.eye(2, dtype=np.float32) * (2 if text == "d0" else 1) for text in texts]


def test_token_vectors_have_examples_and_no_cosines():
    model = Remembered(Tokens())
    scores = evaluate_encoder(model, ["q0", "q1"], ["d0", "d1"], [{0}, {1}], 2)
    found = look({"trained": (model, scores)}, ["q0", "q1"], ["d0", "d1"], [{0}, {1}], "ndcg@2")
    assert (found.similarities, found.geometry) == ({}, {})
    assert found.best[0].query.text == "q0"
    assert found.best[0].hits[0].similarity is None


def png(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_an_excerpt_is_short_whatever_it_is_of():
    from PIL import Image

    assert excerpt("  a text ").text == "a text"
    assert len(excerpt("x" * 10_000).text) == CHARACTERS
    shown = excerpt(Media("image", png(np.full((300, 600, 3), 7, np.uint8))))
    picture = Image.open(io.BytesIO(base64.b64decode(shown.picture)))
    assert picture.size == (SIDE, SIDE // 2)
    assert picture.convert("RGB").getpixel((1, 1)) == (7, 7, 7)
    assert excerpt(Media("audio", b"12345")).text == "audio, 5 bytes"
    parts = excerpt({"title": "a title", "photo": Media("image", png(np.zeros((9, 9, 3), np.uint8)))})
    assert parts.text == "title: a title"
    assert parts.picture
