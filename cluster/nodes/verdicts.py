"""What the nodes' reports mean: each finding with its remedy. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.doctor import MIN_DISK_GIB, MIN_OPEN_FILES, MIN_SHM_GIB, Finding, Verdict
from cluster.nodes.report import NodeReport
from cluster.nodes.seat import Exchange

MAX_SKEW_S = 2.0
MIN_LOCKED_GIB = 1.0  # what NCCL and RDMA pin
SLOW_SHARE = 0.5  # of the median's bandwidth


def judge_nodes(reports: Mapping[str, NodeReport]) -> list[Finding]:
    """reports: {name of a node: what it says of itself}."""
    cpus, gpus = sum(r.cpus for r in reports.values()), sum(r.gpus for r in reports.values())
    there = f"{len(reports)} node{'s' * (len(reports) != 1)}, {cpus:g} CPUs, {gpus:g} GPUs"
    small = {n: r.storage_free_gib for n, r in reports.items() if r.storage_free_gib < MIN_DISK_GIB}
    full = {n: r.temporary_free_gib for n, r in reports.items() if r.temporary_free_gib < MIN_DISK_GIB}
    shm = {n: r.shared_memory_gib for n, r in reports.items() if r.shared_memory_gib < MIN_SHM_GIB}
    files = {n: r.open_files for n, r in reports.items() if r.open_files is not None and r.open_files < MIN_OPEN_FILES}
    return [
        Finding("nodes", "ok", there),
        _versions(reports),
        _least("storage", small, "free", "GiB", "checkpoints may not fit; GYRE_HOME needs a larger disk"),
        _least(
            "temporary folders", full, "free", "GiB", "Ray spills and logs there; ray start --temp-dir, or make room"
        ),
        _least("shared memory", shm, "free", "GiB", "the object store falls back to files; --shm-size or an emptyDir"),
        _least("open files", files, "a process", "", f"ulimit -n {MIN_OPEN_FILES} before `ray start`"),
        _locked(reports),
        _interfaces(reports),
    ]


def _least(what: str, under: Mapping[str, float], of: str, unit: str, remedy: str) -> Finding:
    if not under:
        return Finding(what, "ok", "enough on every node")
    told = ", ".join(f"{n}: {v:.1f} {unit} {of}" if unit else f"{n}: {v:g} {of}" for n, v in under.items())
    return Finding(what, "warning", told, remedy)


def _versions(reports: Mapping[str, NodeReport]) -> Finding:
    differing = differing_versions({name: report.versions for name, report in reports.items()})
    if not differing:
        return Finding("versions", "ok", "the same on every node")
    return Finding("versions", "problem", differing, "install requirements.lock on every node, with the same Python")


def differing_versions(versions: Mapping[str, Mapping[str, str]]) -> str:
    """`torch 2.13.0 on a, 2.12.0 on b; …`, empty where all nodes ({name: {package: version}}) have the same."""
    told = []
    for package in next(iter(versions.values()), {}):
        by_version: dict[str, list[str]] = {}
        for name, of in versions.items():
            by_version.setdefault(of[package], []).append(name)
        if len(by_version) > 1:
            told.append(f"{package} " + ", ".join(f"{v} on {' and '.join(on)}" for v, on in by_version.items()))
    return "; ".join(told)


def _locked(reports: Mapping[str, NodeReport]) -> Finding:
    """Of nodes with GPUs alone: nothing else pins memory."""
    low = {
        n: r.locked_gib
        for n, r in reports.items()
        if r.gpus and r.locked_gib is not None and r.locked_gib < MIN_LOCKED_GIB
    }
    remedy = "ulimit -l unlimited before `ray start` (a container: --ulimit memlock=-1)"
    return _least("locked memory", low, "may be pinned", "GiB", remedy)


def _interfaces(reports: Mapping[str, NodeReport]) -> Finding:
    """gloo chooses by the host's name, which on many machines is 127.0.1.1."""
    missing = [
        f"{name}: {variable}={card} is no interface there ({', '.join(report.interfaces)})"
        for name, report in reports.items()
        for variable, card in report.named.items()
        if card not in report.interfaces
    ]
    if missing:
        remedy = "name one that is there, in the environment of `ray start`"
        return Finding("interfaces", "problem", "; ".join(missing), remedy)
    several = len({report.address for report in reports.values()}) > 1
    unnamed = [name for name, report in reports.items() if "GLOO_SOCKET_IFNAME" not in report.named]
    used = ", ".join(f"{n}: {r.named.get('GLOO_SOCKET_IFNAME') or r.interface or '?'}" for n, r in reports.items())
    if several and unnamed:
        cards = ", ".join(sorted({r.interface for r in reports.values() if r.interface}))
        remedy = f"set GLOO_SOCKET_IFNAME in the environment of `ray start`; Ray's addresses are on {cards}"
        return Finding("interfaces", "warning", f"not named on {', '.join(unnamed)}", remedy)
    return Finding("interfaces", "ok", used)


def judge_clocks(ahead_s: Mapping[str, float]) -> Finding:
    """ahead_s: {node: seconds that its clock is ahead of the driver's}."""
    apart = max(ahead_s.values()) - min(ahead_s.values())
    if apart <= MAX_SKEW_S:
        return Finding("clocks", "ok", f"within {apart * 1e3:.0f} ms")
    told = ", ".join(f"{name} {s:+.1f} s" for name, s in ahead_s.items())
    return Finding("clocks", "warning", told, "start NTP (chrony) on every node; times in logs and tables mislead")


def judge_storage(storage: Path, nodes: int, wrong: Sequence[str]) -> Finding:
    """wrong: what failed when each node wrote and the next one read."""
    if not wrong:
        how = "each node reads what another wrote" if nodes > 1 else "written and read"
        return Finding("shared storage", "ok", f"{storage}: {how}")
    remedy = "set GYRE_HOME (or cluster.storage) to a folder that all nodes mount at the same path"
    return Finding("shared storage", "problem", f"{storage}: {'; '.join(wrong)}", remedy)


def judge_exchange(exchange: Mapping[str, Exchange], failure: str) -> Finding:
    """Bandwidth: the slowest node's share of what the median has tells a bad cable from a slow network."""
    if failure:
        remedy = "open all TCP between the nodes, and name the card that joins them in GLOO_SOCKET_IFNAME"
        return Finding("all-to-all", "problem", failure, remedy)
    if not exchange:
        return Finding("all-to-all", "ok", "one node: nothing to exchange")
    speeds = sorted(e.bytes_per_s for e in exchange.values())
    median, latency = speeds[len(speeds) // 2], max(e.latency_s for e in exchange.values())
    slow = [name for name, e in exchange.items() if e.bytes_per_s < SLOW_SHARE * median]
    backend = next(iter(exchange.values())).backend
    told = f"{backend}: {speeds[0] / 1e9:.2f} to {speeds[-1] / 1e9:.2f} GB/s a node, latency {latency * 1e6:.0f} µs"
    verdict: Verdict = "warning" if slow else "ok"
    remedy = f"{', '.join(slow)}: less than half of the median; look at its cable, card and driver" if slow else ""
    return Finding("all-to-all", verdict, told, remedy)
