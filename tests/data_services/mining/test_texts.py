"""The text table: unique, in first-come order, read anywhere; positives over all rows of a query."""

import numpy as np

from data_services.mining import texts as module
from data_services.mining.texts import plain_id, positives_of, write_texts
from data_services.schema import Column, text_id
from tests.data_services.mining.worlds import random_world, source


def test_texts_are_unique_and_stand_where_they_first_come(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 7)
    rows, _ = random_world(0, 60)
    stored = source(tmp_path, rows)
    table = write_texts(tmp_path / "t.arrow", [stored], [Column.QUERY])
    expected = list(dict.fromkeys(query for query, _, _ in rows))
    assert table.read(0, len(table))[1] == expected
    assert table.ids.tolist() == [text_id(t) for t in expected]
    assert table.plain_ids.tolist() == [plain_id(t) for t in expected]
    some = np.random.default_rng(0).integers(0, len(table), 50)
    assert table.take(some) == [expected[i] for i in some]
    assert table.take(np.zeros(0, int)) == []
    assert np.array_equal(table.positions(table.ids[some]), some)


def test_documents_are_positives_and_negatives_of_every_source(tmp_path):
    first = source(tmp_path / "a", [("q", ["p", "r"], ["n"]), ("q2", ["p"], [])])
    second = source(tmp_path / "b", [("other", ["r", "c"], [])])
    table = write_texts(tmp_path / "t.arrow", [first, second], [Column.POSITIVES, Column.NEGATIVES])
    assert table.read(0, 9)[1] == ["p", "r", "n", "c"]


def test_positives_are_those_of_all_rows_of_a_query(tmp_path):
    rows, _ = random_world(1, 40)
    stored = source(tmp_path, rows)
    queries = write_texts(tmp_path / "q.arrow", [stored], [Column.QUERY])
    documents = write_texts(tmp_path / "d.arrow", [stored], [Column.POSITIVES, Column.NEGATIVES])
    lists, most = positives_of(stored, queries, documents)
    listed: dict[str, list[str]] = {}
    for query, positives, _ in rows:
        listed.setdefault(query, []).extend(positives)
    for i, query in enumerate(queries.read(0, len(queries))[1]):
        part = lists.part(i, i + 1)
        assert set(documents.take(part.values)) == set(listed[query])
        assert part.owners.tolist() == [0] * len(set(listed[query]))
    assert most == max(len(p) for p in listed.values())


def test_the_fingerprint_is_of_texts_and_order(tmp_path):
    tables = [
        write_texts(tmp_path / f"{i}.arrow", [source(tmp_path / str(i), rows)], [Column.QUERY])
        for i, rows in enumerate(([("a", ["p"], []), ("b", ["p"], [])], [("b", ["p"], []), ("a", ["p"], [])]))
    ]
    assert tables[0].fingerprint != tables[1].fingerprint


def test_plain_texts_are_equal_but_for_case_spacing_and_forms_of_a_character():
    assert plain_id("The  ﬁrst\tOne ") == plain_id("the first one")
    assert plain_id("the first one") != plain_id("the first, one")
