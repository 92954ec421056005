"""Which documents of its records a batch shows, and what it knows of them, against a naive twin."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.assemble import choose_documents, choose_positive, tokenise
from data_services.schema import UNKNOWN, Column, Ragged


class Characters:
    """A text's tokens are its characters, after the field's first letter, and an exclamation mark in task 5."""

    def __call__(self, texts, field, tasks=None):
        prompts = [field[0] + "!" * (task == 5) for task in tasks or [None] * len(texts)]
        return Ragged.of([[ord(c) for c in prompt + text] for prompt, text in zip(prompts, texts, strict=True)])

    def prompt_tokens(self, field, task=None):
        return 2 if task == 5 else 1


def read(ragged: Ragged) -> list[str]:
    return ["".join(map(chr, ragged[i])) for i in range(len(ragged))]


def test_a_row_shows_each_of_its_positives_in_turn_and_the_same_one_on_every_try():
    rows, counts = np.arange(4000), np.full(4000, 4)
    chosen = choose_positive(counts, rows, step=5, seed=1)
    assert (np.bincount(chosen, minlength=4) > 900).all()
    np.testing.assert_array_equal(chosen, choose_positive(counts, rows, step=5, seed=1))
    for other in ({"step": 6, "seed": 1}, {"step": 5, "seed": 2}):
        assert np.mean(chosen == choose_positive(counts, rows, **other)) < 0.3
    # alone or among others, a row gets the same
    np.testing.assert_array_equal(chosen[17:19], choose_positive(counts[:2], rows[17:19], step=5, seed=1))


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_documents_are_chosen_as_a_loop_over_the_records_would(counts, positives, negatives, random):
    right, wrong = np.array(counts).T
    chosen = [random.randrange(count) for count, _ in counts]
    first, further, hard = [], [], []
    for i, (has, lacks) in enumerate(counts):
        shown = [(chosen[i] + k) % has for k in range(min(has, positives))]
        first.append((i, "p", shown[0]))
        further += [(i, "p", k) for k in shown[1:]]
        hard += [(i, "n", k) for k in range(min(lacks, negatives))]
    flat = [(i, "p", k) for i, (has, _) in enumerate(counts) for k in range(has)]
    flat += [(i, "n", k) for i, (_, lacks) in enumerate(counts) for k in range(lacks)]
    places, owners = choose_documents(right, wrong, np.array(chosen), positives, negatives)
    assert [flat[place] for place in places] == first + further + hard
    assert owners.tolist() == [i for i, _, _ in first + further + hard]


TABLE = {
    Column.QUERY: ["q0", "q1", "q2"],
    Column.POSITIVES: [["p0"], ["p1", "P1"], ["p2"]],
    Column.NEGATIVES: [["n0", "n1", "n2"], [], ["n3"]],
    Column.QUERY_ID: [10, 11, 12],
    Column.POSITIVE_IDS: [[20], [21, 121], [22]],
    Column.NEGATIVE_IDS: [[30, 31, 32], [], [33]],
}
ROWS = np.array([5, 6, 7])


def test_tokenise_takes_the_chosen_positive_and_the_first_negatives_with_their_ids():
    batch = tokenise(pa.table(TABLE), ROWS, Characters(), step=2, seed=0, negatives=2)
    texts = read(batch.documents)
    assert texts in (
        ["dp0", "dp1", "dp2", "dn0", "dn1", "dn3"],
        ["dp0", "dP1", "dp2", "dn0", "dn1", "dn3"],
    )
    assert read(batch.queries) == ["qq0", "qq1", "qq2"]
    assert batch.document_ids.tolist() == [20, 121 if "dP1" in texts else 21, 22, 30, 31, 33]
    assert batch.owners.tolist() == [0, 1, 2, 0, 0, 2]
    assert batch.relations.tolist() == [1, 1, 1, -1, -1, -1]
    assert batch.answers.tolist() == [10, 11, 12, UNKNOWN, UNKNOWN, UNKNOWN]
    assert batch.query_ids.tolist() == [10, 11, 12]
    assert batch.prompt_tokens.tolist() == [1] * 9
    assert batch.scores is batch.weights is batch.labels is batch.tasks is batch.languages is batch.modalities is None
    none = tokenise(pa.table(TABLE), ROWS, Characters(), step=2, seed=0)
    assert len(none.documents) == 3
    assert none.owners.tolist() == [0, 1, 2]


def test_further_positives_stand_between_the_first_ones_and_the_hard_negatives():
    batch = tokenise(pa.table(TABLE), ROWS, Characters(), step=2, seed=0, negatives=1, positives=3)
    texts = read(batch.documents)
    assert {texts[1], texts[3]} == {"dp1", "dP1"}
    assert [texts[i] for i in (0, 2, 4, 5)] == ["dp0", "dp2", "dn0", "dn3"]
    assert batch.owners.tolist() == [0, 1, 2, 1, 0, 2]
    assert batch.relations.tolist() == [1, 1, 1, 1, -1, -1]
    assert batch.answers.tolist() == [10, 11, 12, 11, UNKNOWN, UNKNOWN]


def test_what_is_known_of_some_records_only_is_unknown_of_the_others():
    table = pa.table(
        TABLE
        | {
            Column.POSITIVE_SCORES: pa.array([[0.5], None, [0.75]], pa.list_(pa.float32())),
            Column.NEGATIVE_SCORES: pa.array([None, None, [-2.0]], pa.list_(pa.float32())),
            Column.WEIGHT: pa.array([2.0, None, 0.0], pa.float32()),
            Column.LABEL: pa.array([None, 3, UNKNOWN], pa.int64()),
            Column.TASK: pa.array([5, None, 4], pa.int64()),
        }
    )
    batch = tokenise(table, ROWS, Characters(), step=2, seed=0, negatives=1)
    np.testing.assert_array_equal(batch.scores, np.array([0.5, np.nan, 0.75, np.nan, -2.0], np.float32), strict=True)
    np.testing.assert_array_equal(batch.weights, np.array([2, 1, 0], np.float32), strict=True)
    assert batch.labels.tolist() == [UNKNOWN, 3, UNKNOWN]
    assert batch.tasks.tolist() == [5, UNKNOWN, 4]
    assert batch.languages is None
    # task 5 has a prompt of its own, in its documents too
    assert read(batch.queries) == ["q!q0", "qq1", "qq2"]
    assert [text[:2] for text in read(batch.documents)] == [
        "d!",
        "dp" if batch.document_ids[1] == 21 else "dP",
        "dp",
        "d!",
        "dn",
    ]
    assert batch.prompt_tokens.tolist() == [2, 1, 1, 2, 1, 1, 2, 1]


def test_scores_of_one_side_alone_are_not_mistaken_for_those_of_the_other():
    table = pa.table(TABLE | {Column.NEGATIVE_SCORES: [[1.0, 2.0, 3.0], [], [4.0]]})
    table = table.set_column(6, Column.NEGATIVE_SCORES, table.column(6).cast(pa.list_(pa.float32())))
    scores = tokenise(table, ROWS, Characters(), step=2, seed=0, negatives=2).scores
    np.testing.assert_array_equal(scores, [np.nan, np.nan, np.nan, 1, 2, 4])


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=9), st.data())
def test_a_table_in_pieces_gives_the_same_batch(counts, data):
    """Chunked and sliced columns, as reading and concatenating leave them."""
    table = pa.table(
        {
            Column.QUERY: [f"q{i}" for i in range(len(counts))],
            Column.POSITIVES: [[f"p{i}.{k}" for k in range(n)] for i, (n, _) in enumerate(counts)],
            Column.NEGATIVES: pa.array(
                [[f"n{i}.{k}" for k in range(n)] for i, (_, n) in enumerate(counts)], pa.list_(pa.string())
            ),
            Column.QUERY_ID: list(range(len(counts))),
            Column.POSITIVE_IDS: [[100 * i + k for k in range(n)] for i, (n, _) in enumerate(counts)],
            Column.NEGATIVE_IDS: pa.array(
                [[-100 * i - k for k in range(n)] for i, (_, n) in enumerate(counts)], pa.list_(pa.int64())
            ),
            Column.POSITIVE_SCORES: pa.array(
                [None if i % 3 == 1 else [i + k / 8 for k in range(n)] for i, (n, _) in enumerate(counts)],
                pa.list_(pa.float32()),
            ),
        }
    )
    at = data.draw(st.integers(0, len(counts)))
    pieces = pa.concat_tables([table.slice(0, at), table.slice(at)])
    rows = np.arange(len(counts))
    whole, cut = (
        tokenise(t, rows, Characters(), 1, 0, negatives=2, positives=2) for t in (table.combine_chunks(), pieces)
    )
    assert read(whole.documents) == read(cut.documents)
    assert whole.document_ids.tolist() == cut.document_ids.tolist()
    np.testing.assert_array_equal(whole.scores, cut.scores)
    for text, key, score in zip(read(whole.documents), whole.document_ids.tolist(), whole.scores, strict=True):
        record, place = map(int, text[2:].split("."))
        assert key == (100 * record + place) * (1 if text[1] == "p" else -1)
        assert np.isnan(score) if text[1] == "n" or record % 3 == 1 else score == record + place / 8
