"""Three recipes on three kinds of source; and all of them in one run on a cluster that mines again beside training."""

import json
import math

import pytest
import yaml

from data_services.refresh import MINED, step_folder
from tests.cluster.test_variants import HERE, check_trains, merged
from tests.e2e.commands import steps_in
from tests.e2e.conftest import mini_recipe

CROP = {"kind": "crop", "min_share": 0.3, "max_share": 0.7}
STEPS, EVERY, DELAY = 12, 5, 2


@pytest.fixture(scope="module")
def sources(pairs, tmp_path_factory):
    """The training pairs as triplets; as a BEIR folder that was mined; and their documents alone, to be cropped."""
    from cluster.mining import MiningJob, mine
    from data_services.mining.filters import FilterConfig
    from data_services.sources import SourceConfig

    folder = tmp_path_factory.mktemp("sources")
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    others = [row["positive"] for row in rows[1:] + rows[:1]]
    triplets = [
        {"anchor": row["query"], "positive": row["positive"], "negative_1": near, "negative_2": far}
        for row, near, far in zip(rows, others, reversed(others), strict=True)
    ]
    (folder / "triplets.jsonl").write_text("\n".join(map(json.dumps, triplets)))
    beir = folder / "beir"
    (beir / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": "", "text": row["positive"]} for i, row in enumerate(rows)]
    queries = [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(rows)]
    (beir / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (beir / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(len(rows)))
    (beir / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    job = MiningJob("bm25", SourceConfig(path=str(beir)), folder / "mined", FilterConfig(negatives=2))
    assert mine(job, folder / "home").keys["positive"] == "positives"
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": row["positive"]}) for row in rows))
    views = {"query": [CROP], "positive": [CROP, {"kind": "delete"}]}
    return {
        "JSONL triplets": {"path": str(folder / "triplets.jsonl")},
        "a BEIR folder with mined negatives": {
            "path": str(folder / "mined"),
            "id": "id",
            "positive": "positives",
            "negatives": "negatives",
        },
        "unlabelled text with two crops": {
            "path": str(folder / "texts.jsonl"),
            "query": "text",
            "positive": "text",
            "views": views,
        },
    }


KINDS = ["JSONL triplets", "a BEIR folder with mined negatives", "unlabelled text with two crops"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_trains_on(gloo, pairs, sources, tmp_path, kind):
    negatives = 0 if "views" in sources[kind] else 2
    data = {"sources": [sources[kind]], "negatives": negatives}
    check_trains(gloo, pairs, {"data": data, "evaluation": {"pool": {"path": str(pairs)}}}, tmp_path)


def test_one_run_on_a_cluster_takes_all_of_them_and_mines_again_beside_training(shell, pairs, sources, tmp_path):
    base = mini_recipe(pairs) | {"name": "kinds", "evaluation": {"pool": str(pairs), "validation": None}}
    base = merged(base, {"checkpoint": {"every_steps": STEPS}, **HERE})
    filters = {"negatives": 2, "relative_margin": None, "from_rank": 1}
    base["mine"] = {"every_steps": EVERY, "delay_steps": DELAY, "filters": filters}
    base["data"] = {"sources": [sources[kind] for kind in KINDS], "batch": 16, "steps": STEPS, "negatives": 2}
    (tmp_path / "kinds.yaml").write_text(yaml.safe_dump(base))
    ended = shell("train", tmp_path / "kinds.yaml", "--json", tmp_path / "kinds.json")
    assert ended.code == 0, ended
    steps = steps_in(shell.metrics("kinds"))
    assert [step["step"] for step in steps] == list(range(STEPS))
    assert all(math.isfinite(step["loss"]) for step in steps)
    mined = shell.run_folder("kinds") / "mined"
    assert [path.name for path in mined.iterdir()] == [f"step-{EVERY}"], "what no batch would read isn't mined"
    assert len(json.loads((step_folder(mined, EVERY) / MINED).read_text())["fingerprints"]) == 3
    assert 0 <= json.loads((tmp_path / "kinds.json").read_text())["metrics"]["trained"]["ndcg@10"] <= 1
