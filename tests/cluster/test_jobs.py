"""`gyre submit` ships the tree without what is local or secret, and ends as the job ended."""

import asyncio
import json
import os
import re
import shlex
import subprocess
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from cluster.jobs import follow, list_jobs, stop, submission, submit
from cluster.jobs.secrets import secrets_here
from cluster.jobs.server import dashboard_address
from cluster.jobs.submission import commands, prepare
from cluster.jobs.tree import collect, pack
from data_services.schema import RunError, UsageError

SECRET = "s3cr3t-0123456789abcdef"


@pytest.fixture(autouse=True)
def _no_shell_of_the_users(monkeypatch, tmp_path):
    for name in [*os.environ]:
        if name.startswith(("RAY_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def tree(tmp_path):
    return write(tmp_path / "tree", {"cluster/cli.py": "", "recipes/quickstart.yaml": "name: quick"})


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def shipped(tree):
    return [path.as_posix() for path in collect(tree).files]


def test_the_entry_point_is_the_command_quoted(tree, monkeypatch):
    monkeypatch.setenv("GYRE_HOME", "/shared/runs")
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    command = ["query", "two words", "--model", "a b"]
    made = prepare(command, tree)
    assert shlex.split(made.entrypoint) == ["python", "-m", "cluster.cli", *command]
    assert made.runtime_env["env_vars"]["GYRE_HOME"] == "/shared/runs"
    assert SECRET not in str(made)


def test_every_command_can_be_submitted_but_those_of_the_job_server():
    assert {"train", "search", "embed", "mine", "data", "evaluate", "compare", "doctor"} <= set(commands())
    assert not {"submit", "jobs", "stop"} & set(commands())


def test_what_is_local_stays_here(tree):
    local = (".git/config", ".venv/bin/python", "runs/mlflow.db", "cluster/__pycache__/cli.pyc", "build/x")
    write(tree, dict.fromkeys(local, "x"))
    assert shipped(tree) == ["cluster/cli.py", "recipes/quickstart.yaml"]


def test_gitignore_leaves_out_what_git_leaves_out(tree):
    """Nested files, negations, anchors and folders, against git itself."""
    rules = {".gitignore": "*.log\n/data/\n!kept.log\nscratch\n", "sub/.gitignore": "!*.log\n/only-here\ndeep/**/x\n"}
    names = (
        *("a.log", "kept.log", "data/rows.jsonl", "sub/data/rows.jsonl", "sub/b.log", "sub/only-here", "only-here"),
        *("scratch/notes", "sub/scratch", "sub/deep/1/2/x", "sub/deep/y", "sub/sub/only-here", "sub/sub/c.log"),
    )
    write(tree, rules | dict.fromkeys(names, "x"))
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    there = subprocess.run(listed, cwd=tree, capture_output=True, text=True, check=True).stdout.split()
    assert sorted(shipped(tree)) == sorted(there)
    assert "sub/b.log" in there
    assert "data/rows.jsonl" not in there


def test_secrets_and_links_out_of_the_tree_stay_here_and_are_named(tree, tmp_path):
    secret = write(tmp_path / "elsewhere", {"id_rsa": "key", "data/rows.jsonl": "{}"})
    write(tree, {".env": "x", ".env.example": "x", "deploy/tls.key": "x", ".ssh/config": "x"})
    (tree / "notes.txt").symlink_to(secret / "id_rsa")
    (tree / "data").symlink_to(secret / "data")
    (tree / "inside.yaml").symlink_to("recipes/quickstart.yaml")
    (tree / "settings").symlink_to(".env")
    found = collect(tree)
    assert shipped(tree) == [".env.example", "cluster/cli.py", "inside.yaml", "recipes/quickstart.yaml"]
    assert found.kept_back == {
        ".env": "named like a secret",
        ".ssh": "named like a secret",
        "data": "a link out of the tree",
        "deploy/tls.key": "named like a secret",
        "notes.txt": "a link out of the tree",
        "settings": "a link to a secret",
    }
    assert "4 files, 0.0 MiB; left out: .env (named like a secret), " in str(found)


def test_a_file_or_a_command_that_holds_a_secret_of_this_shell_is_refused(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("TEAM_API_KEY", SECRET)
    secrets = secrets_here()
    write(tree, {"recipes/mine.yaml": f"name: mine\n# {SECRET}\n"})
    with pytest.raises(UsageError, match=r"recipes/mine.yaml holds the value of TEAM_API_KEY") as told:
        pack(collect(tree), tmp_path / "tree.zip", secrets)
    assert SECRET not in str(told.value)
    with pytest.raises(UsageError, match="the command line holds the value of TEAM_API_KEY"):
        prepare(["train", f"name={SECRET}"], tree)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:pass@mlflow.example.org")
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_URI holds a password") as told:
        prepare(["doctor"], tree)
    assert "pass@" not in str(told.value)


def test_the_token_file_counts_as_a_secret_and_a_path_does_not(tmp_path, monkeypatch):
    (tmp_path / "no-token").write_text(SECRET + "\n")
    monkeypatch.setenv("SHORT_TOKEN", "dev")
    assert secrets_here() == {SECRET: str(tmp_path / "no-token")}


def test_the_same_files_make_the_same_package(tree, tmp_path):
    first = pack(collect(tree), tmp_path / "a.zip", {})
    os.utime(tree / "cluster" / "cli.py", (0, 10**9))
    second = pack(collect(tree), tmp_path / "b.zip", {})
    assert first.read_bytes() == second.read_bytes()
    assert zipfile.ZipFile(first).namelist() == shipped(tree)


def test_a_tree_over_the_limit_is_refused_with_its_largest_files(tree):
    write(tree, {"data/big.jsonl": "x" * 3000, "notes": "x" * 1000})
    with pytest.raises(UsageError, match=r"the largest: data/big\.jsonl \(0\.0 MiB\), notes .*\.gitignore"):
        collect(tree, limit_bytes=3500)
    (tree / ".gitignore").write_text("/data/\n")
    assert "notes" in shipped(tree)


def test_the_environment_of_the_lock_is_named_by_its_lines(tree):
    with pytest.raises(UsageError, match=r"requirements\.lock, which isn't there"):
        prepare(["doctor"], tree, install=True)
    write(tree, {"requirements.lock": "# made by hand\nnumpy==2.0 # why\n\ntorch==2.13.0\n"})
    assert prepare(["doctor"], tree, install=True).runtime_env["pip"]["packages"] == ["numpy==2.0", "torch==2.13.0"]
    assert "pip" not in prepare(["doctor"], tree).runtime_env


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("head:6379", "http://head:8265"),
        ("ray://head:10001", "http://head:8265"),
        ("auto", "http://127.0.0.1:8265"),
        ("https://head/ray/", "https://head/ray"),
    ],
)
def test_the_job_server_is_found_from_the_address(monkeypatch, given, address):
    assert dashboard_address(given) == address
    monkeypatch.setenv("RAY_ADDRESS", given)
    assert dashboard_address() == address


def test_wrong_use_is_one_sentence(tree, tmp_path):
    with pytest.raises(UsageError, match="which cluster"):
        submit(["doctor"], tree=tree)
    with pytest.raises(UsageError, match="'trian' can't be submitted; did you mean train"):
        submit(["trian"], tree=tree)
    with pytest.raises(UsageError, match="no working tree"):
        submit(["doctor"], tree=tmp_path / "tree" / "cluster")
    for call in (lambda **o: submit(["doctor"], tree=tree, **o), list_jobs, lambda **o: stop("x", **o)):
        with pytest.raises(UsageError, match="no job server answers at http"):
            call(address="http://127.0.0.1:1")


@pytest.fixture
def server():
    """An HTTP server on loopback that says what `answers` holds, {path: (status, JSON)}; gives (address, answers)."""
    answers = {"/api/version": (200, {"ray_version": "2.60.0", "ray_commit": "", "session_name": "s"})}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answers.get(self.path, (404, {}))
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}", answers
        listening.shutdown()
        thread.join()


