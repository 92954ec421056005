"""What the nodes' reports mean, each finding with its remedy; every node of a real cluster looked at: tests/e2e."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.nodes.report import look, versions
from cluster.nodes.seat import Exchange
from cluster.nodes.verdicts import differing_versions, judge_clocks, judge_exchange, judge_nodes, judge_storage


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """A node with nothing to complain of."""
    here = look("127.0.0.1", {"CPU": 4.0}, str(tmp_path_factory.mktemp("home")))
    room = {"storage_free_gib": 99.0, "temporary_free_gib": 99.0, "shared_memory_gib": 9.0}
    return replace(here, **room, open_files=65536, locked_gib=None, named={})


def finding(what, reports):
    return next(f for f in judge_nodes(reports) if f.what == what)


def test_a_node_reports_itself(tmp_path):
    here = look("127.0.0.1", {"CPU": 2.0, "GPU": 1.0}, str(tmp_path))
    assert (here.cpus, here.gpus, here.interface) == (2, 1, "lo")
    assert here.versions == versions()
    assert here.versions["torch"] != "none"
    assert here.storage_free_gib > 0


def test_nodes_that_are_alike_have_no_problem(node):
    assert {f.verdict for f in judge_nodes({"a": node, "b": node})} == {"ok"}
    assert finding("nodes", {"a": node, "b": node}).value == "2 nodes, 8 CPUs, 0 GPUs"


def test_other_versions_are_named_with_their_nodes(node):
    other = replace(node, versions=node.versions | {"torch": "1.0", "python": "3.9.1"})
    found = finding("versions", {"a": node, "b": other, "c": other})
    assert found.verdict == "problem"
    assert f"torch {node.versions['torch']} on a, 1.0 on b and c" in found.value
    assert "requirements.lock" in found.remedy
    assert differing_versions({"a": node.versions}) == ""


@pytest.mark.parametrize(
    ("what", "lacking", "told"),
    [
        ("storage", {"storage_free_gib": 1.0}, "b: 1.0 GiB free"),
        ("temporary folders", {"temporary_free_gib": 0.5}, "b: 0.5 GiB free"),
        ("shared memory", {"shared_memory_gib": 0.06}, "b: 0.1 GiB free"),
        ("open files", {"open_files": 1024}, "b: 1024 a process"),
        ("locked memory", {"gpus": 1.0, "locked_gib": 0.0625}, "b: 0.1 GiB may be pinned"),
    ],
)
def test_what_is_short_is_named_with_the_node_and_the_remedy(node, what, lacking, told):
    found = finding(what, {"a": node, "b": replace(node, **lacking)})
    assert (found.verdict, found.value) == ("warning", told)
    assert found.remedy


def test_interfaces_must_be_there_and_be_named_where_hosts_are_several(node):
    far = replace(node, address="10.0.0.2", interface="eth1")
    unnamed = finding("interfaces", {"a": node, "b": far})
    assert unnamed.verdict == "warning"
    assert "GLOO_SOCKET_IFNAME" in unnamed.remedy
    assert "eth1" in unnamed.remedy
    wrong = finding("interfaces", {"a": replace(node, named={"NCCL_SOCKET_IFNAME": "no0"})})
    assert wrong.verdict == "problem"
    assert "a: NCCL_SOCKET_IFNAME=no0 is no interface there (" in wrong.value


def test_clocks_that_are_apart_are_warned_of():
    assert judge_clocks({"a": 0.001, "b": -0.002}).value == "within 3 ms"
    apart = judge_clocks({"a": 0.0, "b": -40.0})
    assert apart.verdict == "warning"
    assert "b -40.0 s" in apart.value


def test_storage_that_is_not_shared_is_a_problem():
    assert judge_storage(Path("/s"), 2, []).value == "/s: each node reads what another wrote"
    found = judge_storage(Path("/s"), 2, ["b doesn't see what a wrote"])
    assert found.verdict == "problem"
    assert "GYRE_HOME" in found.remedy


def test_a_slow_node_is_named_and_a_failed_exchange_is_a_problem():
    fast, slow = Exchange("gloo", 1e-4, 1e9), Exchange("gloo", 2e-4, 1e8)
    found = judge_exchange({"a": fast, "b": fast, "c": slow}, "")
    assert found.verdict == "warning"
    assert found.remedy.startswith("c: less than half")
    assert found.value == "gloo: 0.10 to 1.00 GB/s a node, latency 200 µs"
    assert judge_exchange({"a": fast, "b": fast}, "").verdict == "ok"
    assert judge_exchange({}, "").value == "one node: nothing to exchange"
    assert "TCP" in judge_exchange({}, "Connection refused").remedy
