"""What one node says of itself. It runs on the node, so everything is imported inside."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GIB = 1 << 30
# Packages whose versions must be the same on every node: what is pickled between them, and what computes.
SHARED = ("torch", "ray", "deepspeed", "transformers", "peft", "numpy", "pyarrow")


@dataclass(frozen=True)
class NodeReport:
    """address: Ray's. interface: the card whose address that is, None where none has it.

    named: {variable: interface} of GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME. Sizes in GiB; 0 where there is none.
    open_files: the soft limit, None without limit. locked_gib: how much memory may be pinned, None without limit.
    """

    address: str
    host: str
    versions: dict[str, str]
    cpus: float
    gpus: float
    memory_gib: float
    storage_free_gib: float
    temporary_free_gib: float
    shared_memory_gib: float
    open_files: int | None
    locked_gib: float | None
    interfaces: tuple[str, ...]
    interface: str | None
    named: dict[str, str]


def versions() -> dict[str, str]:
    """{python or a package: version, "none" where it isn't installed}; nothing is imported."""
    return {"python": platform.python_version()} | {name: _version(name) for name in SHARED}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def look(address: str, resources: dict[str, float], storage: str) -> NodeReport:
    """This node, as it is now."""
    import tempfile

    import psutil

    cards = {name: {a.address for a in addresses} for name, addresses in psutil.net_if_addrs().items()}
    return NodeReport(
        address=address,
        host=platform.node(),
        versions=versions(),
        cpus=resources.get("CPU", 0),
        gpus=resources.get("GPU", 0),
        memory_gib=psutil.virtual_memory().total / GIB,
        storage_free_gib=_free_gib(Path(storage)),
        temporary_free_gib=_free_gib(Path(tempfile.gettempdir())),
        shared_memory_gib=_free_gib(Path("/dev/shm")),
        open_files=_limit(resource.RLIMIT_NOFILE),
        locked_gib=None if (locked := _limit(resource.RLIMIT_MEMLOCK)) is None else locked / GIB,
        interfaces=tuple(cards),
        interface=next((name for name, of in cards.items() if address in of), None),
        named={n: os.environ[n] for n in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if os.environ.get(n)},
    )


def _free_gib(folder: Path) -> float:
    try:
        return shutil.disk_usage(folder).free / GIB
    except OSError:
        return 0.0


def _limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft
