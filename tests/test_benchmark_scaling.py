"""The arithmetic of `benchmarks.scaling`: calibration, the model of GPUs, the plot."""

from xml.etree import ElementTree

import pytest

from benchmarks import scaling_gpus
from benchmarks.scaling_here import Rates, predicted_s, solved, workload
from tests.test_benchmarks import test_help_tells_what_is_measured_without_importing_what_measures as check_help


@pytest.mark.parametrize("name", ["scaling", "metadata"])
def test_help_tells_what_is_measured(name):
    check_help(name)


def test_rates_are_found_again_from_the_seconds_they_give():
    rates = Rates(fixed_s=0.01, encoding=5e9, scoring=2e9, alpha_s=1e-4, bandwidth=1e9, cores=2)
    settings = [(64, 4096), (128, 4096), (128, 0)]
    seconds = [predicted_s(workload(1, batch, rows), rates) for batch, rows in settings]
    found = solved(settings, seconds, {"alpha_s": 1e-4, "bandwidth": 1e9}, cores=2)
    for name in ("fixed_s", "encoding", "scoring"):
        assert getattr(found, name) == pytest.approx(getattr(rates, name))
    alone, turns = (predicted_s(workload(w, 64 * w, 4096), rates) for w in (1, 4))
    assert turns > 2 * alone  # two cores, four processes, and what they send


def test_the_model_keeps_efficiency_within_reason_and_names_the_same_at_8_gpus():
    tables = scaling_gpus.model_tables()
    for lifts in tables["weak"].values():
        for found in lifts.values():
            assert found[8]["efficiency"] == 1.0
            assert all(0.2 < at["efficiency"] < 1.1 for at in found.values())
    as_it_is, *_, lifted = tables["weak"]["qwen3-embedding-0.6b"].values()
    assert as_it_is[1024]["efficiency"] < lifted[1024]["efficiency"]
    ours, replicated, gathered = tables["sides"]["qwen3-embedding-0.6b"][-3:]
    assert ours["memory_bytes"] < replicated["memory_bytes"] / 10
    assert gathered["wire_bytes"] > ours["wire_bytes"] > replicated["wire_bytes"]


def test_the_plot_is_an_image_that_names_its_lines(tmp_path):
    scaling_gpus.write_plot(tmp_path / "plot.svg", scaling_gpus.model_tables())
    drawn = ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"0.6B, as it is", "8B, with the lifts", "the goal"} <= set(texts)
