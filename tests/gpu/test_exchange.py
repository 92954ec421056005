"""One rank over NCCL: its collectives as Group calls them, and the exchange, kernels included, against a CPU's."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from trainers.collectives import Group
from trainers.objectives import kernels
from trainers.objectives.blocks import Block
from trainers.objectives.keys import Keys
from trainers.objectives.masks import SameId
from trainers.objectives.reductions import Wanted
from trainers.objectives.sharded_softmax import exchange
from trainers.objectives.similarity import InnerProduct

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture(scope="module")
def nccl(tmp_path_factory):
    rendezvous = tmp_path_factory.mktemp("nccl") / "rendezvous"
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield Group()
    dist.destroy_process_group()


def test_nccl_takes_the_collectives_as_group_calls_them(nccl):
    x = torch.arange(6.0, device="cuda").view(3, 2)
    gathered, own, reduced = torch.empty_like(x), torch.empty_like(x), x.clone()
    dist.all_gather(list(gathered.split(3)), x)
    dist.reduce_scatter(own, list(x.split([3])))
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    assert all(torch.equal(result, x) for result in (gathered, own, reduced))
    assert nccl.size == 1
    assert nccl.sizes(5, "cuda") == [5]


def _reduced(
    device: str, dtype: torch.dtype, group: Group, operands: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Rows, columns, and the gradients of queries, documents and temperature."""
    torch.manual_seed(0)
    b, d, k, dim = 300, 700, 5000, 256

    def keys(rows: int) -> Keys:
        return Keys(torch.randint(2000, (rows,)), torch.randint(2000, (rows,))).to(device)

    vectors = [normalize(torch.randn(rows, dim), dim=1).to(device, dtype) for rows in (b, d, k)]
    query_keys, document_keys, stored_keys = keys(b), keys(d), keys(k)
    queries, documents = (x.requires_grad_() for x in vectors[:2])
    temperature = torch.tensor(
        0.05, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True
    )
    blocks = [
        Block(documents, document_keys, (SameId(),), diagonal=True, columns=True),
        Block(vectors[2], stored_keys, (SameId(),), fresh=False),
    ]
    found = exchange(queries, query_keys, blocks, temperature=temperature, tile=512, group=group, operands=operands)
    rows, columns = found.rows.denominators, found.columns.denominators
    (rows.sum() + columns.square().sum()).backward()
    return [x.detach().cpu().double() for x in (rows, columns, queries.grad, documents.grad, temperature.grad)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_the_exchange_on_a_gpu_equals_the_exchange_on_a_cpu(nccl, dtype, tolerance):
    on_gpu = _reduced("cuda", dtype, nccl)
    on_cpu = _reduced("cpu", torch.float64, nccl)
    for ours, twin in zip(on_gpu, on_cpu, strict=True):
        assert (ours - twin).norm() <= tolerance * twin.norm()


def test_a_run_in_bfloat16_multiplies_its_float32_vectors_on_tensor_cores(nccl):
    on_gpu = _reduced("cuda", torch.float32, nccl, torch.bfloat16)
    on_cpu = _reduced("cpu", torch.float64, nccl)
    for ours, twin in zip(on_gpu, on_cpu, strict=True):
        assert 1e-6 * twin.norm() < (ours - twin).norm() <= 2e-2 * twin.norm()


def test_a_gpu_takes_the_kernels():
    assert kernels.usable(torch.zeros(2, 4, device="cuda"), InnerProduct(), (SameId(),), Wanted())
