"""The command line: exit codes, one sentence for each error, --json, and what a person sees."""

import errno
import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from cluster.console import Progress, duration, show_trained, step_line
from data_services.schema import Refused, RunError, UsageError

STEP = {"kind": "step", "steps": 300, "loss": 0.43128, "pairs_per_s": 1204.4, "tokens_per_s": 98000, "queue_age": None}


COMMANDS = {
    "mine": "DATA",
    "train": "RECIPE",
    "submit": "COMMAND",
    "jobs": "JOB",
    "stop": "JOB",
    "evaluate": "MODEL",
    "compare": "--suite",
    "models": "NAME",
    "promote": "VERSION",
    "rollback": "NAME",
    "serve": "MODEL",
    "export": "DIR",
    "query": "TEXT",
    "doctor": "--json",
    "checkpoints": "RUN",
    "data plan": "RECIPE",
}


def test_every_command_has_help_with_an_example(gyre):
    code, listed, _ = gyre("--help")
    assert code == 0
    for command, word in COMMANDS.items():
        assert command.split()[0] in listed
        code, text, _ = gyre(*command.split(), "--help")
        assert code == 0
        assert word in text
        assert f"gyre {command}" in text.replace("\n", " ")
        assert "--json" in text


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'ray', 'mlflow', 'transformers', 'deepspeed', 'numpy', 'pyarrow', 'pydantic'}"
    code = "import sys; from cluster.cli import app; app(['--help'], standalone_mode=False)"
    code += f"; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("set()")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["train", "absent.yaml"], 2, "absent.yaml: no such file"),
        (["trian"], 2, "No such command 'trian'"),
        (["train"], 2, "Missing argument"),
        (["promote", "name", "one"], 2, "VERSION"),
        (["query", "x", "--model", "m", "--k", "0"], 2, "--k"),
        (["query", "x", "--model", "nothing-like-it"], 2, "no run 'nothing-like-it'"),
        (["export", "nothing", "out"], 2, "no run 'nothing' under"),
        (["checkpoints", "nothing"], 2, "there are none yet"),
        (["doctor", "--json", "no/such/folder.json"], 2, "no such folder; name a file"),
        (["doctor", "--json", "."], 2, "this is a folder; name a file"),
    ],
)
def test_wrong_usage_exits_2_with_one_sentence_and_leaves_nothing(gyre, tmp_path, arguments, code, told):
    got, out, err = gyre(*arguments)
    assert (got, out) == (code, "")
    assert told in err
    assert "Traceback" not in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "code"), [(UsageError("a b"), 2), (RunError("a b"), 1), (Refused("a b"), 3)])
def test_the_errors_of_the_rooms_have_their_exit_codes(gyre, monkeypatch, error, code):
    def fail():
        raise error

    monkeypatch.setattr("cluster.doctor.examine", fail)
    assert gyre("doctor") == (code, "", "gyre: a b\n")


def test_an_unexpected_error_is_one_sentence_and_its_traceback_a_file(gyre, monkeypatch, tmp_path):
    monkeypatch.setattr("cluster.doctor.examine", lambda: {}["nothing\nhere"])
    code, out, err = gyre("doctor")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "gyre: unexpected KeyError" in err
    (log,) = (tmp_path / "home" / "logs").iterdir()
    assert str(log) in err
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize("file", [None, "vectors/part"])
def test_a_full_disk_is_a_sentence_whichever_command_meets_it(gyre, monkeypatch, file):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device", file)

    monkeypatch.setattr("cluster.doctor.examine", fail)
    where = f" of {file}" if file else ""
    told = f"gyre: no space left on the disk{where}; make room and run the same command again\n"
    assert gyre("doctor") == (1, "", told)


