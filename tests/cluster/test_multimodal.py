"""Runs over pairs of texts and images in this process, from the recipe to the scored export; queries and embeddings."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import load_recipe
from cluster.prepare import prepare
from data_services.schema import Media, UsageError
from tests.trainers.encoders.test_image import picture, png

PAIRS = 56
TEXT = {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 48, "vocabulary": 320, "dropout": 0.0}
IMAGE = {"image_size": 16, "patch_size": 8, "hidden": 24, "layers": 1, "heads": 2, "intermediate": 40}
DUAL = {"config": TEXT, "image": {"config": IMAGE}, "max_tokens": 24}
VISION = {"patch_size": 4, "merge": 2, "hidden": 32, "layers": 1, "heads": 2, "intermediate": 64}
VLM = {
    "config": TEXT | {"architecture": "qwen2_vl", "hidden": 64},
    "vision": {"config": VISION, "max_image_tokens": 6},
    "adapter": {"rank": 2, "modules_to_save": ["embed_tokens"]},
    "bidirectional": False,
    "pooling": "last",
    "max_tokens": 24,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of pairs with the splits that a recipe scores, and one of texts alone."""
    folder = tmp_path_factory.mktemp("pairs")
    pictures = [png(picture(i, 20 + i % 9, 24)).data for i in range(PAIRS)]
    captions = [f"picture number {i} of {['red', 'blue', 'green'][i % 3]} squares" for i in range(PAIRS)]
    for split, rows in (("train", slice(0, 32)), ("validation", slice(32, 44)), ("heldout", slice(44, PAIRS))):
        columns = {"query": captions[rows], "positive": pa.array(pictures[rows], pa.binary())}
        columns["even"] = [str(i % 2) for i in range(PAIRS)][rows]
        (folder / "photos").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), folder / "photos" / f"{split}.parquet")
    texts = [{"query": f"what is {i}?", "positive": f"it is the number {i}"} for i in range(32)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def written(pairs, folder, model, **more):
    sources = [{"path": str(pairs / "photos"), "task": "=photos"}]
    recipe = {"name": "tiny", "data": {"sources": sources, "batch": 8, "steps": 3}, "model": model}
    recipe |= {"objective": {"temperature": {"start": 0.07}}, "engine": {"precision": "fp32", "budget_tokens": 64}}
    recipe |= {"evaluation": {"recall_at": [5], "both_ways": True, "prompts": ["{}", "a {}"]}} | more
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def trained(recipe, home):
    """A whole run in this process: (what was made ready, scores of the held-out split)."""
    from cluster.evidence.scoring import score_split
    from cluster.worker import Task, train_on_worker
    from data_services.stream import LocalStream

    ready = prepare(load_recipe(recipe), home, None)
    task = Task(ready.recipe, ready.run, ready.plan.steps, ready.lineage())
    assert train_on_worker(task, LocalStream(ready.reader, 1, 0, ready.recipe.engine.budget_tokens)) == ready.plan.steps
    return ready, score_split(ready.recipe, ready.run, "heldout", ready.pools["heldout"], ready.sources[0])


@pytest.fixture(scope="module")
def dual(data, tmp_path_factory):
    home = tmp_path_factory.mktemp("dual")
    (home / "home").mkdir()
    evaluation = {"recall_at": [5], "both_ways": True, "prompts": ["{}", "a {}"], "geometry": True, "classes": "even"}
    recipe = written(data, home, DUAL, momentum={"export": True}, evaluation=evaluation)
    return *trained(recipe, home / "home"), home / "home"


def test_towers_of_texts_and_images_train_and_are_scored_both_ways(dual):
    ready, scored, _ = dual
    models = ("nearest pixels", "untrained", "trained")
    rows = [
        name + way
        for name in models
        for way in ("", " back", " by prompts")
        if (name, way) != (models[0], " by prompts")
    ]
    assert sorted(scored.rows) == sorted(rows)
    assert {"recall@1", "recall@5", "recall@10"} <= set(scored.rows["trained"])
    assert scored.over_bm25 == {}
    table = pq.read_table(ready.run.evaluation("heldout"))
    assert table.num_rows == 12
    assert "trained recall@5" in table.column_names


def test_vectors_of_either_side_and_the_classes_of_images_are_told_where_the_recipe_asks(dual):
    _, scored, _ = dual
    assert set(scored.geometry) == set(scored.probes) == {"untrained", "trained"}
    assert {"alignment", "uniformity_queries", "uniformity_documents", "modality_gap"} <= set(
        scored.geometry["trained"]
    )
    assert scored.geometry["trained"]["modality_gap"] > 0
    assert scored.probes["trained"]["classes"] == 2
    assert scored.probes["trained"]["majority"] == 0.5


def test_a_run_keeps_what_its_page_shows_pictures_included(dual):
    from cluster.reports.evidence import read_run
    from cluster.reports.run import run_page

    ready, _, _ = dual
    found = read_run(ready.run)
    look = found.looks["heldout"]
    assert {"modality_gap", "uniformity_queries", "uniformity_documents"} <= set(look.geometry["trained"])
    assert sum(look.similarities["trained"].positives) == 12
    assert sum(look.similarities["trained"].negatives) == 12 * 11
    shown = [*look.best, *look.worst]
    assert len(shown) == 10
    assert all(example.answer.picture and hit.item.picture for example in shown for hit in example.hits)
    assert run_page(found).count("data:image/png;base64,") >= 8


def test_a_picture_looks_for_pictures_and_texts_and_a_source_of_them_is_embedded(dual, data, tmp_path):
    from cluster.embedding import EmbeddingJob, embed_source
    from cluster.models import query
    from data_services.sources import SourceConfig

    ready, _, home = dual
    model = str(ready.run.export)
    (tmp_path / "over").mkdir()
    for i in range(3):
        (tmp_path / "over" / f"{i}.png").write_bytes(png(picture(i, 20, 24)).data)
    (tmp_path / "over" / "note.txt").write_text("a note")
    (tmp_path / "over" / "broken.png").write_bytes(png(picture(1, 9, 9)).data[:40])
    found = query(None, model, str(tmp_path / "over"), k=4, root=home, image=tmp_path / "over" / "1.png")
    assert found.documents == 4  # the damaged one is left out
    assert found.hits[0].name == "1.png"
    assert found.hits[0].score == pytest.approx(1.0, abs=1e-5)
    assert {hit.text for hit in found.hits} == {"", "a note"}
    with pytest.raises(UsageError, match="one of the two"):
        query("a text", model, str(tmp_path / "over"), root=home, image=tmp_path / "over" / "1.png")
    with pytest.raises(UsageError, match=r"broken.png: "):
        query(None, model, str(tmp_path / "over"), root=home, image=tmp_path / "over" / "broken.png")
    source = SourceConfig(path=str(data / "photos"), split="heldout")
    corpus = embed_source(EmbeddingJob(model, source, tmp_path / "vectors", workers=1), home).corpus
    assert corpus.rows == 12
    np.testing.assert_allclose(np.linalg.norm(corpus.vectors(0, 12), axis=1), 1, atol=1e-3)


def test_a_vision_language_model_learns_from_texts_and_images_in_turn(data, tmp_path):
    sources = [
        {"path": str(data / "photos"), "task": "=photos", "weight": 0.5},
        {"path": str(data / "texts.jsonl"), "task": "=texts", "weight": 0.5},
    ]
    more = {
        "data": {"sources": sources, "batch": 8, "steps": 4, "homogeneous": True},
        "queue": {"rows": 16, "per": "tasks"},
        "objective": {"temperature": 0.07, "only_same": ["tasks"]},
        "evaluation": {"pool": {"path": str(data / "photos")}, "recall_at": [5]},
    }
    (tmp_path / "home").mkdir()
    ready, scored = trained(written(data, tmp_path, VLM, **more), tmp_path / "home")
    tasks = {tuple(ready.plan.rows(t)[:, 0].tolist()) for t in range(4)}
    assert {len(set(rows)) for rows in tasks} == {1}  # each batch of one source
    assert len({rows[0] for rows in tasks}) == 2
    assert {"trained", "untrained"} <= set(scored.rows)
    from cluster.models import exported_encoder, query

    both = exported_encoder(ready.run.export).encode(
        ["a text", Media("image", png(picture(3, 20, 24)).data)], "document"
    )
    assert both.shape == (2, 64)
    (tmp_path / "over").mkdir()
    for i in range(2):
        (tmp_path / "over" / f"{i}.png").write_bytes(png(picture(i, 20, 24)).data)
    model, root = str(ready.run.export), tmp_path / "home"
    found = query(None, model, str(tmp_path / "over"), k=1, root=root, image=tmp_path / "over" / "1.png")
    assert found.hits[0].name == "1.png"


def train_in_parts(task, reader, stops):
    """On a rank: a run that ends after each of these steps and goes on from its checkpoint in new objects."""
    import torch.distributed as dist

    from cluster.worker import Training
    from data_services.stream import LocalStream

    for stop in stops:
        stream = LocalStream(reader, dist.get_world_size(), dist.get_rank(), task.recipe.engine.budget_tokens)
        assert Training(task).run(stream, stop) == stop


@pytest.mark.parametrize(
    ("model", "stage"),
    [(DUAL, 2), pytest.param(DUAL, 3, marks=pytest.mark.proof), pytest.param(VLM, 3, marks=pytest.mark.proof)],
)
def test_a_run_over_images_goes_on_with_the_losses_of_one_that_was_never_stopped(gloo, data, tmp_path, model, stage):
    from tests.e2e.plain import plain_run

    more = {"queue": {"rows": 20}, "engine": {"precision": "fp32", "budget_tokens": 64, "zero_stage": stage}}
    runs = []
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        (tmp_path / name).mkdir()
        recipe = written(data, tmp_path / name, model, **more)
        told = json.loads(recipe.read_text())
        told["data"]["steps"] = 4
        recipe.write_text(json.dumps(told))
        ready, task = plain_run(recipe, tmp_path / name)
        gloo(2, train_in_parts, task, ready.reader, stops)
        steps = [json.loads(line) for line in ready.run.metrics.read_text().splitlines()]
        runs.append([(step["step"], step["loss"], step["grad_norm"]) for step in steps])
    assert [step for step, *_ in runs[0]] == [0, 1, 2, 3]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"config": TEXT, "max_tokens": 24},
            r"its documents are image, and the model reads text only; add model.image",
        ),
        (DUAL | {"audio": {"rate": 8000}}, "model.audio: no source has such items"),
    ],
)
def test_a_model_without_the_tower_or_with_one_too_many_is_refused_before_training(data, tmp_path, model, message):
    (tmp_path / "home").mkdir()
    with pytest.raises(UsageError, match=message):
        prepare(load_recipe(written(data, tmp_path, model)), tmp_path / "home", None)
