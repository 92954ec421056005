"""Embedding a corpus: every row once, the same bytes whoever writes them and however often it is killed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.embed import EmbedConfig, EmbeddedCorpus, OnRay, SourceTexts, embed
from data_services.embedding.quantise import quantise, ranges_of, restore
from data_services.schema import RunError, UsageError, text_id
from data_services.sources import SourceConfig, open_source

D = 24


class Hashed:
    """A text's vector is a function of it and of the field; of length one, or not."""

    def __init__(self, unit: bool = True, slow_s: float = 0.0, broken: str | None = None) -> None:
        self.unit_vectors, self._slow_s, self._broken = unit, slow_s, broken

    def encode(self, texts, field):
        time.sleep(self._slow_s)
        if self._broken in texts:
            raise UsageError(f"{self._broken} can't be encoded")
        vectors = [np.random.Philox(abs(text_id(field + text))).random_raw(D) / 2**63 - 1 for text in texts]
        vectors = np.array(vectors, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if self.unit_vectors else vectors


class Numbered:
    """Texts `text 0`, `text 1`, …"""

    def __init__(self, count: int, fingerprint: str = "f") -> None:
        self._count, self.fingerprint = count, fingerprint

    def __len__(self):
        return self._count

    def read(self, start, stop):
        texts = [f"text {i}" for i in range(start, min(stop, self._count))]
        return np.array([text_id(text) for text in texts], np.int64), texts


SMALL = EmbedConfig(shard_rows=16)
TEXTS = Numbered(100)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The embedding that nothing interrupts."""
    out = tmp_path_factory.mktemp("embed") / "whole"
    embed(TEXTS, Hashed, out, SMALL)
    return out


def test_every_row_has_its_vector_once_and_in_order(whole):
    corpus, (ids, texts) = EmbeddedCorpus.open(whole), TEXTS.read(0, 100)
    assert (corpus.rows, corpus.dimensions, corpus.metric, corpus.dtype) == (100, D, "cosine", "fp32")
    np.testing.assert_array_equal(corpus.ids(0, 100), ids)
    np.testing.assert_array_equal(corpus.vectors(0, 100), Hashed().encode(texts, "document"), strict=True)
    for start, stop in [(0, 1), (15, 17), (31, 32), (40, 90), (96, 200), (7, 7)]:
        np.testing.assert_array_equal(corpus.ids(start, stop), ids[start:stop])
        np.testing.assert_array_equal(corpus.vectors(start, stop), corpus.vectors(0, 100)[start:stop])
    assert [len(pq.read_table(path)) for path in sorted(whole.glob("*.parquet"))] == [16] * 6 + [4]
    assert pickle.loads(pickle.dumps(corpus)) == corpus


def test_what_was_finished_before_a_failure_is_kept_and_the_bytes_are_the_same(whole, tmp_path):
    with pytest.raises(UsageError, match="text 70 can't"):
        embed(TEXTS, partial(Hashed, broken="text 70"), tmp_path / "out", SMALL)
    with pytest.raises(UsageError, match="isn't finished; run the same `gyre embed` again"):
        EmbeddedCorpus.open(tmp_path / "out")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("vectors-*")}
    assert len(written) == 4
    seen: list[tuple[int, int]] = []
    embed(TEXTS, Hashed, tmp_path / "out", SMALL, on_progress=lambda *at: seen.append(at))
    assert seen == [(64, 100), (80, 100), (96, 100), (100, 100), (100, 100)]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert files(tmp_path / "out") == files(whole)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(whole, tmp_path):
    out = tmp_path / "out"
    call = f"embed(TEXTS, partial(Hashed, slow_s=0.05), Path({str(out)!r}), SMALL)"
    code = f"from tests.data_services.test_embed import *\n{call}"
    for shards in (1, 3, 6):
        running = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
        while len(list(out.glob("vectors-*"))) < shards and running.poll() is None:
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert not (out / "committed.json").exists()
    embed(TEXTS, Hashed, out, SMALL)
    assert files(out) == files(whole)


def test_damaged_shards_and_what_a_killed_run_left_are_replaced(whole, tmp_path):
    out = tmp_path / "out"
    embed(TEXTS, Hashed, out, SMALL)
    (out / "committed.json").unlink()
    shard = out / "vectors-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:500])
    (out / "vectors-00004.parquet").write_bytes(b"")
    (out / ".making-1234").write_bytes(b"half a shard")
    embed(Numbered(100, "other"), Hashed, tmp_path / "other", SMALL)
    (tmp_path / "other" / "vectors-00005.parquet").replace(out / "vectors-00005.parquet")  # a zombie of another job
    embed(TEXTS, Hashed, out, SMALL)
    assert files(out) == files(whole)


def test_a_folder_that_was_begun_otherwise_is_refused_with_what_differs(whole, tmp_path):
    def refused(texts=TEXTS, config=SMALL, model="", out=whole):
        with pytest.raises(UsageError) as caught:
            embed(texts, Hashed, out, config, model=model)
        return str(caught.value)

    assert "dtype was 'fp32', is 'int8'" in refused(config=EmbedConfig(shard_rows=16, dtype="int8"))
    assert "model was '', is 'm'" in refused(model="m")
    assert "data was 'f', is 'g'; rows was 100, is 99" in refused(Numbered(99, "g"))
    assert "Finish it as begun, or name a new folder" in refused(config=EmbedConfig(shard_rows=17))
    (tmp_path / "notes.txt").write_text("mine")
    assert "no embedding; name a new folder" in refused(out=tmp_path)
    assert files(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(UsageError, match="holds no embedding"):
        EmbeddedCorpus.open(tmp_path)
    assert "no text to embed" in refused(Numbered(0), out=tmp_path / "new")
    (tmp_path / "file").write_text("")
    assert "is there already and no embedding" in refused(out=tmp_path / "file")


def test_two_runs_at_once_are_refused(tmp_path):
    def meddle(done, rows):
        if done == 16:
            with pytest.raises(RunError, match="another process embeds into"):
                embed(TEXTS, Hashed, tmp_path / "out", SMALL)

    embed(TEXTS, Hashed, tmp_path / "out", SMALL, on_progress=meddle)


class Gives:
    """An encoder with one answer."""

    def __init__(self, vectors) -> None:
        self._vectors = np.array(vectors, np.float32)

    def encode(self, texts, field):
        return self._vectors


def test_vectors_that_cannot_be_are_refused_and_leave_no_trace(tmp_path):
    texts, out = Numbered(2), tmp_path / "out"
    with pytest.raises(RunError, match="NaN or infinity"):
        embed(texts, lambda: Gives([[1, np.nan], [0, 1]]), out)
    with pytest.raises(RunError, match=r"gave \[1, 2\] for 2 texts"):
        embed(texts, lambda: Gives([[1, 0]]), out)
    with pytest.raises(UsageError, match="dimensions is 25, but the model's vectors have 24: lower it"):
        embed(texts, Hashed, out, EmbedConfig(dimensions=25))
    assert embed(texts, Hashed, out, EmbedConfig(dimensions=D)).dimensions == D


# What is stored


def test_a_prefix_of_a_unit_vector_has_length_one_again_and_that_of_another_is_cut(tmp_path):
    full = Hashed(unit=False).encode(TEXTS.read(0, 100)[1], "query")
    config = EmbedConfig(dimensions=8, field="query")
    cut = embed(TEXTS, partial(Hashed, unit=False), tmp_path / "dot", config)
    assert (cut.metric, cut.dimensions, cut.field) == ("dot", 8, "query")
    np.testing.assert_array_equal(cut.vectors(0, 100), full[:, :8])
    unit = embed(TEXTS, Hashed, tmp_path / "unit", config)
    assert unit.metric == "cosine"
    np.testing.assert_allclose(unit.vectors(0, 100), full[:, :8] / np.linalg.norm(full[:, :8], axis=1)[:, None], 1e-5)


matrices = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).normal(size=(5, 19)).astype(np.float32)
)


@settings(max_examples=30)
@given(matrices, matrices)
def test_bytes_are_those_of_sentence_transformers(vectors, sample):
    from sentence_transformers.util.quantization import quantize_embeddings

    ranges = ranges_of(sample)
    for dtype in ("int8", "uint8", "binary", "ubinary"):
        theirs = quantize_embeddings(vectors, dtype, ranges=ranges)
        np.testing.assert_array_equal(quantise(vectors, dtype, ranges), theirs, strict=True)


@given(matrices)
def test_restored_vectors_are_as_near_as_their_type_allows(vectors):
    ranges = ranges_of(vectors)
    assert (restore(quantise(vectors, "fp32"), "fp32", 19) == vectors).all()
    # Eleven bits of a normal number; below 2^-14 the steps are of one size.
    np.testing.assert_allclose(restore(quantise(vectors, "fp16"), "fp16", 19), vectors, rtol=2**-11, atol=2**-25)
    for dtype in ("int8", "uint8"):
        apart = np.abs(restore(quantise(vectors, dtype, ranges), dtype, 19, ranges) - vectors)
        assert (apart <= (ranges[1] - ranges[0]) / 255 * 0.51 + 1e-6).all()
    for dtype in ("binary", "ubinary"):
        bits = restore(quantise(vectors, dtype), dtype, 19)
        assert (np.sign(bits) == np.where(vectors > 0, 1, -1)).all()
        np.testing.assert_allclose(np.linalg.norm(bits, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["fp16", "int8", "uint8", "binary", "ubinary"])
def test_each_type_is_stored_and_read_back(whole, tmp_path, dtype):
    corpus = embed(TEXTS, Hashed, tmp_path / "out", EmbedConfig(dtype=dtype, shard_rows=16))
    exact = EmbeddedCorpus.open(whole).vectors(0, 100)
    ranges = ranges_of(exact)  # the sample is the whole corpus
    np.testing.assert_array_equal(corpus.stored(0, 100), quantise(exact, dtype, ranges), strict=True)
    np.testing.assert_array_equal(corpus.vectors(10, 40), restore(corpus.stored(10, 40), dtype, D, ranges), strict=True)
    cosines = (exact * corpus.vectors(0, 100)).sum(1)
    assert cosines.min() > (0.6 if "binary" in dtype else 0.99)
    assert corpus.vectors(0, 100).dtype == np.float32


def test_ranges_of_a_large_corpus_are_of_a_sample_that_its_size_decides(tmp_path, monkeypatch):
    from data_services.embedding import writer

    monkeypatch.setattr(writer, "_SAMPLED_ROWS", 40)
    monkeypatch.setattr(writer, "_SAMPLE_RUNS", 4)
    corpus = embed(TEXTS, Hashed, tmp_path / "out", EmbedConfig(dtype="int8"))
    rows = [row for first in (0, 30, 60, 90) for row in range(first, first + 10)]
    sampled = Hashed().encode([f"text {i}" for i in rows], "document")
    np.testing.assert_array_equal(json.loads((tmp_path / "out" / "ranges.json").read_text()), ranges_of(sampled))
    assert corpus.rows == 100


# Sources


@pytest.fixture
def stored(tmp_path):
    rows = [
        {"q": "a", "p": ["x", "y"], "name": "one"},
        {"q": "b", "p": "x", "name": "two"},
        {"q": "a", "p": ["z", "y", "w", "w"], "name": 3},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows * 40))
    return open_source(SourceConfig(path=str(path), query="q", positive="p", id="name"), tmp_path / "home")


@pytest.mark.parametrize(
    ("field", "texts", "names"),
    [("document", ["x", "y", "z", "w"], ["one", "one", "3", "3"]), ("query", ["a", "b"], ["one", "two"])],
)
def test_texts_of_a_source_come_once_in_the_order_of_their_first_rows(stored, field, texts, names):
    for its in (SourceTexts(stored, field), pickle.loads(pickle.dumps(SourceTexts(stored, field)))):
        assert len(its) == len(texts)
        ids, read = its.read(0, 10)
        assert read == texts
        assert ids.tolist() == [text_id(text) for text in texts]
        assert its.read(1, 2)[1] == texts[1:2]
        assert its.names(0, 10) == names


def test_a_source_embeds_with_its_names(stored, tmp_path):
    corpus = embed(SourceTexts(stored), Hashed, tmp_path / "out", EmbedConfig(shard_rows=3))
    assert corpus.names(0, 4) == ["one", "one", "3", "3"]
    assert corpus.ids(2, 4).tolist() == [text_id("z"), text_id("w")]


def test_a_plain_corpus_has_ids_and_titles(tmp_path):
    rows = [{"_id": "d1", "title": "Kant", "text": "wrote"}, {"_id": "d2", "title": "", "text": "none"}]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"_id": 3, "text": "bare"}])))
    config = SourceConfig(path=str(tmp_path / "corpus.jsonl"), query="text", positive="text", id="_id", title="title")
    texts = SourceTexts(open_source(config, tmp_path / "home"))
    assert texts.read(0, 3)[1] == ["Kant wrote", "none", "bare"]
    assert texts.names(0, 3) == ["d1", "d2", "3"]


# On Ray


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


class DiesOnce(Hashed):
    """Its process ends at the third shard, the first time."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self._marker = marker

    def encode(self, texts, field):
        if "text 35" in texts and not self._marker.exists():
            self._marker.touch()
            os._exit(1)
        return super().encode(texts, field)


def test_workers_write_the_same_bytes_though_one_dies(cluster, whole, tmp_path):
    encoder = partial(DiesOnce, tmp_path / "died")
    embed(TEXTS, encoder, tmp_path / "out", SMALL, workers=OnRay(2))
    assert (tmp_path / "died").exists()
    assert files(tmp_path / "out") == files(whole)


def test_ranges_are_worked_out_by_one_worker_for_all(cluster, tmp_path):
    config = EmbedConfig(dtype="int8", shard_rows=16)
    embed(TEXTS, Hashed, tmp_path / "here", config)
    embed(TEXTS, Hashed, tmp_path / "there", config, workers=OnRay(2))
    assert files(tmp_path / "here") == files(tmp_path / "there")


def test_a_workers_sentence_reaches_the_caller(cluster, tmp_path):
    with pytest.raises(UsageError, match=r"^text 70 can't be encoded$"):
        embed(TEXTS, partial(Hashed, broken="text 70"), tmp_path / "out", SMALL, workers=OnRay(2))
