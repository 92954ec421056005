"""`gyre COMMAND TARGET [key.path=value …]`: each command is a thin call of a typed function.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 refused by a gate. Everything heavy is
imported inside the commands, so that help answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.corpus import embed, mine
from cluster.commands.data import data_app
from cluster.commands.doctor import doctor
from cluster.commands.jobs import REST_OF_THE_LINE, jobs, stop, submit
from cluster.commands.options import Json, Model, Overrides, Recipe, check_json, open_console, write_json
from cluster.commands.plan import plan
from cluster.commands.registry import compare, list_models, promote, rollback
from cluster.commands.report import report
from cluster.commands.serve import serve

DONE, FAILED, WRONG, REFUSED = 0, 1, 2, 3

app = typer.Typer(
    name="gyre",
    help="Trains embedding models by contrastive learning on a Ray cluster; one machine is a cluster of one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(data_app, name="data")

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, the beginning of one, or its folder.")]


@app.command(epilog="Example: gyre train recipes/quickstart.yaml optimizer.lr=1e-3 --json result.json")
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue this run.")] = None,
    from_step: Annotated[
        int | None,
        typer.Option(metavar="STEP", help="With --resume: from the checkpoint of that step, not the newest."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Train, evaluate, register and export what a recipe says."""
    from cluster.config import load_recipe
    from cluster.console import Progress, show_trained
    from cluster.paths import run_home

    check_json(json_file)
    console, loaded = open_console(), load_recipe(recipe, overrides or [])
    from cluster import launch

    with Progress(console) as progress:
        result = launch.train(loaded, resume=resume, from_step=from_step, on_progress=progress).as_dict()
    write_json(json_file, result)
    show_trained(console, result, run_home(loaded.cluster.storage))


@app.command(epilog="Example: gyre search recipes/search-temperature.yaml search.trials=40 --json found.json")
def search(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(metavar="SEARCH", help="Continue this search.")] = None,
    json_file: Json = None,
) -> None:
    """Try other values of a recipe's keys in many short trainings; hand back the recipe that did best."""
    from cluster.config import load_recipe
    from cluster.search.show import SearchProgress, show_search
    from cluster.search.space import Space

    check_json(json_file)
    console, loaded = open_console(), load_recipe(recipe, overrides or [])
    from cluster.search import study

    objective = next(iter(Space(loaded).objectives)) if loaded.search else ""
    with SearchProgress(console, objective) as progress:
        result = study.search(loaded, resume=resume, where=recipe, on_progress=progress)
    write_json(json_file, result.as_dict())
    show_search(console, result)


app.command(
    context_settings=REST_OF_THE_LINE,
    epilog="Example: RAY_ADDRESS=http://head:8265 gyre submit train recipes/quickstart.yaml",
)(submit)
app.command(epilog="Examples: gyre jobs; gyre jobs raysubmit_3f --address http://127.0.0.1:8265")(jobs)
app.command(epilog="Example: gyre stop raysubmit_3f")(stop)


@app.command(epilog="Example: gyre evaluate models:/quickstart@champion --suite builtin:code")
def evaluate(
    model: Model,
    suite: Annotated[
        str, typer.Option(help="A suite's YAML, builtin:code, or a source of queries and documents.")
    ] = "builtin:stdlib-code",
    split: Annotated[str | None, typer.Option(help="Split of a source; none: heldout or test.")] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Cutoff of a source's metrics; none: 10.")] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL", help="Beside it; none: the champion, or the untrained model. `none`: BM25 alone."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that encode and search a large corpus.")] = 1,
    json_file: Json = None,
) -> None:
    """Score a model on a suite, beside BM25 and other models."""
    from cluster.console import Progress, show_evaluation
    from cluster.evidence import evaluating

    check_json(json_file)
    console = open_console()
    with Progress(console) as progress:
        job = evaluating.EvaluationJob(model, suite, split, k, tuple(baseline or ()), workers)
        found = evaluating.evaluate(job, on_progress=progress)
    write_json(json_file, found.result.model_dump() | {"folder": str(found.folder)})
    show_evaluation(console, found)


app.command(epilog="Example: gyre embed models:/quickstart@champion corpus.jsonl text=body title=title --out vectors")(
    embed
)
app.command(epilog="Example: gyre mine models:/quickstart@champion pairs.jsonl --out mined --relative-margin 0.05")(
    mine
)