def test_the_address_that_is_given_goes_before_the_shells(server, monkeypatch):
    address, answers = server
    answers["/api/jobs/"] = (200, [])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert list_jobs(address) == []
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, {}, "doesn't take this shell's token: it wants RAY_AUTH_MODE=token"),
        (403, {}, "doesn't take this shell's token"),
        (200, {"hello": "world"}, "is no job server of Ray"),
        (500, {}, "is no job server of Ray"),
    ],
)
def test_a_server_that_refuses_or_is_another_is_one_sentence(server, status, body, told):
    address, answers = server
    answers["/api/version"] = (status, body)
    with pytest.raises(UsageError, match=re.escape(told)):
        list_jobs(address)


class FakeClient:
    """A job whose log comes in pieces and whose status is final a moment after its log ends."""

    message = exit_code = None

    def __init__(self, *_):
        self.statuses = iter(["RUNNING", "FAILED"])

    def submit_job(self, **submitted):
        self.submitted = submitted
        return "raysubmit_1"

    async def tail_job_logs(self, _job):
        for piece in ("first li", "ne\nsecond\nthi", "rd"):
            await asyncio.sleep(0)
            yield piece

    def get_job_status(self, _job):
        from ray.job_submission import JobStatus

        return JobStatus(next(self.statuses))

    def get_job_info(self, _job):
        return SimpleNamespace(driver_exit_code=self.exit_code, message=self.message)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", FakeClient)
    monkeypatch.setattr("cluster.jobs.server._check_reachable", lambda where: None)
    monkeypatch.setattr("cluster.jobs.running.POLL_S", 0)
    return FakeClient


