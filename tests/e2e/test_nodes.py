"""`gyre doctor --cluster` on a cluster of two raylets, and jobs of one: listed, found, refused."""

import json

import pytest


@pytest.fixture
def at(shell, two_nodes):
    """A command of the job server."""

    def run(*words):
        return shell(words[0], "--address", two_nodes.job_server(), *words[1:], env=two_nodes.env)

    return run


def test_doctor_looks_at_every_node_and_between_them(shell, two_nodes, tmp_path):
    ended = shell("doctor", "--cluster", "--json", tmp_path / "found.json", env=two_nodes.env)
    assert ended.code == 0, ended
    found = json.loads((tmp_path / "found.json").read_text())
    assert [node["cpus"] for node in found["nodes"].values()] in ([3, 2], [2, 3])
    assert {f["what"]: f["verdict"] for f in found["findings"]}["shared storage"] == "ok"
    assert set(found["exchange"]) == set(found["nodes"]) == set(found["clock_s"])
    assert all(e["backend"] == "gloo" and e["bytes_per_s"] > 0 for e in found["exchange"].values())
    assert "2 nodes, 5 CPUs, 0 GPUs" in ended.out
    assert "each node reads what another wrote" in ended.out
    assert not list(shell.home.glob(".shared-*")), "nothing is left behind"


def test_a_job_that_is_not_there_is_one_sentence(at):
    ended = at("stop", "nightly")
    assert ended.code == 2, ended
    assert ended.err.startswith("gyre: no job 'nightly' on this cluster; ")
