"""Each thing that won't work is named with what to do about it."""

import json
import shutil
import socket
from collections import namedtuple

import pytest

from cluster import doctor
from cluster.doctor import examine

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def finding(tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)

    def _finding(what):
        return next(f for f in examine(tmp_path / "runs").findings if f.what == what)

    return _finding


def test_this_machine_is_healthy_enough_to_test_on(tmp_path, finding):
    found = examine(tmp_path)
    assert found.versions["torch"]
    assert found.cores >= 1
    assert [f for f in found.findings if f.verdict == "problem"] == []
    assert json.loads(json.dumps(found.as_dict()))["healthy"] is True
    assert not any(tmp_path.iterdir()), "looking changes nothing"


def test_a_missing_package_is_a_problem(finding, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", (*doctor.PACKAGES, "no-such-package"))
    assert finding("packages").value == "missing: no-such-package"
    assert finding("packages").remedy == "run `make install`"


def test_a_full_disk_and_a_small_shared_memory_are_warned_of(finding, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: Usage(1, 1, 100 << 20))
    assert finding("disk").verdict == "warning"
    assert "0.1 GiB free" in finding("disk").value
    assert "--shm-size" in finding("shared memory").remedy


def test_a_gpu_under_a_cpu_build_of_torch_is_a_problem(finding, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA X, 80000 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(doctor, "version", lambda name: "2.13.0+cpu")
    assert "CPU build" in finding("accelerators").value
    monkeypatch.setattr(doctor, "version", lambda name: "2.13.0+cu129")
    assert finding("accelerators").value == "NVIDIA X, 80000 MiB"
    assert "NCCL" in finding("communication").value
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert finding("accelerators").remedy == "repair the GPU driver"


def test_servers_that_do_not_answer_and_interfaces_that_are_not_there(finding, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert finding("RAY_ADDRESS").verdict == "problem"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1/path")
    assert finding("MLFLOW_TRACKING_URI").value.startswith("127.0.0.1:1 doesn't answer")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////tmp/x.db")
    assert finding("MLFLOW_TRACKING_URI").verdict == "ok"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no0")
    assert "is no interface here" in finding("communication").value
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening.getsockname()[1]}")
        assert finding("RAY_ADDRESS").verdict == "ok"
