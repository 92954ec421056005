"""`gyre submit` ships the tree without what is local, and ends as the job ended."""

import asyncio
import shlex
from types import SimpleNamespace

import pytest

from cluster import jobs
from cluster.jobs import dashboard_address, prepare, submit
from data_services.schema import UsageError


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "cli.py").touch()
    return tmp_path


def test_the_entry_point_is_the_command_quoted(tree, monkeypatch):
    monkeypatch.setenv("GYRE_HOME", "/shared/runs")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    command = ["query", "two words", "--model", "a b"]
    made = prepare(command, tree)
    assert shlex.split(made.entrypoint) == ["python", "-m", "cluster.cli", *command]
    assert made.runtime_env["working_dir"] == str(tree)
    assert made.runtime_env["env_vars"]["GYRE_HOME"] == "/shared/runs"
    assert "secret" not in str(made)


def test_the_package_holds_the_tree_without_what_is_local(tree, tmp_path):
    from ray._private.runtime_env.packaging import _get_excludes

    excluded = _get_excludes(tree, prepare(["doctor"], tree).runtime_env["excludes"])
    for name in (".git/config", ".venv/bin/python", "runs/mlflow.db", "cluster/__pycache__/cli.pyc"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
        parents = [tree / name, *(tree / name).parents]
        assert any(excluded(p) for p in parents if p != tree and p.is_relative_to(tree)), name
    assert not excluded(tree / "cluster" / "cli.py")
    assert not excluded(tree / "recipes" / "quickstart.yaml")


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("head:6379", "http://head:8265"),
        ("ray://head:10001", "http://head:8265"),
        ("auto", "http://127.0.0.1:8265"),
        ("https://head/ray", "https://head/ray"),
    ],
)
def test_the_job_server_is_found_from_the_address(monkeypatch, given, address):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert dashboard_address(given) == address
    monkeypatch.setenv("RAY_ADDRESS", given)
    assert dashboard_address() == address


def test_wrong_use_is_one_sentence(tree, tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="submit where"):
        submit(["doctor"], tree=tree)
    with pytest.raises(UsageError, match="submit what"):
        submit(["trian"], tree=tree)
    with pytest.raises(UsageError, match="no working tree"):
        submit(["doctor"], tree=tmp_path / "cluster")
    with pytest.raises(UsageError, match="no job server answers at http"):
        submit(["doctor"], tree=tree, address="http://127.0.0.1:1")


class FakeClient:
    """A job whose log comes in pieces and whose status is final a moment after its log ends."""

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
        return SimpleNamespace(driver_exit_code=3)


def test_the_log_is_streamed_by_lines_and_the_exit_code_is_the_jobs(tree, monkeypatch):
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", FakeClient)
    monkeypatch.setattr(jobs.time, "sleep", lambda s: None)
    lines = []
    ended = submit(["doctor"], address="http://x", tree=tree, on_log=lines.append)
    assert lines == ["first line", "second", "third"]
    assert (ended.status, ended.exit_code) == ("FAILED", 3)
    left = submit(["doctor"], address="http://x", tree=tree, detach=True)
    assert (left.status, left.exit_code) == ("PENDING", None)