def test_the_log_is_streamed_by_lines_and_the_exit_code_is_the_jobs(tree, fake, monkeypatch):
    monkeypatch.setattr(fake, "exit_code", 3)
    lines = []
    ended = submit(["doctor"], address="http://x", tree=tree, on_log=lines.append)
    assert lines == [
        *("shipping 2 files, 0.0 MiB", "job raysubmit_1 submitted"),
        *("first line", "second", "third"),
    ]
    assert (ended.status, ended.exit_code) == ("FAILED", 3)
    left = submit(["doctor"], address="http://x", tree=tree, detach=True)
    assert (left.status, left.exit_code) == ("PENDING", None)


def test_a_job_that_never_ran_says_why(tree, fake, monkeypatch):
    monkeypatch.setattr(fake, "message", "runtime_env setup failed:\n no such package")
    with pytest.raises(RunError, match="could not be run: runtime_env setup failed: no such package"):
        submit(["doctor"], address="http://x", tree=tree, on_log=lambda line: None)


def test_jobs_are_listed_newest_first_and_found_by_a_beginning(fake, monkeypatch):
    rows = [("abc-1", 1000), ("abd-2", 3000), ("xyz", 2000), (None, 9000)]
    listed = [
        SimpleNamespace(submission_id=name, status="RUNNING", entrypoint=started, start_time=at, end_time=None)
        for (name, at), started in zip(rows, ["python -m cluster.cli train 'a b'", "sleep 9", "x", "y"], strict=True)
    ]
    monkeypatch.setattr(fake, "list_jobs", lambda self: listed, raising=False)
    assert [row.job_id for row in list_jobs("http://x")] == ["abd-2", "xyz", "abc-1"]
    assert list_jobs("http://x")[2].command == "gyre train 'a b'"
    with pytest.raises(UsageError, match="'ab' is ambiguous: abd-2, abc-1"):
        stop("ab", address="http://x")
    with pytest.raises(UsageError, match="no job 'nightly' on this cluster; the newest there: abd-2, xyz, abc-1"):
        follow("nightly", address="http://x")


def test_a_name_that_is_taken_is_said(tree, fake, monkeypatch):
    def taken(self, **_):
        raise RuntimeError("Request failed: ValueError: Job with submission_id nightly already exists. Please")

    monkeypatch.setattr(fake, "submit_job", taken)
    with pytest.raises(UsageError, match="there is a job 'nightly' already"):
        submit(["doctor"], address="http://x", tree=tree, name="nightly")


def test_a_head_that_has_no_agent_yet_is_tried_again(tree, fake, monkeypatch):
    answers = iter([RuntimeError("No available agent to submit job"), RuntimeError("disk full\nmore")])

    def refuse(self, **_):
        raise next(answers)

    monkeypatch.setattr(fake, "submit_job", refuse)
    monkeypatch.setattr(submission, "AGENT_TIMEOUT_S", 60)
    with pytest.raises(RunError, match=r"http://x refused: disk full$"):
        submit(["doctor"], address="http://x", tree=tree)
