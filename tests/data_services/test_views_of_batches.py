"""What a batch shows of its sources through their views."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_services.assemble import SOURCE_SHIFT, tokenise
from data_services.schema import Column
from data_services.sources import SourceConfig
from data_services.views.config import Views
from data_services.views.pairs import Context, Neighbours
from data_services.views.spelling import Substitute, Typos
from data_services.views.words import Crop, Delete, Reorder, Repeat
from tests.data_services.test_assemble import Characters, read
from tests.data_services.test_views import SENTENCES, TEXTS, units

DOCUMENTS = ["alpha beta gamma delta epsilon zeta", "one two three four five six seven"]
TEXTS_ALONE = pa.table(
    {
        Column.QUERY: DOCUMENTS,
        Column.POSITIVES: [[text] for text in DOCUMENTS],
        Column.NEGATIVES: [["no no no"], ["never ever"]],
        Column.QUERY_ID: [1, 2],
        Column.POSITIVE_IDS: [[1], [2]],
        Column.NEGATIVE_IDS: [[3], [4]],
    }
)
ROWS = np.array([5, 1 << SOURCE_SHIFT | 5])


def batch(views, table=TEXTS_ALONE, rows=ROWS, step=1, seed=0):
    made = tokenise(table, rows, Characters(), step, seed, negatives=1, views=views)
    return made, [text[1:] for text in read(made.queries)], [text[1:] for text in read(made.documents)]


CROPS = Views(query=[Crop(min_share=0.3)], positive=[Crop(min_share=0.3), Delete(rate=0.3)], negatives=[Delete()])


def test_a_batch_shows_the_views_of_each_source_and_keeps_the_ids_of_the_texts():
    made, queries, documents = batch([CROPS, None])
    assert queries[0] in DOCUMENTS[0]
    assert queries[0] != DOCUMENTS[0]
    assert set(documents[0].split()) < set(DOCUMENTS[0].split())
    assert queries[1] == documents[1] == DOCUMENTS[1]
    assert documents[2] in ("no no no", "no no", "no")
    assert made.query_ids.tolist() == [1, 2]
    assert made.document_ids.tolist() == [1, 2, 3, 4]
    plain, queries, documents = batch(())
    assert queries == documents[:2] == DOCUMENTS
    np.testing.assert_array_equal(plain.document_ids, made.document_ids)


def test_views_are_drawn_by_seed_step_row_and_side():
    long = TEXTS_ALONE.set_column(0, Column.QUERY, [TEXTS[6:7] * 2])
    long = long.set_column(1, Column.POSITIVES, [[TEXTS[6:7]] * 2]).set_column(4, Column.POSITIVE_IDS, [[[1], [1]]])
    views = [Views(query=[Crop()], positive=[Crop()])] * 2
    seen = {tuple(batch(views, long, step=t, seed=s)[1]) for t in range(3) for s in range(3)}
    assert len(seen) == 9
    _, queries, documents = batch(views, long)
    assert len({*queries, *documents[:2]}) == 4  # two sources, two sides, all of one text
    _, again, _ = batch(views, long.take([1]), ROWS[1:])
    assert again == queries[1:]


def test_documents_of_one_record_are_drawn_each_by_itself():
    table = TEXTS_ALONE.set_column(2, Column.NEGATIVES, [[TEXTS[6:7] * 3, []]])
    table = table.set_column(5, Column.NEGATIVE_IDS, [[[7, 8, 7], []]])
    made = tokenise(table, ROWS, Characters(), 1, 0, negatives=3, views=[Views(negatives=[Delete(rate=0.5)]), None])
    first, second, third = read(made.documents)[2:]
    assert first == third != second


def test_a_pair_view_comes_before_the_others_of_each_side():
    table = TEXTS_ALONE.set_column(0, Column.QUERY, [SENTENCES[3:5]])
    table = table.set_column(1, Column.POSITIVES, [[[text] for text in SENTENCES[3:5]]])
    views = Views(pair=Neighbours(), positive=[Substitute(rate=1, synonyms={"a": ["A"]})])
    _, queries, documents = batch([views, views], table)
    for text, query, positive in zip(SENTENCES[3:5], queries, documents, strict=False):
        assert query in text
        assert positive.replace("A", "a") in text
        assert abs(units(query)[0] - units(positive.replace("A", "a"))[0]) == 1


@given(st.permutations(range(6)), st.integers(1, 5))
@settings(max_examples=20)
def test_a_row_is_shown_the_same_whatever_else_is_in_the_batch(order, count):
    table = pa.table(
        {
            Column.QUERY: TEXTS[:6],
            Column.POSITIVES: [[text, text + " more"] for text in TEXTS[:6]],
            Column.NEGATIVES: [[f"no {text}"] for text in TEXTS[:6]],
            Column.QUERY_ID: range(6),
            Column.POSITIVE_IDS: [[i, i + 10] for i in range(6)],
            Column.NEGATIVE_IDS: [[i + 20] for i in range(6)],
        }
    )
    views = [Views(query=[Typos(rate=0.5)], positive=[Reorder()], negatives=[Repeat()])]
    part = np.array(order[:count])
    whole, some = batch(views, table, np.arange(6)), batch(views, table.take(part), part)
    assert some[1] == [whole[1][i] for i in part]
    assert some[2] == [whole[2][i] for i in [*part, *(6 + part)]]


def test_wrong_views_are_refused_with_what_to_do():
    def config(**views):
        return SourceConfig(path="x", query="text", positive="text", views=views)

    assert config(query=[{"kind": "crop", "min_share": 0.1}]).views.query == [Crop(min_share=0.1)]
    assert config(pair={"kind": "context", "unit": "line"}).views.pair == Context(unit="line")
    with pytest.raises(ValidationError, match="name one field as both"):
        SourceConfig(path="x", views={"pair": {"kind": "neighbours"}})
    with pytest.raises(ValidationError, match="needs `negatives`"):
        config(negatives=[{"kind": "delete"}])
    with pytest.raises(ValidationError, match=r"min_share \(0.5\) is above max_share \(0.2\)"):
        config(query=[{"kind": "crop", "min_share": 0.5, "max_share": 0.2}])
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        config(query=[{"kind": "crops"}])
