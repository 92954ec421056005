import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import (
    caching,
    checkpoint,
    common,
    data,
    data_sides,
    embed,
    evaluate,
    mine,
    mine_sides,
    negatives,
    negatives_sides,
    padding,
    serve,
    startup,
    step,
    step_runs,
)
from trainers.collectives import Group


@pytest.mark.parametrize(
    "name",
    [
        "step",
        "startup",
        "quality",
        "caching",
        "padding",
        "ema",
        "mine",
        "embed",
        "data",
        "evaluate",
        "serve",
        "checkpoint",
    ],
)
def test_help_tells_what_is_measured_without_importing_what_measures(name):
    code = (
        f"import runpy, sys; sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_module('benchmarks.{name}', run_name='__main__')\n"
        "finally: print(sorted({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(option in told for option in ("--json FILE", "--quick"))
    assert told.endswith("[]\n")


def test_sides_take_turns():
    assert list(common.in_turns("AB", 2)) == [(0, "A"), (0, "B"), (1, "A"), (1, "B")]


def test_a_ratio_is_of_the_runs_of_one_round():
    assert common.ratios([4.0, 9.0, 10.0], [2.0, 3.0, 2.0]) == {"median": 3.0, "min": 2.0, "max": 5.0}
    assert common.shown(common.spread([2.0, 1.0])) == "1.50 (1.00–2.00)"
    with pytest.raises(ValueError, match="2 runs and 1 of the other"):
        common.ratios([1.0, 2.0], [1.0])


def test_parts_add_up_and_what_ran_beside_takes_no_time():
    ends = {
        "began": 0.0,
        "connecting": 1.0,
        "connected": 4.0,
        "prepared": 6.0,
        "tracked": 5.0,
        "entered": 9.0,
    }
    parts = startup.parts_of(ends | {"built": 10.0, "fed": 10.0, "stepped": 12.5})
    assert sum(parts.values()) == 12.5
    assert (parts["prepared"], parts["tracked"], parts["entered"]) == (2.0, 0.0, 3.0)


def test_pauses_and_warm_up_count_for_nothing(monkeypatch):
    clock = iter([1.0, 2.0, 2.0, 102.0, 104.0])
    monkeypatch.setattr(step_runs.time, "perf_counter", lambda: next(clock))
    watch = step_runs.Stopwatch()
    watch.step_done()
    watch.step_done()
    with watch.paused():
        pass
    watch.step_done()
    assert watch.ends == [1.0, 2.0, 4.0]
    assert watch.result(10, step_runs.Length(1, 2))["pairs_per_s"] == pytest.approx(20 / 3)


def test_the_summary_has_the_promised_keys():
    def result(speed: float) -> dict:
        return {"pairs_per_s": speed, "peak_rss_bytes": 1, "cached": False}

    parts = step_runs.shares(
        {"with_queue": 3.0, "without_queue": 2.5, "enqueue": 0.1, "ema": 0.2, "forward": 1.0}, 10.0
    )
    sides = {"ours": 8.0, "st_tuned": 4.0, "st_defaults": 2.0, "ours_with_memory": 6.0}
    figures = step.summary({side: [result(speed) | {"shares": parts}] for side, speed in sides.items()})
    assert figures["over_st_equal_precision"]["median"] == 2.0
    assert figures["over_st_defaults"]["median"] == 4.0
    assert figures["queue_share_of_step"]["median"] == pytest.approx(0.06)
    assert figures["ema_share_of_step"]["median"] == pytest.approx(0.02)
    assert figures["momentum_forward_share_of_step"]["median"] == pytest.approx(0.1)


# benchmarks/negatives.py


def test_negatives_are_compared_with_the_side_of_ours_that_does_the_same():
    def result(size: float) -> dict:
        return dict.fromkeys(("tensor_bytes", "rss_bytes", "wire_bytes", "seconds_per_step", "kept_bytes"), size)

    sizes = {"ours": 2.0, "ours_in_batch": 1.0, **dict.fromkeys(negatives.WITH_QUEUE, 8.0)}
    runs = {side: [result(sizes.get(side, 3.0))] for side in negatives_sides.SIDES}
    figures = negatives.summary(runs)
    for ratio in ("memory_ratio", "bytes_ratio", "time_ratio"):
        medians = {peer: figure["median"] for peer, figure in figures[ratio].items()}
        assert medians == dict.fromkeys(negatives.WITH_QUEUE, 4.0) | dict.fromkeys(negatives.IN_BATCH, 3.0)


def test_help_of_negatives_tells_what_is_measured_without_importing_what_measures():
    test_help_tells_what_is_measured_without_importing_what_measures("negatives")


SETTING = negatives.Setting(workers=2, dim=8, batch=6, rows=12)


def _steps(name: str, steps: int, rows: int = SETTING.rows):
    """On a rank: each step's embeddings and their gradients; bytes that a step sends; the queue, if replicated."""
    group = Group()
    torch.manual_seed(group.rank)
    side = negatives_sides.SIDES[name](replace(SETTING, rows=rows), group)
    seen = []
    group.reset_traffic()
    for _ in range(steps):
        queries, documents = (negatives_sides.random_rows(3, 8).requires_grad_() for _ in range(2))
        side.step(queries, documents)
        seen.append((queries.detach(), documents.detach(), queries.grad, documents.grad))
    sent = sum(group.traffic.values()) / steps + side.broadcast
    return seen, sent, side._loss.module.queue.clone() if name.startswith("replicated") else None


def _first_step(ranks):
    """Everyone's embeddings as leaves, in float64, and the gradients that the ranks found."""
    (queries, documents, *found) = (torch.cat([seen[0][i] for seen, *_ in ranks]).double() for i in range(4))
    return queries.requires_grad_(), documents.requires_grad_(), *found


@pytest.mark.parametrize("name", ["gathered", "gathered_local", "gathered_with_gradient"])
def test_gathered_peers_give_the_gradient_that_their_mechanism_gives(gloo, name):
    queries, documents, of_queries, of_documents = _first_step(gloo(2, _steps, name, 1))
    logits, target = queries @ documents.T / negatives_sides.TEMPERATURE, torch.arange(6)
    there = torch.nn.functional.cross_entropy(logits, target)
    back = torch.nn.functional.cross_entropy(logits.T, target)
    # a mean over the own rows only is W times as large a gradient, which data parallelism averages
    loss = {"gathered": (there + back) / 2, "gathered_local": there + back, "gathered_with_gradient": 2 * there}[name]
    loss.backward()
    assert queries.grad is not None
    if name == "gathered_with_gradient":  # it normalises again: the gradient is orthogonal to the vector
        for x in (queries, documents):
            x.grad -= (x.grad * x).sum(1, keepdim=True) * x.detach()
    torch.testing.assert_close(of_queries, queries.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_documents, documents.grad, rtol=1e-4, atol=1e-5)


def _released(queries, documents):
    """On a rank: the gradients of Sentence Transformers' own loss, gathered."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    rank = Group().rank
    mine = [x[3 * rank : 3 * rank + 3].clone().requires_grad_() for x in (queries, documents)]
    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=20.0, gather_across_devices=True)
    loss.compute_loss_from_embeddings(mine, None).backward()
    return [x.grad for x in mine]


def test_gathered_with_gradient_is_what_sentence_transformers_releases(gloo):
    ranks = gloo(2, _steps, "gathered_with_gradient", 1)
    queries, documents, *found = _first_step(ranks)
    released = gloo(2, _released, queries.detach().float(), documents.detach().float())
    for i in range(2):
        theirs = torch.cat([gradients[i] for gradients in released]).double()
        torch.testing.assert_close(found[i], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["replicated", "replicated_quiet"])
def test_the_replicated_queue_is_the_same_everywhere_and_holds_the_newest_keys(gloo, name):
    ranks = gloo(2, _steps, name, 3)
    (steps, _, queue), (others, _, other_queue) = ranks
    newest = [torch.cat([a[1], b[1]]) for a, b in zip(steps, others, strict=True)]
    expected = torch.cat([newest[2], newest[1]])  # the third batch is where the first was
    if name == "replicated":
        assert torch.equal(queue, other_queue)
    assert torch.equal(queue.T, expected)
    torch.manual_seed(0)
    stored = negatives_sides.random_rows(12, 8).double()  # what rank 0 began with
    queries, documents, found, of_documents = steps[0]
    queries = queries.double().requires_grad_()
    logits = torch.cat([(queries * documents).sum(1, keepdim=True), queries @ stored.T], 1) / 0.05
    torch.nn.functional.cross_entropy(logits, torch.zeros(3, dtype=torch.int64)).backward()
    torch.testing.assert_close(found.double(), queries.grad, rtol=1e-4, atol=1e-5)
    assert of_documents is None


def test_bytes_sent_are_those_of_the_formulas(gloo):
    def sent(name: str, rows: int = SETTING.rows) -> float:
        return sum(sent for _, sent, _ in gloo(2, _steps, name, 2, rows)) / 2

    for name in negatives.IN_BATCH:
        assert sent(name) == negatives.at_least(name, SETTING)["wire_bytes"]
    nothing = {"tensor_bytes": 0.0, "kept_bytes": 0.0, "wire_bytes": 0.0}
    assert sent("replicated") == negatives.computed("replicated", SETTING, SETTING, nothing)["wire_bytes"]
    vectors = 2 * 4 * 6 * 8 / 2
    assert vectors < sent("ours") < vectors + 1000  # ids and scalars of 6 queries
    assert sent("ours") == sent("ours", rows=600)


def test_memory_is_that_of_the_formulas():
    base, larger = negatives.Setting(1, 64, 32, 8192), negatives.Setting(1, 64, 32, 32768)
    for name in ("ours", "replicated"):
        counted, found = (negatives_sides.memory_of(name, setting, 1) for setting in (base, larger))
        told = negatives.computed(name, larger, base, counted)["tensor_bytes"]
        assert found["tensor_bytes"] == pytest.approx(told, rel=0.02)
    for name in negatives.IN_BATCH:
        alone = negatives.Setting(1, 64, 512, 0)
        least = negatives.at_least(name, alone)["tensor_bytes"]
        assert negatives_sides.memory_of(name, alone, 1)["tensor_bytes"] >= least


def test_a_side_runs_in_processes_of_its_own():
    found = negatives.run("ours", SETTING, 1, "time")
    assert found["seconds_per_step"] > 0
    assert found["wire_bytes"] > 0


def test_caching_is_compared_with_graphs_kept_in_the_same_round():
    seconds = {"ours_cached": 6.0, "ours_plain": 5.0, "st_cached": 9.0, "st_cached_whole": 14.0, "st_plain": 10.0}
    runs = {side: [{"seconds": s, "peak_rss_bytes": 1}] for side, s in seconds.items()}
    figures = caching.summary(runs, step_runs.Length(3, 2))
    assert figures["cached_over_plain"]["median"] == pytest.approx(1.2)
    assert figures["st_cached_over_plain"]["median"] == pytest.approx(0.9)
    assert figures["st_cached_whole_over_plain"]["median"] == pytest.approx(1.4)
    assert figures["seconds_per_step"]["st_plain"]["median"] == 5.0


def test_packing_is_compared_in_tokens_a_second_and_tokens_computed():
    def result(seconds: float, computed: int) -> dict:
        return {"seconds": seconds, "tokens": 100, "computed": computed, "peak_rss_bytes": 1}

    runs = {"random": [result(8.0, 300)], "sorted": [result(4.0, 105)], "packed": [result(2.0, 100)]}
    figures = padding.summary(runs)
    assert figures["packed_over_random"]["median"] == 4.0
    assert figures["packed_over_sorted"]["median"] == figures["sorted_over_random"]["median"] == 2.0
    assert figures["computed_per_token"] == {"random": 3.0, "sorted": 1.05, "packed": 1.0}


def test_a_suite_is_compared_in_seconds_and_by_its_scores():
    def result(seconds: float, score: float) -> dict:
        return {"seconds": seconds, "scores": dict.fromkeys(evaluate.TASKS, score)}

    figures = evaluate.summary({"ours": [result(2.0, 0.5)], "st": [result(6.0, 0.5 + 1e-5)]})
    assert figures["over_st_evaluators"]["median"] == 3.0
    assert figures["largest_difference"] == pytest.approx(1e-5)


# benchmarks/mine.py


def test_mining_is_compared_with_the_better_of_the_peers_settings():
    def result(seconds: float, peak: float) -> dict:
        return {"seconds": seconds, "peak_rss_bytes": peak, "base_rss_bytes": 1.0}

    sides = {"ours": result(10.0, 2.0), "st": result(20.0, 16.0), "st_faiss": result(40.0, 8.0)}
    figures = mine.summary({side: [found, found] for side, found in sides.items()})
    assert figures["memory_share"]["median"] == 0.25
    assert figures["time_ratio"]["median"] == 0.5


def test_mining_sides_are_compared_query_by_query(tmp_path):
    made = mine_sides.prepare(str(tmp_path), 20, 60)
    assert made["queries"] == 20
    assert 50 <= made["documents"] <= 60
    for side, found in {"ours": {"a": ["x"], "b": ["y", "z"], "c": []}, "st": {"a": ["x"], "b": ["z", "y"]}}.items():
        (tmp_path / f"{side}.json").write_text(json.dumps(found))
    assert mine_sides.compare(str(tmp_path), "st") == {"share": 2 / 3}


def test_embedding_compares_sides_of_one_round():
    runs = {"ours": [30.0, 20.0], "st": [20.0, 20.0], "st_best": [25.0, 20.0], "ours_ray": [50.0, 40.0]}
    figures = embed.summary(runs | {"st_pool": [25.0, 40.0]})
    assert figures["over_encode"] == {"median": 1.25, "min": 1.0, "max": 1.5}
    assert figures["over_best"]["max"] == 1.2
    assert figures["over_pool"]["max"] == 2.0
    assert figures["texts_per_s"]["st"]["median"] == 20.0


def test_the_server_is_compared_with_the_loop_of_its_round():
    def result(seconds: float, p95_ms: float = 0.0) -> dict:
        return {"texts": 100, "seconds": seconds, "p50_ms": p95_ms / 2, "p95_ms": p95_ms}

    runs = {"served": [result(2.0, 40), result(4.0, 60)], "loop": [result(3.0), result(4.0)]}
    figures = serve.summary(runs | {"whole": [result(1.0), result(2.0)]})
    assert figures["over_encode_loop"] == {"median": 1.25, "min": 1.0, "max": 1.5}
    assert figures["over_one_call"]["max"] == 0.5
    assert figures["p95_ms"] == {"median": 50, "min": 40, "max": 60}


def test_the_feed_is_compared_in_rows_a_second_tokenising_and_not():
    def result(speed: float) -> dict:
        return {"rows_per_s": speed, "first_batch_s": 10 / speed, "peak_bytes": 1, "cluster_start_s": 3.0}

    speeds = {"ours": 8.0, "dataloader": 4.0, "ray_data": 2.0, "streaming": 5.0, "tokenizer": 10.0}
    with_tokens = {side: [result(speed)] for side, speed in speeds.items()}
    without = {side: [result(10 * speed)] for side, speed in speeds.items() if side not in ("tokenizer", "streaming")}
    figures = data.summary({True: with_tokens, False: without})
    medians = {key: figures[key]["median"] for key in ("over_dataloader", "over_ray_data", "over_streaming")}
    assert medians == {"over_dataloader": 2.0, "over_ray_data": 4.0, "over_streaming": 1.6}
    assert figures["share_of_tokenizer"]["median"] == 0.8
    assert figures["first_batch_s"]["median"] == 1.25
    assert "over_streaming" not in figures["without_tokenising"]


def test_generated_rows_are_the_same_from_any_first_and_without_duplicates():
    pool = data_sides.sentences()
    table = data_sides.records(pool, 0, 500)
    assert table.slice(200, 100).to_pylist() == data_sides.records(pool, 200, 100).to_pylist()
    assert len(set(table["query"].to_pylist())) == len(set(table["query_id"].to_pylist())) == 500


def test_a_watch_counts_the_batches_after_those_that_warm_up():
    found = data_sides.measured(lambda: iter(range(100)), 10, 1000)
    assert found["rows_per_s"] > 0
    assert found["first_batch_s"] >= 0
    assert found["peak_bytes"] > 1 << 20


def test_a_delay_is_what_a_stretch_took_longer_and_the_copy_is_told_apart():
    stretches = {"without": [10.0, 20.0], "waited_for": [13.0, 22.0], "beside": [11.0, 21.0]}
    found = checkpoint.summary({"stretches": stretches, "copies": [0.5, 1.0], "steps": 10, "bytes": 7})
    assert found["delay_waited_for_s"] == {"median": 2.5, "min": 2.0, "max": 3.0}
    assert found["delay_beside_s"]["median"] == 1.0
    assert found["beside_beyond_copy_share_of_step"] == {"median": 0.25, "min": 0.0, "max": 0.5}