app.command(epilog="Example: gyre compare models:/quickstart@champion models:/quickstart@candidate --suite team.yaml")(
    compare
)
app.command("models", epilog="Example: gyre models quickstart")(list_models)
app.command(epilog="Example: gyre promote quickstart 2 --gates team-gates.yaml --sign-off ann")(promote)
app.command(epilog="Example: gyre rollback quickstart")(rollback)
app.command(epilog="Example: gyre plan recipes/finetune_llm.yaml --nodes 4 --gpu-memory 80 --json plan.json")(plan)
app.command(epilog="Example: gyre report quickstart-2026 --out report.html")(report)
app.command(epilog="Example: gyre serve models:/quickstart@champion --port 8000")(serve)


@app.command(epilog="Example: gyre export models:/quickstart@champion models/mine --push-to-hub me/mine")
def export(
    model: Model,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="OWNER/NAME", help="Upload it to the Hugging Face hub too.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push-to-hub: a repository that all can read.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Copy a model out, as a Sentence Transformers folder with its model card."""
    from cluster import models
    from data_services.schema import UsageError

    check_json(json_file)
    if public and push_to_hub is None:
        raise UsageError("--public says how --push-to-hub makes the repository: give OWNER/NAME there")
    done = models.export(model, folder, push_to_hub=push_to_hub, public=public)
    write_json(json_file, done.as_dict())
    typer.echo(f"{done.folder}\nload it with SentenceTransformer({push_to_hub or str(done.folder)!r})")
    if done.url:
        typer.echo(done.url)


@app.command(
    epilog='Examples: gyre query "parse a date from a string" --model models:/quickstart@champion; '
    "gyre query --image cat.png --over photos --model models:/photos@champion"
)
def query(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="As for evaluate.")],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What to look for.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="A picture to look for, not a text.")] = None,
    corpus: Annotated[
        str, typer.Option("--corpus", "--over", help="A folder of text files and images, or the built-in corpus.")
    ] = "builtin:stdlib-code",
    k: Annotated[int, typer.Option(min=1, help="How many hits.")] = 5,
    json_file: Json = None,
) -> None:
    """Show the documents nearest to a text or a picture."""
    from cluster import models
    from cluster.console import show_hits

    check_json(json_file)
    console = open_console()
    found = models.query(
        text, model, corpus, k, on_progress=lambda line: console.print(line, highlight=False), image=image
    )
    write_json(json_file, found.as_dict())
    show_hits(console, found)


app.command(epilog="Examples: gyre doctor --json doctor.json; RAY_ADDRESS=head:6379 gyre doctor --cluster")(doctor)


@app.command(epilog="Example: gyre checkpoints 3f2a9c")
def checkpoints(run: Run, json_file: Json = None) -> None:
    """List and verify a run's checkpoints; exit 1 where one is damaged."""
    from cluster import models
    from cluster.console import show_checkpoints

    check_json(json_file)
    saved = models.checkpoints(run)
    write_json(json_file, [s.as_dict() for s in saved])
    show_checkpoints(open_console(), saved)
    if any(s.damage for s in saved):
        raise typer.Exit(FAILED)


def main() -> None:
    """The console script. A known error is one sentence; any other leaves its traceback in a file."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    try:
        app(prog_name="gyre")
    except Exception as error:  # noqa: BLE001  the last place that can turn it into a sentence
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    """Prints one sentence on standard error; returns the exit code."""
    from data_services.schema import Refused, RunError, UsageError

    codes = {UsageError: WRONG, RunError: FAILED, Refused: REFUSED}
    code = next((c for kind, c in codes.items() if isinstance(error, kind)), None)
    if code is not None:
        print(f"gyre: {error}", file=sys.stderr)
        return code
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" of {error.filename}" if error.filename else ""
        print(f"gyre: no space left on the disk{where}; make room and run the same command again", file=sys.stderr)
        return FAILED
    what = " ".join(f"{type(error).__name__}: {error}".split())
    print(f"gyre: unexpected {what[:300]} (traceback: {_save_traceback(error)})", file=sys.stderr)
    return FAILED


def _save_traceback(error: Exception) -> str:
    import tempfile
    import time
    import traceback

    from cluster.paths import log_folder

    text = "".join(traceback.format_exception(error))
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (log_folder(), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        except OSError:
            continue
        return str(folder / name)
    return "nowhere could be written"


if __name__ == "__main__":
    main()
