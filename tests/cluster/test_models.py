"""MODEL in its forms, and what is done with one: scored, searched with, copied out, its checkpoints looked at."""

import json
import shutil

import numpy as np
import pytest

from cluster import models
from cluster.models import checkpoints, export, query, resolve
from cluster.paths import RunPaths, find_run
from data_services.schema import UsageError


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A home with two runs, the first with an export."""
    monkeypatch.setenv("GYRE_HOME", str(tmp_path / "home"))
    for name in ("small-20260101-aaaa", "small-20260102-bbbb"):
        run = RunPaths(tmp_path / "home" / name)
        run.root.mkdir(parents=True)
        run.recipe.write_text("{}")
    first = RunPaths(tmp_path / "home" / "small-20260101-aaaa")
    first.export.mkdir()
    (first.export / "config.json").write_text("{}")
    return tmp_path / "home"


def test_a_run_is_named_by_its_id_its_beginning_or_its_folder(runs):
    for name in ("small-20260101-aaaa", "small-20260101", str(runs / "small-20260101-aaaa")):
        assert find_run(name).run_id == "small-20260101-aaaa"
    with pytest.raises(UsageError, match="ambiguous: small-20260101-aaaa, small-20260102-bbbb"):
        find_run("small-2026")
    with pytest.raises(UsageError, match="no run 'sma' under"):
        find_run("sma")
    with pytest.raises(UsageError, match="the newest there: small-"):
        find_run("other")


def test_a_model_is_resolved_from_each_of_its_forms(runs, tmp_path, monkeypatch):
    done = RunPaths(runs / "small-20260101-aaaa")
    for name in ("small-20260101-aaaa", str(done.root), str(done.export)):
        assert resolve(name).folder == done.export
    monkeypatch.setattr("cluster.registry.folder.model_folder", lambda uri, root: (done.export, _Version("small", 3)))
    assert resolve("models:/small@champion") == models.ModelRef("small/3", done.export)


class _Version:
    def __init__(self, name, version):
        self.name, self.version = name, version


def test_what_is_no_model_is_said(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, told in [
        ("small-20260102-bbbb", "has no exported model yet; finish it: gyre train RECIPE --resume small-20260102"),
        (str(tmp_path), "is no model: it has neither config.json nor modules.json"),
        ("nobody/no-such-model", "MODEL: 'nobody/no-such-model' is neither a folder here nor a model"),
        ("quickstart", "no run 'quickstart'"),
    ]:
        with pytest.raises(UsageError, match=told):
            resolve(name)


def test_export_is_whole_or_not_at_all(runs, tmp_path):
    out = tmp_path / "out"
    assert json.loads((export("small-20260101", out).folder / "config.json").read_text()) == {}
    with pytest.raises(UsageError, match="not empty; name a new folder"):
        export("small-20260101", out)
    with pytest.raises(UsageError, match="finish it"):
        export("small-20260102", tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "out"]


def test_a_damaged_checkpoint_is_told_from_a_whole_one(runs):
    import torch

    from trainers.checkpoint import latest
    from trainers.collectives import Group
    from trainers.config import CheckpointConfig
    from trainers.saving import CheckpointStore

    run = RunPaths(runs / "small-20260101-aaaa")
    store = CheckpointStore(run.checkpoints, CheckpointConfig(keep=2), Group())
    assert checkpoints(run.run_id) == []
    for step in (5, 10):
        store.save(step, {"engine.w": torch.ones(4)}, {"step": step})
        store.settle()
    assert [(s.step, s.damage) for s in checkpoints(run.run_id)] == [(5, ""), (10, "")]
    file = next(latest(run.checkpoints).folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    whole, damaged = checkpoints(run.run_id)
    assert whole.damage == ""
    assert file.name in damaged.damage


def test_a_pretrained_model_is_searched_with(pretrained, tmp_path, monkeypatch):
    from sentence_transformers import SentenceTransformer

    monkeypatch.setenv("GYRE_HOME", str(tmp_path / "home"))
    texts = {
        "soup.txt": "Boil the carrots, add salt and cream, and blend.",
        "bicycle.txt": "Pump the tyre and oil the chain.",
        "storm.txt": "Wind and hail are expected by the evening.",
    }
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "picture.bin").write_bytes(b"\xff\xfe\xff")
    asked = "how do I cook a vegetable dish?"
    found = query(asked, str(pretrained), str(folder), k=9)
    assert found.documents == 3
    assert found.hits[0].name == "soup.txt"
    theirs = SentenceTransformer(str(pretrained), device="cpu").encode([asked, texts["soup.txt"]])
    assert found.hits[0].score == pytest.approx(float(np.dot(*theirs)), abs=1e-4)

    monkeypatch.setattr(np, "save", None)  # a second query finds the vectors and embeds no corpus
    assert query(asked, str(pretrained), str(folder), k=1).hits[0] == found.hits[0]


def test_a_corpus_without_text_and_an_empty_query_are_refused(runs, tmp_path):
    model = str(runs / "small-20260101-aaaa")
    shutil.rmtree(tmp_path / "empty", ignore_errors=True)
    (tmp_path / "empty").mkdir()
    for text, corpus, told in [
        ("x", str(tmp_path / "empty"), "has no text file"),
        ("x", "no-such-folder", "give a folder of files"),
        (" ", "no-such-folder", "the query is empty"),
    ]:
        with pytest.raises(UsageError, match=told):
            query(text, model, corpus)
