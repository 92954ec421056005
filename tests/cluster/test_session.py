"""What can't be placed, joined or shared is said within seconds, before anything starts."""

import time

import pytest

from cluster import session
from cluster.config import ClusterConfig
from cluster.session import check_placement, cluster_address, connect, nodes_to_come, worker_env
from data_services.schema import RunError, UsageError

NODE = {"CPU": 4.0}
GPU_NODE = {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("config", "nodes", "told"),
    [
        (ClusterConfig(workers=9), [NODE], "workers=9 of 1 CPU can never be placed: the cluster can have 4 CPUs"),
        (ClusterConfig(workers=2, cpus_per_worker=3), [{"CPU": 5.0}], "room for 1"),
        (
            ClusterConfig(workers=5, gpus_per_worker=1),
            [GPU_NODE, GPU_NODE],
            "16 CPUs and 4 GPUs on 2 nodes, room for 4",
        ),
        (ClusterConfig(workers=1, gpus_per_worker=1), [NODE], "room for 0"),
        (ClusterConfig(workers=4), [NODE], "leave no CPU to read data"),
    ],
)
def test_workers_that_can_never_be_placed_are_refused_with_what_there_is(config, nodes, told):
    with pytest.raises(UsageError, match=told):
        check_placement(config, nodes)


def test_workers_that_fit_pass():
    check_placement(ClusterConfig(workers=3), [NODE])
    check_placement(ClusterConfig(workers=4, gpus_per_worker=0.5), [GPU_NODE])
    check_placement(ClusterConfig(workers=4, cpus_per_worker=3), [GPU_NODE, GPU_NODE])


def test_nodes_that_an_autoscaler_may_add_count():
    small, big = {"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}
    assert nodes_to_come([small], [(small, 3), (big, 2)], enough=9) == [small, small, big, big]
    assert nodes_to_come([small], [(big, -1)], enough=3) == [big] * 3
    assert nodes_to_come([big, big], [(big, 2)], enough=3) == []
    gpus = ClusterConfig(workers=4, gpus_per_worker=1)
    check_placement(gpus, [small, *nodes_to_come([small], [(big, 2)], enough=5)])
    with pytest.raises(UsageError, match="room for 2"):
        check_placement(gpus, [small, *nodes_to_come([small], [(big, 1)], enough=5)])


def test_ray_address_goes_before_the_recipe(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_address(ClusterConfig()) is None
    assert cluster_address(ClusterConfig(address="head:6379")) == "head:6379"
    monkeypatch.setenv("RAY_ADDRESS", "other:6379")
    assert cluster_address(ClusterConfig(address="head:6379")) == "other:6379"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert cluster_address(ClusterConfig(address="head:6379")) is None


def test_threads_of_a_worker_are_explicit():
    assert worker_env(ClusterConfig(cpus_per_worker=3))["OMP_NUM_THREADS"] == "3"
    assert worker_env(ClusterConfig(cpus_per_worker=3, threads_per_worker=1))["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
        ("ray://127.0.0.1:1", "no Ray cluster answers"),
        ("somewhere", "'somewhere' is no address"),
    ],
)
def test_a_cluster_that_is_not_there_is_said_within_seconds(tmp_path, monkeypatch, address, told):
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(UsageError, match=told), connect(ClusterConfig(), tmp_path):
        pass
    assert time.monotonic() - began < 60


def test_more_workers_than_this_machine_can_hold_start_no_cluster(tmp_path, monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(UsageError, match="can't be placed: this machine has"),
        connect(ClusterConfig(workers=10_000), tmp_path),
    ):
        pass
    assert not ray.is_initialized()


def test_two_nodes_are_joined_and_must_share_the_storage(tmp_path, monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        storage = tmp_path / "storage"
        with connect(ClusterConfig(workers=2, threads_per_worker=1), storage, {"MINE": "yes"}) as joined:
            assert joined.nodes == 2
            assert joined.resources["CPU"] == 4
            names = ["OMP_NUM_THREADS", "MINE"]
            read = ray.remote(num_cpus=0)(lambda: [__import__("os").environ[n] for n in names])
            assert ray.get(read.remote()) == ["1", "yes"]
            with pytest.raises(UsageError, match="room for 4"), connect(ClusterConfig(workers=40), storage):
                pass
            have = session.versions()
            monkeypatch.setattr(session, "_seen", lambda path: (None, have))
            with pytest.raises(RunError, match=r"node .* doesn't see .*/storage"):
                session.check_nodes(storage)
            monkeypatch.setattr(session, "_seen", lambda path: (None, have | {"torch": "1.0"}))
            with pytest.raises(
                RunError, match=r"the nodes differ: torch .* on this node, 1\.0 on .*requirements\.lock"
            ):
                session.check_nodes(storage)
            assert list(storage.iterdir()) == []
        assert not ray.is_initialized()
    finally:
        cluster.shutdown()
