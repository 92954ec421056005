"""The page of a run: how it trained, what the model is worth, what it gets right and wrong, what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from cluster.console import duration
from cluster.reports.evidence import RunEvidence, Steps
from evaluation.axes import number
from evaluation.charts import line_chart, path_chart
from evaluation.distributions import histogram_chart, interval_chart
from evaluation.look import Example, Look
from evaluation.page import columns, command, example, item, page, paragraph, section, table, tiles
from evaluation.report import label, results_cells

# Curves by section; what is logged beside these has its own.
TRAINING = ("loss", "accuracy", "grad_norm", "lr")
SPEED = ("pairs_per_s", "tokens_per_s", "mfu", "peak_memory_bytes", "traffic_bytes")
ELSEWHERE = ("padding_share", "data_wait_s", "seconds", "alignment", "uniformity", "nothing_to_compare", "rows_hash")
_PATH_POINTS = 40
_NAMES = {
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "pairs_per_s": "pairs a second",
    "tokens_per_s": "tokens a second",
    "mfu": "share of the device's measured peak",
    "peak_memory_bytes": "peak memory, bytes",
    "traffic_bytes": "bytes sent by a worker in a step",
    "queue_rows": "rows in the queue",
    "queue_age_steps": "mean age of a queue row, steps",
    "queue_hardness": "queue's share of the denominator",
    "queue_duplicates": "share of queue rows that another row equals",
    "queue_separability": "how well queue rows are told from fresh ones",
}


def run_page(found: RunEvidence) -> str:
    """HTML."""
    made = [
        _summary(found),
        *(_scores(found, split) for split in found.splits),
        _training(found),
        _speed(found.steps),
        _queue(found.steps),
        _space(found),
        *(_queries(split, look) for split, look in found.looks.items() if look.best),
        _cost(found),
        _environment(found.environment),
        _recipe(found),
    ]
    return page(f"Run {found.paths.run_id}", [part for part in made if part], _standing(found))


def _standing(found: RunEvidence) -> str:
    if found.result is None:
        reached = int(found.steps.numbers[-1]) + 1 if len(found.steps.numbers) else 0
        return f"{found.recipe.name}: under way, or stopped, after step {reached}"
    aliases = ", ".join(found.result["aliases"])
    return f"{found.result['model_name']} version {found.result['model_version']} ({aliases})"


def _summary(found: RunEvidence) -> str:
    steps, result = found.steps, found.result
    figures: dict[str, str] = {}
    for split, rows in found.splits.items():
        if "trained" in rows:
            figures[f"{label(found.metric)}, {split}"] = f"{rows['trained'][found.metric]:.4f}"
    if result and (over := result["over_bm25"].get(found.recipe.evaluation.heldout or "")):
        figures["over BM25"] = f"{over['difference']:+.4f}"
    if len(steps.numbers):
        figures |= {"steps": f"{len(steps.numbers):,}", "last loss": number(float(steps.values["loss"][-1]))}
    if result:
        figures["pairs a second"] = f"{result['throughput']['pairs_per_s']:,.0f}"
        figures["time in all"] = duration(result["seconds"]["total"])
    gate = result["gate"] if result else ""
    lines = [paragraph(f"{gate[0].upper()}{gate[1:]}.")] if gate else []
    return section("What came out", tiles(figures), *lines) if figures else ""


def _scores(found: RunEvidence, split: str) -> str:
    rows = found.splits[split]
    over = {f"over {label(other)}": its for other, its in found.differences.get(split, {}).items()}
    blocks = [table(*results_cells(rows))]
    if over:
        caption = "Trained less the other, over the same queries: 95 % intervals of a paired bootstrap."
        what = f"difference in {label(found.metric)}"
        lines = [
            [name, f"{d.difference:+.4f}", f"{d.low:+.4f}\u00a0…\u00a0{d.high:+.4f}", f"{d.p:.2g}"]
            for name, d in over.items()
        ]
        drawn = {name: (d.low, d.difference, d.high) for name, d in over.items()}
        blocks += [interval_chart(drawn, what, caption=caption), table(["trained", what, "95 % interval", "p"], lines)]
    if probes := (found.result or {}).get("probes", {}).get(split):
        blocks += [paragraph("A linear probe and nearest neighbours on these vectors:"), _by_model("probe", probes)]
    return section(f"Scores on {split}", *blocks)


def _training(found: RunEvidence) -> str:
    steps = found.steps
    others = [n for n in steps.names if n not in {*TRAINING, *SPEED, *ELSEWHERE} and not n.startswith("queue")]
    names = [*TRAINING, *(name for name in others if _moves(steps, name))]
    if steps.total("nothing_to_compare"):
        names.append("nothing_to_compare")
    charts = list(_curves(steps, names))
    metrics = list(next(iter(found.watched.values()), {}))
    if metrics:
        lines = {label(name): [(float(step), its[name]) for step, its in found.watched.items()] for name in metrics}
        split = found.recipe.evaluation.validation
        charts.append(line_chart(lines, "step", "score", caption=f"The {split} split, scored beside training."))
    return section("Training", columns(*charts)) if charts else ""


def _speed(steps: Steps) -> str:
    if not len(steps.numbers):
        return ""
    charts = list(_curves(steps, [name for name in SPEED if _moves(steps, name)]))
    shares = {"padding": steps.curve("padding_share"), "waiting for data": _wait_share(steps)}
    caption = "Padding: of the tokens computed. Waiting: of the step's time, on the slowest worker."
    charts.insert(1, line_chart({k: v for k, v in shares.items() if v}, "step", "share", caption=caption))
    return section("Speed", columns(*charts))


def _wait_share(steps: Steps) -> list[tuple[float, float]]:
    waits, seconds = steps.curve("data_wait_s"), steps.curve("seconds")
    return [(step, wait / whole) for (step, wait), (_, whole) in zip(waits, seconds, strict=True) if whole > 0]


def _queue(steps: Steps) -> str:
    charts = list(_curves(steps, [n for n in steps.names if n.startswith("queue") and _moves(steps, n)]))
    return section("Negative queue", columns(*charts)) if charts else ""


def _space(found: RunEvidence) -> str:
    """Alignment, uniformity, similarities: the vectors as a cloud."""
    points, names = found.steps.path("uniformity", "alignment", _PATH_POINTS)
    caption = "Each batch's own, from the first step to the last; the lower left is better (Wang & Isola 2020)."
    charts = [path_chart(points, names, "uniformity", "alignment", caption=caption)] if points else []
    for split, look in found.looks.items():
        for model, its in look.similarities.items():
            told = f"Cosines on {split}, {model}: a query with what answers it, and with all that doesn't."
            pairs = {"pairs": its.positives, "everything else": its.negatives}
            charts.append(histogram_chart(pairs, -1, 1, f"cosine, {model}", caption=told))
    tables = [
        block
        for split, look in found.looks.items()
        if look.geometry
        for block in (paragraph(f"Geometry on {split}:"), _by_model("figure", look.geometry))
    ]
    return section("The space", columns(*charts), *tables) if charts or tables else ""


def _queries(split: str, look: Look) -> str:
    told = paragraph(f"Of {split}, by {label(look.metric)} of the trained model, then by how clear the answer was.")
    return section(
        "Queries it answers best and worst",
        told,
        *(_example("best", its) for its in look.best),
        *(_example("worst", its) for its in look.worst),
    )


def _example(kind: str, its: Example) -> str:
    place = f"right answer at {its.place}" if its.place else "right answer not found"
    asked = item(f"{kind} · {place}", its.query.text, its.query.picture)
    answers = (
        []
        if its.place and its.place <= len(its.hits)
        else [item("what answers it", its.answer.text, its.answer.picture, True)]
    )
    hits = [
        item(
            f"hit {rank}" + (f" · {hit.similarity:.3f}" if hit.similarity is not None else ""),
            hit.item.text,
            hit.item.picture,
            hit.right,
        )
        for rank, hit in enumerate(its.hits, 1)
    ]
    return example(asked, [*answers, *hits])


def _cost(found: RunEvidence) -> str:
    steps, result, cluster = found.steps, found.result, found.recipe.cluster
    if not len(steps.numbers):
        return ""
    seconds = steps.total("seconds")
    pairs = sum(steps.values["pairs_per_s"] * steps.values["seconds"])
    tokens = sum(steps.values["tokens_per_s"] * steps.values["seconds"])
    rows = {
        "workers": f"{cluster.workers} × {cluster.cpus_per_worker} CPU, {cluster.gpus_per_worker:g} GPU",
        "time in steps": duration(seconds),
        "worker-hours in steps": f"{seconds * cluster.workers / 3600:,.2f}",
        "pairs trained on": f"{pairs:,.0f}",
        "tokens": f"{tokens:,.0f}",
        "bytes sent, all steps": f"{steps.total('traffic_bytes'):,.0f}",
    }
    if result:
        rows["to the first step"] = duration(result["seconds"]["to_first_step"])
        rows["command, evaluation included"] = duration(result["seconds"]["total"])
        rows["peak memory of a worker"] = f"{result['throughput']['peak_memory_bytes'] / 1e9:,.2f} GB"
    chosen = {key: str(found.startup[key]) for key in ("precision", "cached", "reduction") if key in found.startup}
    return section("Cost", table(["what", "amount"], [[k, v] for k, v in (rows | chosen).items()]))


def _environment(environment: Mapping[str, Any]) -> str:
    if not environment:
        return ""
    named = {key: environment[key] for key in ("python", "platform", "cores", "memory_gib") if key in environment}
    named["accelerators"] = ", ".join(environment.get("accelerators", [])) or "none"
    rows = [[key, str(value)] for key, value in (named | environment.get("versions", {})).items()]
    return section("Environment", table(["of the command's machine", "version or amount"], rows))


def _recipe(found: RunEvidence) -> str:
    """What the recipe says beside the defaults; all of it is in the run's folder."""
    own = found.recipe.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(own, sort_keys=False, allow_unicode=True, width=100)
    return section("Recipe", paragraph(f"Without defaults; whole in {found.paths.recipe}."), command(text.rstrip()))


def _curves(steps: Steps, names: Iterable[str]) -> Iterable[str]:
    for name in names:
        if line := steps.curve(name):
            yield line_chart({name: line}, "step", _NAMES.get(name, name.replace("_", " ")))


def _moves(steps: Steps, name: str) -> bool:
    """Whether it ever changes: a constant needs no chart."""
    return len({value for _, value in steps.curve(name)}) > 1


def _by_model(what: str, figures: Mapping[str, Mapping[str, float]]) -> str:
    """A row a figure, a column a model."""
    names = list(dict.fromkeys(name for its in figures.values() for name in its))
    rows = [[_spelled(n), *(number(its[n]) if n in its else "" for its in figures.values())] for n in names]
    return table([what, *figures], rows)


def _spelled(figure: str) -> str:
    return figure.replace("block_", "pairs found by block ").replace("_", " ")
