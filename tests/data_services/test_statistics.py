"""The figures of a source, against counting by hand."""

import json

import numpy as np
import pytest

from data_services.near_duplicates import find_duplicates
from data_services.schema import class_id
from data_services.sources import SourceConfig, open_source
from data_services.statistics import count_words, describe, percentiles

ROWS = [
    {"query": "a b", "positive": ["x y z"], "hard": ["n"], "lang": "en", "kind": 3},
    {"query": "a b", "positive": ["x y z"], "hard": [], "lang": "de", "kind": 3},
    {"query": "c", "positive": ["x y z", "ü"], "hard": ["n", "m o"], "lang": "en", "kind": None},
    {"query": "", "positive": ["x"], "hard": [], "lang": "en", "kind": 1},
]


def test_every_figure_is_what_counting_by_hand_gives(tmp_path):
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    keys = {"negatives": "hard", "language": "lang", "label": "kind", "task": "=search"}
    source = open_source(SourceConfig(path=str(tmp_path / "in.jsonl"), quarantine_share=1, **keys), tmp_path)
    found = describe(source, find_duplicates(source, "pair", None), {class_id("search"): "search"})
    assert found.rows == 3
    assert sum(found.quarantined.values()) == 1
    assert found.texts == {
        "query": {"texts": 3, "unique": 2},
        "positive": {"texts": 4, "unique": 2},
        "negative": {"texts": 3, "unique": 2},
    }
    assert found.a_row == {"positives": {1: 2, 2: 1}, "negatives": {0: 1, 1: 1, 2: 1}}
    assert found.classes == {
        "label": {"3": 2, "unknown": 1},
        "task": {"search": 3},
        "language": {"en": 2, "de": 1},
    }
    assert found.duplicates == {"exact": 1, "near": 0}
    assert found.contaminated is None
    assert found.lengths["query"]["characters"]["max"] == 3
    assert found.lengths["positive"]["characters"]["min"] == 1  # characters, not bytes
    assert found.lengths["positive"]["tokens"] == percentiles(np.array([3, 3, 3, 1]))
    assert [row["query"] for row in found.examples] == ["a b", "a b", "c"]
    assert json.dumps(found.as_dict())


def test_a_source_without_hard_negatives_has_no_lengths_of_them(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"query": "q", "positive": "p"}')
    source = open_source(SourceConfig(path=str(tmp_path / "in.jsonl"), quarantine_share=1), tmp_path)
    found = describe(source, find_duplicates(source), {}, lambda texts, side: np.full(len(texts), 7))
    assert set(found.lengths) == {"query", "positive"}
    assert found.lengths["query"]["tokens"]["99%"] == 7
    assert found.classes == {}


def test_percentiles_are_lengths_that_are_there():
    lengths = np.array([1, 2, 1000])
    assert set(percentiles(lengths).values()) <= {1.0, 2.0, 1000.0, lengths.mean()}
    assert percentiles(lengths)["50%"] == 2
    assert percentiles(np.array([4]))["mean"] == pytest.approx(4)
    assert count_words(["a  b", ""], "query").tolist() == [2, 0]