def test_an_interrupt_is_quiet(gyre, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.doctor.examine", interrupt)
    code, _, err = gyre("doctor")
    assert code != 0
    assert "Traceback" not in err


def test_doctor_writes_its_json_and_exits_1_on_a_problem(gyre, monkeypatch, tmp_path):
    code, out, _ = gyre("doctor", "--json", "d.json")
    assert code == 0
    assert "torch" in out
    assert json.loads((tmp_path / "d.json").read_text())["healthy"]
    monkeypatch.setattr("cluster.doctor.PACKAGES", ("no-such-package",))
    assert gyre("doctor")[0] == 1


def test_submit_hands_the_rest_of_the_line_over_untouched(gyre, monkeypatch):
    from cluster.jobs import JobResult

    seen = []

    def submit(command, **options):
        seen.append((command, options))
        return JobResult("job_1", "FAILED", 3)

    monkeypatch.setattr("cluster.jobs.submit", submit)
    wanted = {"address": "http://h", "name": "nightly", "install": False, "detach": False}
    command = ["train", "r.yaml", "--resume", "abc", "a.b=1", "--json", "x"]
    code, out, _ = gyre("submit", "--address", "http://h", "--name", "nightly", *command)
    assert code == 3
    assert seen == [(command, wanted)]
    assert "job job_1 failed" in out


def test_train_hands_over_the_recipe_and_says_what_to_type_next(gyre, monkeypatch, tmp_path):
    from cluster import launch

    rows = {"bm25": {"ndcg@10": 0.37}, "trained": {"ndcg@10": 0.42}}
    result = launch.TrainResult(
        run_id="small-1",
        checkpoint="c",
        export="e",
        model_name="small",
        model_version=3,
        aliases=("candidate",),
        gate="every gate passed",
        metrics=rows,
        validation=rows,
        over_bm25={},
        throughput={},
        seconds={},
        world_size=1,
        zero_stage=2,
        workers=[],
        faults={},
    )
    seen = []

    def train(recipe, *, resume, from_step, on_progress):
        seen.append((recipe.seed, resume, from_step))
        on_progress({"kind": "phase", "text": "preparing [data]"})
        for step in (1, 2, 300):
            on_progress({**STEP, "step": step, "eta_s": 75})
        on_progress({"kind": "table", "title": "heldout split", "rows": rows})
        return result

    monkeypatch.setattr(launch, "train", train)
    (tmp_path / "r.yaml").write_text(
        "name: small\nmodel: {path: m}\ndata: {sources: [{path: 'builtin:stdlib-code'}], steps: 3}\n"
    )
    code, out, err = gyre("train", "r.yaml", "seed=7", "--resume", "small-1", "--from-step", "4", "--json", "out.json")
    assert (code, err) == (0, "")
    assert seen == [(7, "small-1", 4)]
    for text in ("preparing [data]", "step 1/300", "step 300/300", "0.4200", "gyre query", "gyre report small-1"):
        assert text in out
    assert "step 2/300" not in out, "plain lines come every few seconds"
    assert json.loads((tmp_path / "out.json").read_text())["metrics"] == rows


def test_a_terminal_has_one_live_line():
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(screen) as progress:
        for step in range(1, 4):
            progress({**STEP, "step": step, "eta_s": 75})
        progress({"kind": "table", "rows": {"bm25": {"ndcg@10": 0.37}}})
    text = screen.file.getvalue()
    assert "step 3/300" in text
    assert "BM25" in text


def test_plain_lines_follow_the_clock():
    now = [0.0]
    console = Console(file=io.StringIO(), width=40)
    progress = Progress(console, clock=lambda: now[0])
    for step in range(1, 13):
        progress({**STEP, "step": step, "eta_s": 1})
        now[0] += 1
    lines = console.file.getvalue().splitlines()
    assert [line.split(" ·")[0] for line in lines] == ["step 1/300", "step 6/300", "step 11/300"]


def test_parts_of_a_conversion_are_shown_with_the_time_that_is_left():
    now = [0.0]
    console = Console(file=io.StringIO(), width=80)
    progress = Progress(console, clock=lambda: now[0])
    for finished, parts in ((1, 1), (3, 3), (1, 3), (2, 3), (3, 3), (0, 2)):  # the first two were there before
        progress({"kind": "parts", "finished": finished, "parts": parts})
        now[0] += 10
    assert console.file.getvalue().splitlines() == ["part 1/3", "part 2/3 · ETA 10 s", "part 3/3 · ETA 0 s", "part 0/2"]


def test_the_step_line_leaves_out_what_is_not_known():
    assert step_line({**STEP, "step": 120, "eta_s": 75}) == (
        "step 120/300 · loss 0.4313 · 1,204 pairs/s · 98,000 tokens/s · ETA 1:15"
    )
    assert "queue age 3.5" in step_line({**STEP, "step": 1, "queue_age": 3.5})
    assert [duration(s) for s in (44.6, 60, 3723)] == ["45 s", "1:00", "1:02:03"]


def test_a_home_of_the_recipes_own_is_part_of_what_to_type_next(tmp_path, monkeypatch):
    monkeypatch.setenv("GYRE_HOME", str(tmp_path / "one"))
    result = {
        "run_id": "r",
        "checkpoint": "c",
        "export": "e",
        "model_name": "m",
        "model_version": 1,
        "aliases": [],
        "gate": "",
    }
    for root, named in ((tmp_path / "one", False), (tmp_path / "two", True)):
        console = Console(file=io.StringIO(), width=200)
        show_trained(console, result, root)
        assert ("export GYRE_HOME" in console.file.getvalue()) is named
        assert str(root / "mlflow.db") in console.file.getvalue()
