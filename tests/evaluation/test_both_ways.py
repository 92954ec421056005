"""Pairs of two kinds: the way back, classes by prompts, and what pixels alone find."""

import numpy as np
import pytest

from data_services.schema import UsageError
from evaluation.both_ways import every_way, pixel_rows, reversed_relevance
from evaluation.retrieval import EvaluationConfig

ANIMALS = ["cat", "dog", "eel", "fox"]
CONFIG = EvaluationConfig(k=2, both_ways=True, prompts=["a {}", "the {}"])


class Letters:
    """An encoder whose vector of a text is where its last word stands among the animals; a document's is shifted."""

    def __init__(self, confused: dict[str, str] | None = None) -> None:
        self.confused = confused or {}
        self.asked: list[tuple[str, int]] = []

    def encode(self, texts, field):
        self.asked.append((field, len(texts)))
        words = [text.split()[-1].removesuffix(".png") for text in texts]
        words = [self.confused.get(word, word) if field == "document" else word for word in words]
        return np.eye(len(ANIMALS), dtype=np.float32)[[ANIMALS.index(word) for word in words]]


def test_a_model_is_scored_there_back_and_by_prompts():
    documents = [f"{animal}.png" for animal in [*ANIMALS, "cat"]]
    relevant = [{0: 1, 4: 1}, {1: 1}, {2: 1}, {3: 1}]
    encoder = Letters(confused={"fox": "dog"})
    rows = every_way("trained", encoder, ANIMALS, documents, relevant, CONFIG)
    assert list(rows) == ["trained", "trained back", "trained by prompts"]
    assert rows["trained"].metrics["recall@1"] == pytest.approx((0.5 + 1 + 1 + 0) / 4)
    assert rows["trained back"].metrics["recall@1"] == pytest.approx(4 / 5)  # the fox is taken for a dog
    assert rows["trained by prompts"].metrics["recall@1"] == pytest.approx(4 / 5)
    assert ("query", 4) in encoder.asked
    alone = every_way("trained", Letters(), ANIMALS, documents, relevant, EvaluationConfig(k=2))
    assert list(alone) == ["trained"]


def test_relevance_is_turned_and_a_document_that_answers_nothing_is_refused():
    with pytest.raises(UsageError, match="document 1 answers no query"):
        reversed_relevance([{0: 1, 2: 1}, {0: 1}], 3)
    assert reversed_relevance([{0: 3, 2: 1}, {0: 2}, {1: 1}], 3) == [{0: 3, 1: 2}, {2: 1}, {0: 1}]


def test_pixels_find_what_a_known_picture_of_a_like_name_shows():
    shapes = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    known, pictures = ["red cat", "red dog", "red eel"], shapes + 5
    noisy = shapes[[2, 0]] * 3 + 1  # brighter and of more contrast, the same shapes
    rows = pixel_rows(
        ["blue eel", "blue cat"], noisy, [{0: 1}, {1: 1}], known, pictures, EvaluationConfig(k=1, both_ways=True)
    )
    assert rows["nearest pixels"].metrics["recall@1"] == 1.0
    assert rows["nearest pixels back"].metrics["recall@1"] == 1.0
    unknown = pixel_rows(["nothing", "blue cat"], noisy, [{0: 1}, {1: 1}], known, pictures, EvaluationConfig(k=1))
    assert unknown["nearest pixels"].metrics["recall@1"] == 0.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"prompts": ["a picture"]}, "needs {} once"), ({"recall_at": [20]}, "goes beyond 1 … k = 10")],
)
def test_settings_that_make_no_sense_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**keys)


def test_cutoffs_of_recall_stand_in_order():
    assert EvaluationConfig(recall_at=[5]).metrics == ("ndcg@10", "mrr@10", "recall@1", "recall@5", "recall@10")
