"""benchmarks/kernel.py where there is no GPU: that its sides compute one thing, and what it makes of their times."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import normalize

from benchmarks import kernel


def _losses_and_gradients(setting: str) -> dict[str, list[torch.Tensor]]:
    """By side, in Triton's interpreter."""
    from benchmarks import kernel_runs

    torch.manual_seed(0)
    found = {}
    drawn = [normalize(torch.randn(n, 24), dim=1).bfloat16() for n in (17, 40 if setting == "fresh" else 17, 30)]
    for side in ("ours", "dense", "ring"):
        queries, fresh = (x.clone().requires_grad_() for x in drawn[:2])
        loss = kernel_runs.SIDES[side](queries, fresh, drawn[2] if setting == "queue" else None)
        loss.backward()
        found[side] = [x.detach().float() for x in (loss, queries.grad, fresh.grad)]
    return found


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton isn't installed (pip install triton)")
def test_every_side_computes_the_same_loss_and_gradients():
    # a process of its own: the interpreter is chosen when Triton is imported
    code = (
        "import torch; from tests.test_benchmark_kernel import _losses_and_gradients\n"
        "for setting in ('queue', 'fresh'):\n"
        "    found = _losses_and_gradients(setting)\n"
        "    for side in ('dense', 'ring'):\n"
        "        for mine, theirs in zip(found['ours'], found[side], strict=True):\n"
        "            assert (mine - theirs).norm() <= 0.02 * theirs.norm(), (setting, side, mine, theirs)\n"
    )
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(["", *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_gives_no_figures(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kernel", "--json", str(tmp_path / "kernel.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "no GPU here: nothing is measured"), done.stderr
    assert set(json.loads((tmp_path / "kernel.json").read_text())) == {"machine", "card"}


def test_operations_are_four_products_of_a_fresh_candidate_and_two_of_a_stored_row():
    product = 2 * 2 * 5
    assert kernel.operations("queue", 2, 3, 5) == {"done": product * (4 * 2 + 2 * 3), "useful": product * (3 * 2 + 6)}
    assert kernel.operations("fresh", 2, 3, 5) == {"done": product * 4 * 3, "useful": product * 3 * 3}


def test_the_summary_has_the_promised_keys_and_says_who_ran_out_of_memory():
    runs = {"ours": [{"seconds": 2.0, "peak_bytes": 10}], "ring": [{"seconds": 5.0, "peak_bytes": 30}]}
    figures = kernel.summary(runs | {"dense": [{"seconds": None}]}, {"done": 120, "useful": 90}, 80.0, 100.0)
    assert figures["share_of_peak"]["median"] == 0.6
    assert figures["share_of_measured_peak"]["median"] == 0.75
    assert figures["useful_share_of_peak"]["median"] == 0.45
    assert figures["over_ring"]["median"] == 2.5
    assert figures["over_dense"] is None
    assert figures["out_of_memory"] == ["dense"]


def test_the_first_name_that_fits_gives_the_data_sheet():
    names = list(kernel.DATA_SHEET)
    assert all(names.index(longer) < names.index("H100") for longer in ("H100 PCIe", "H100 NVL"))
