"""A team's MLflow server: its own database, artifacts through its proxy, users and passwords; it goes and comes."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from cluster.registry import list_models, lock, model_folder, promote, register
from cluster.registry.champion import history_of, move_champion
from cluster.tracking import Tracker, client
from data_services.schema import Refused, RunError
from tests.e2e.commands import PATIENCE_S, SHELL

PASSWORD = "long-enough-secret"


class Server:
    """`mlflow server` in a process group of its own."""

    def __init__(self, folder):
        self.folder, self.artifacts = folder, folder / "artifacts"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        (folder / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\nadmin_username = admin\n"
            "grant_default_workspace_access = false\nauth_cache_ttl_seconds = 600\n"
        )
        self.env = SHELL | {
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "key of a test",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a dozen processes of its own
            "OMP_NUM_THREADS": "1",
        }
        self.process = None

    def start(self):
        arguments = ["--app-name", "basic-auth", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        stores = [f"--backend-store-uri=sqlite:///{self.folder}/mlflow.db", f"--artifacts-destination={self.artifacts}"]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *arguments, *stores],
                cwd=self.folder,
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            time.sleep(0.1)
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def stop(self):
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def team(server, tmp_path, monkeypatch):
    """A home whose store is the server; leases there are as patient as a slow machine needs."""
    for name in ("STALE_S", "HOLD_S", "WAIT_S"):
        monkeypatch.setattr(lock, name, PATIENCE_S)
    for key, value in {
        "MLFLOW_TRACKING_URI": server.uri,
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
        "GYRE_HOME": str(tmp_path / "home"),
    }.items():
        monkeypatch.setenv(key, value)
    return tmp_path / "home"


@pytest.fixture
def add(team, tmp_path):
    def _add(name, run_id=None):
        folder = tmp_path / "export"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"of": name}))
        run_id = run_id or Tracker.start("exp", "run", {}).run_id
        return register(name, folder, run_id=run_id, scores={"validation": {}}, gate=None, tags={})

    return _add


def champion(name):
    return int(client().get_registered_model(name).aliases["champion"])


def test_a_version_goes_there_and_comes_back_whole(team, add, server):
    add("whole")
    second = add("whole")
    assert promote("whole", 2).previous == 1
    assert second.source.startswith("mlflow-artifacts:")
    folder, version = model_folder("models:/whole@champion")
    assert version.version == 2
    assert json.loads((folder / "config.json").read_text()) == {"of": "whole"}
    assert folder.is_relative_to(team / "models")
    assert not (team / "mlflow.db").exists()

    shutil.rmtree(team)
    (stored,) = (p for p in server.artifacts.rglob("config.json") if second.run_id in str(p))
    stored.write_text('{"of": "else"}')
    with pytest.raises(RunError, match=r"whole version 2: the files in mlflow-artifacts:.* aren't those that were reg"):
        model_folder("models:/whole@champion")
    assert not list((team / "models").iterdir()), "nothing of what was fetched is left"
    stored.write_text(json.dumps({"of": "whole"}))
    assert model_folder("models:/whole@champion")[0].is_dir()


@pytest.mark.parametrize("many", [3, pytest.param(8, marks=pytest.mark.proof)])
def test_of_promotions_at_once_one_wins_and_the_others_are_told(add, monkeypatch, many):
    name = f"race-of-{many}"
    monkeypatch.setattr(lock, "SETTLE_S", 2.0 if many == 3 else 5.0)
    for _ in range(many + 1):
        add(name)
    told = {}

    def run(version):
        try:
            told[version] = move_champion(client(), name, version, 1, {}).previous
        except Refused as refused:
            told[version] = str(refused)

    threads = [threading.Thread(target=run, args=(version,)) for version in range(2, many + 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (version for version, what in told.items() if what == 1)
    assert champion(name) == winner
    assert [entry["version"] for entry in history_of(client().get_registered_model(name))] == [1, winner]
    assert all("nothing was moved" in what for version, what in told.items() if version != winner)


def test_a_wrong_password_is_one_sentence(team, add, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password")
    with pytest.raises(RunError, match=r"refuses the user or password: .*MLFLOW_TRACKING_PASSWORD") as caught:
        list_models()
    assert "wrong-password" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_never_answers_is_one_sentence(team, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(RunError, match="doesn't answer in time"):
            list_models()


def test_a_server_that_goes_and_comes_back_leaves_nothing_half_done(team, add, server, monkeypatch):
    add("gone")
    run_id = Tracker.start("exp", "run", {}).run_id
    kind = type(client())

    def goes_at(write):
        """The server dies at the moment of that write, and is asked for it."""
        asked = getattr(kind, write)
        monkeypatch.setattr(kind, write, lambda *a, **k: (server.stop(), asked(*a, **k)))
        return lambda: (monkeypatch.setattr(kind, write, asked), server.start())

    back = goes_at("create_model_version")
    with pytest.raises(RunError, match="doesn't answer"):
        add("gone", run_id)
    back()
    assert [v.version for v in list_models("gone")] == [1]
    assert add("gone", run_id).version == 2
    assert add("gone", run_id).version == 2

    back = goes_at("set_registered_model_alias")
    with pytest.raises(RunError, match="doesn't answer"):
        promote("gone", 2)
    back()
    assert champion("gone") == 1
    monkeypatch.setattr(lock, "STALE_S", 0.2)
    assert promote("gone", 2).previous == 1, "the dead promotion's lease is waited for, and taken over"
    assert champion("gone") == 2
