"""GPUs and fabrics by name: figures that a plan takes as given, each with where it is published.

GPUs. NVIDIA's data sheets of H100 and H200 (SXM): 1,979 TFLOPS bf16 with sparsity, half of it dense; 80 GB and 141 GB;
900 GB/s NVLink, both directions together. Of A100 80GB (SXM): 312 TFLOPS.

Latency. NCCL's own model (github.com/NVIDIA/nccl, src/graph/tuning.cc at 01afd20, `baseLat` and `hwLat`), in
microseconds: a ring of its Simple protocol 8.4 and a step 3.4 over NVLink, 9.6 over the network; a tree of its LL
protocol 4.4 and a step 0.52 x 1.8 and 5.0.

Bandwidth inside a node. 360 GB/s a GPU and direction of the 450 that NVLink 4 has: four fifths, assumed.
Bandwidth between nodes. Per GPU, 90 % of the line rate, assumed: one 400 Gb/s port (NDR InfiniBand, or RoCE, as in
The Llama 3 Herd of Models, arXiv:2407.21783, section 3.3.1), one of 200 Gb/s (HDR), and 100 Gb/s Ethernet that the
eight GPUs of a node share.

Utilisation. 0.40 of the dense peak: Llama 3 405B reached 38 to 43 % on 8,192 to 16,384 H100s (arXiv:2407.21783,
table 4). That is assumed of short texts and smaller models, which may reach less; `gyre plan --utilisation` takes your
own (the metric `mfu` of a run).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

GB = 1e9
US = 1e-6


@dataclass(frozen=True)
class Gpu:
    """peak_flops: dense, bf16, a second; memory_bytes: of one."""

    name: str
    peak_flops: float
    memory_bytes: float


@dataclass(frozen=True)
class Link:
    """What a worker's collective waits for: `ring_s` and `tree_s` seconds a step, `bandwidth` bytes a second and
    direction of each worker."""

    ring_s: float
    tree_s: float
    bandwidth: float


@dataclass(frozen=True)
class Fabric:
    """Links inside a node and between nodes; `ring_base_s`, `tree_base_s`: of starting any collective."""

    name: str
    inside: Link
    between: Link
    ring_base_s: float = 8.4 * US
    tree_base_s: float = 4.4 * US


GPUS = {
    "h100": Gpu("h100", 989e12, 80e9),
    "h200": Gpu("h200", 989e12, 141e9),
    "a100": Gpu("a100", 312e12, 80e9),
}
NVLINK4 = Link(3.4 * US, 0.52 * 1.8 * US, 360 * GB)


def _network(bytes_per_second: float) -> Link:
    return Link(9.6 * US, 5.0 * US, bytes_per_second)


FABRICS = {
    "ndr": Fabric("ndr", NVLINK4, _network(0.9 * 50 * GB)),
    "hdr": Fabric("hdr", NVLINK4, _network(0.9 * 25 * GB)),
    "ethernet": Fabric("ethernet", NVLINK4, _network(0.9 * 12.5 * GB / 8)),
}
UTILISATION = 0.40
SCORING_UTILISATION = 0.30
"""Share of the peak that the exchange's products over the queue reach; assumed."""
HOST_BANDWIDTH = 25 * GB
"""Between a GPU and its node's memory, bytes a second and direction: half of what PCIe 5.0 x16 names; assumed."""


def gpu(name: str) -> Gpu:
    return _named(GPUS, name, "--gpu")


def fabric(name: str) -> Fabric:
    return _named(FABRICS, name, "--fabric")


def _named(known: dict[str, T], name: str, option: str) -> T:
    from data_services.schema import UsageError  # here: `gyre --help` names these, and must not wait for pydantic

    if name not in known:
        raise UsageError(f"{option} {name!r} isn't known: choose one of {', '.join(known)}")
    return known[name]
