"""What this machine, and the servers it is pointed at, can and can't do. Nothing heavy is imported."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil

from cluster.paths import home

PACKAGES = (
    "gyre",
    "torch",
    "ray",
    "deepspeed",
    "transformers",
    "mlflow",
    "pyarrow",
    "sentence-transformers",
    "peft",
    "tokenizers",
    "safetensors",
)
GIB = 1 << 30
MIN_DISK_GIB, MIN_MEMORY_GIB, MIN_SHM_GIB, MIN_OPEN_FILES = 5, 4, 1, 4096
CONNECT_TIMEOUT_S = 2.0

Verdict = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. remedy: what to do about it, empty where nothing is to be done."""

    what: str
    verdict: Verdict
    value: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """versions: {package: version or None}; accelerators: names, one each."""

    versions: dict[str, str | None]
    cores: int
    memory_gib: float
    accelerators: list[str]
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        return all(f.verdict != "problem" for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"healthy": self.healthy}


def examine(root: Path | None = None) -> Diagnosis:
    """Looks at versions, cores, memory, accelerators, communication, disk and limits."""
    versions = {name: _version(name) for name in PACKAGES}
    gpus, gpu_finding = _accelerators(versions["torch"])
    memory = psutil.virtual_memory().total / GIB
    findings = [
        _python(),
        *_packages(versions),
        gpu_finding,
        _communication(gpus, versions["torch"]),
        _amount("memory", memory, MIN_MEMORY_GIB, "the quickstart needs about 4 GiB; close something"),
        _disk(root or home()),
        _shared_memory(),
        _open_files(),
        _loopback(),
        _server("RAY_ADDRESS", "a cluster in the process is started", 6379),
        _server("MLFLOW_TRACKING_URI", "SQLite under the home is used", 443),
    ]
    return Diagnosis(versions, _cores(), round(memory, 1), gpus, findings)


def environment() -> dict[str, Any]:
    """What a run says of the machine that its command ran on."""
    versions = {name: found for name in PACKAGES if (found := _version(name))}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": _cores(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "accelerators": _accelerators(versions.get("torch"))[0],
        "versions": versions,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    """Cores this process may use: a container often has fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _python() -> Finding:
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    remedy = "" if ok else "use Python 3.11, 3.12 or 3.13"
    return Finding("python", "ok" if ok else "problem", platform.python_version(), remedy)


def _packages(versions: dict[str, str | None]) -> list[Finding]:
    missing = [name for name, found in versions.items() if found is None]
    if not missing:
        return [Finding("packages", "ok", f"all {len(versions)} installed")]
    return [Finding("packages", "problem", f"missing: {', '.join(missing)}", "run `make install`")]


def _accelerators(torch_version: str | None) -> tuple[list[str], Finding]:
    tool = shutil.which("nvidia-smi")
    listed: list[str] = []
    if tool:
        try:
            answer = subprocess.run(
                [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
            listed = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
        except (subprocess.SubprocessError, OSError) as error:
            return [], Finding("accelerators", "problem", f"nvidia-smi fails: {error}", "repair the GPU driver")
    if not listed:
        return [], Finding("accelerators", "ok", "none; training runs on the CPU")
    if _cpu_build(torch_version):
        remedy = "install the CUDA build of torch; this one can't use them"
        return listed, Finding("accelerators", "problem", f"{len(listed)}, but torch is a CPU build", remedy)
    return listed, Finding("accelerators", "ok", "; ".join(listed))


def _cpu_build(torch_version: str | None) -> bool:
    return "+cpu" in (torch_version or "")


def _communication(gpus: list[str], torch_version: str | None) -> Finding:
    if gpus and not _cpu_build(torch_version):
        return Finding("communication", "ok", "NCCL between GPUs, gloo on the CPU")
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface and interface not in psutil.net_if_addrs():
        there = ", ".join(psutil.net_if_addrs())
        return Finding(
            "communication",
            "problem",
            f"GLOO_SOCKET_IFNAME={interface} is no interface here",
            f"choose one of {there}, or unset it",
        )
    named = f"gloo over {interface}" if interface else "gloo; several hosts need GLOO_SOCKET_IFNAME"
    return Finding("communication", "ok", named)


def _amount(what: str, gib: float, least: float, remedy: str) -> Finding:
    ok = gib >= least
    return Finding(what, "ok" if ok else "warning", f"{gib:.1f} GiB", "" if ok else remedy)


def _disk(root: Path) -> Finding:
    there = next(p for p in (root, *root.parents) if p.exists())
    if not os.access(there, os.W_OK):
        return Finding("disk", "problem", f"{there} can't be written", "set GYRE_HOME to a folder of yours")
    free = shutil.disk_usage(there).free / GIB
    found = _amount("disk", free, MIN_DISK_GIB, "checkpoints may not fit; set GYRE_HOME to a larger disk")
    return Finding(found.what, found.verdict, f"{found.value} free for {root}", found.remedy)


def _shared_memory() -> Finding:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return Finding("shared memory", "ok", "no /dev/shm; Ray uses files")
    free = shutil.disk_usage(shm).free / GIB
    remedy = "Ray's object store falls back to slow files; in a container give --shm-size=2g"
    return _amount("shared memory", free, MIN_SHM_GIB, remedy)


def _open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    ok = soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES
    shown = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    return Finding("open files", "ok" if ok else "warning", shown, "" if ok else f"ulimit -n {MIN_OPEN_FILES}")


def _loopback() -> Finding:
    """Ray keeps its sockets under the temporary folder and talks to itself over local ports."""
    try:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            socket.create_connection(listening.getsockname(), CONNECT_TIMEOUT_S).close()
        with tempfile.NamedTemporaryFile():
            pass
    except OSError as error:
        remedy = "allow connections to 127.0.0.1 and a writable temporary folder (TMPDIR)"
        return Finding("local ports", "problem", str(error), remedy)
    return Finding("local ports", "ok", "127.0.0.1 answers")


def _server(variable: str, otherwise: str, default_port: int) -> Finding:
    uri = os.environ.get(variable)
    if not uri:
        return Finding(variable, "ok", f"not set; {otherwise}")
    scheme, slashes, rest = uri.rpartition("://")
    if uri in ("auto", "local") or (slashes and scheme not in ("http", "https", "ray")):
        return Finding(variable, "ok", uri)
    place = rest.rpartition("@")[2].partition("/")[0]
    host, _, port = place.rpartition(":") if ":" in place else (place, "", "")
    number = int(port) if port.isdigit() else 80 if scheme == "http" else default_port
    try:
        socket.create_connection((host, number), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return Finding(
            variable, "problem", f"{host}:{number} doesn't answer ({error})", f"start it, or unset {variable}"
        )
    return Finding(variable, "ok", f"{host}:{number} answers")
