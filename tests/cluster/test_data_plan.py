"""`gyre data plan` prints what training would see."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.e2e.conftest import mini_recipe, write_pairs


@pytest.fixture
def recipe(tmp_path):
    """Of 480 rows, where each document stands three times."""
    pairs = write_pairs(tmp_path / "pairs")
    lines = (pairs / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row | {"positive": rows[i // 3]["positive"]} for i, row in enumerate(rows)]
    (pairs / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    file = tmp_path / "mini.yaml"
    file.write_text(yaml.safe_dump(mini_recipe(pairs)))
    return file


def test_a_batch_is_the_same_rows_for_any_workers_and_holds_no_duplicates(recipe, tmp_path, monkeypatch):
    from cluster.config import load_recipe
    from cluster.data_plan import planned_batch
    from data_services.sources import open_source

    monkeypatch.setenv("GYRE_HOME", str(tmp_path / "home"))
    read = load_recipe(recipe, [])
    one, three = (planned_batch(read, 4, workers) for workers in (1, 3))
    assert [(r.row, r.tokens) for r in one.rows] == [(r.row, r.tokens) for r in three.rows]
    assert one.duplicates == 0
    assert len(one.rows) == 32
    assert sum(one.tokens) == sum(three.tokens) == sum(r.tokens for r in one.rows)
    assert three.tokens == [sum(r.tokens for r in three.rows if r.worker == rank) for rank in range(3)]
    table = open_source(read.data.sources[0], tmp_path / "home").table()
    for row in one.rows:
        assert (row.query, [row.positive]) == (table["query"][row.row].as_py(), table["positives"][row.row].as_py())
    allowed = load_recipe(recipe, ["data.duplicates=allow"])
    assert any(planned_batch(allowed, step).duplicates for step in range(3))


def test_a_batch_of_neighbours_says_of_which_clusters_it_is(recipe, tmp_path, monkeypatch):
    from cluster.config import load_recipe
    from cluster.data_plan import planned_batch

    monkeypatch.setenv("GYRE_HOME", str(tmp_path / "home"))
    file = tmp_path / "pairs" / "train.jsonl"
    rows = [json.loads(line) | {"topic": i // 120} for i, line in enumerate(file.read_text().splitlines())]
    file.write_text("\n".join(map(json.dumps, rows)))
    keys = ["data.neighbours=true", "data.sources.0.cluster=topic"]
    alike, mixed = planned_batch(load_recipe(recipe, keys), 4), planned_batch(load_recipe(recipe, []), 4)
    assert sum(alike.clusters.values()) == 32
    assert len(alike.clusters) <= 3
    assert alike.duplicates == 0
    assert mixed.clusters == {}


def test_tokens_are_those_of_what_the_views_show(recipe, tmp_path, monkeypatch):
    from cluster.config import load_recipe
    from cluster.data_plan import planned_batch

    monkeypatch.setenv("GYRE_HOME", str(tmp_path / "home"))
    cropped = load_recipe(recipe, ["data.sources.0.views={positive: [{kind: crop, min_share: 0.1, max_share: 0.2}]}"])
    whole, less = planned_batch(load_recipe(recipe, []), 4), planned_batch(cropped, 4)
    assert [r.row for r in whole.rows] == [r.row for r in less.rows]
    assert sum(less.tokens) < sum(whole.tokens)


def test_the_command_prints_every_row_and_refuses_a_step_beyond_the_plan(recipe, tmp_path, monkeypatch, capsys):
    import sys

    from cluster import cli

    monkeypatch.setenv("GYRE_HOME", str(tmp_path / "home"))

    def gyre(*arguments):
        monkeypatch.setattr(sys, "argv", ["gyre", "data", "plan", str(recipe), *arguments])
        try:
            cli.main()
        except SystemExit as ended:
            return ended.code or 0, capsys.readouterr()

    code, told = gyre("--step", "2", "--json", str(tmp_path / "batch.json"))
    assert code == 0
    batch = json.loads((tmp_path / "batch.json").read_text())
    for row in batch["rows"]:
        assert f"{row['row']} " in told.out
    assert "no two rows share their query or a positive" in told.out
    code, told = gyre("--step", "999")
    assert code == 2
    assert told.err.startswith("gyre: --step 999: the plan has steps 0 … ")
