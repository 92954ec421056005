"""`gyre serve`: replicas of the model and one door before them, placed by Ray Serve.

The door brings requests together (`batching`) and each batch goes to a replica in one call; with several replicas as
many batches are under way.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from cluster.jobs import PASSED
from cluster.models.reference import resolve
from cluster.paths import home
from cluster.serving.protocol import Limits
from data_services.schema import RunError, UsageError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

TOKEN = "GYRE_SERVE_TOKEN"
APPLICATION = "gyre"
_START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class ServeConfig:
    """How a model is served.

    replicas     processes with the model each
    batch        requests that go through the model together, at most
    wait_ms      how long the first request of a batch waits for others, where no batch is being computed
    follow_s     how often the registry is asked where an alias points; 0: never
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    batch: int = 64
    wait_ms: float = 2.0
    follow_s: float = 5.0
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Serving:
    """A server that answers. model: the version it began with."""

    url: str
    model: str
    dimensions: int
    token: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def serving(config: ServeConfig, root: Path | None = None) -> Iterator[Serving]:
    """The server, for as long as the body runs; on the cluster that RAY_ADDRESS names, else in this process.

    Raises UsageError for a model, address or port that can't be served, or an address without a token.
    """
    from cluster.session import connect

    root = root or home()
    token = os.environ.get(TOKEN) or None
    _check(config, token)
    resolve(config.model, root)  # said here, in one sentence, and not by an actor that dies
    threads = max((os.cpu_count() or 1) // config.replicas, 1)
    cluster = ClusterConfig(workers=config.replicas, cpus_per_worker=threads)
    passed = {name: os.environ[name] for name in PASSED if name in os.environ}
    with connect(cluster, root, passed):
        from ray import serve

        try:
            yield _started(config, root, threads, token)
        finally:
            serve.shutdown()


def _started(config: ServeConfig, root: Path, threads: int, token: str | None) -> Serving:
    """The server, once it answers. Raises RunError where its processes can't be started."""
    from ray import serve

    from cluster.serving.endpoint import digest

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    try:
        options = {"host": config.host, "port": config.port}
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config=quiet)
        door = _application(config, root, threads, digest(token) if token else None)
        handle = serve.run(door, name=APPLICATION, logging_config=quiet)
        about = handle.about.remote().result(timeout_s=_START_TIMEOUT_S)
    except (RuntimeError, TimeoutError) as error:
        raise RunError(f"{config.model} can't be served: {str(error).splitlines()[0]}") from error
    return Serving(f"http://{_shown(config)}/v1", about["model"], about["dimensions"], token is not None)


def wait_for_ever() -> None:
    """Until SIGINT or SIGTERM, after which the server is taken down as usual."""
    from cluster.fit import handling_signals

    asked = threading.Event()
    with handling_signals(lambda number, frame: asked.set()):
        asked.wait()


def _check(config: ServeConfig, token: str | None) -> None:
    import socket

    if not _loopback(config.host) and token is None:
        raise UsageError(
            f"--host {config.host} can be reached from other machines: set {TOKEN} to a secret that clients must send, "
            "or serve on 127.0.0.1"
        )
    if config.replicas > (cores := os.cpu_count() or 1):
        raise UsageError(f"--replicas {config.replicas}: this machine has {cores} cores")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise UsageError(
                f"{_shown(config)} can't be listened on ({error.strerror}): choose another --port"
            ) from error


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(config: ServeConfig) -> str:
    return f"[{config.host}]:{config.port}" if ":" in config.host else f"{config.host}:{config.port}"


class _Replica:
    """A process with the model."""

    def __init__(self, model: str, root: str, follow_s: float) -> None:
        from cluster.serving.model import ServedModel

        self._model = ServedModel(model, Path(root), follow_s)

    def encode(self, works: list[Any]) -> list[Any]:
        return self._model.encode(works)

    def about(self) -> dict[str, Any]:
        return self._model.about()


class _Door:
    """The one process that speaks HTTP with clients: checks requests, brings them together, counts them."""

    def __init__(self, replica: Any, config: ServeConfig, token_digest: str | None) -> None:
        from cluster.serving.batching import Together
        from cluster.serving.endpoint import Endpoint

        self._replica = replica
        together = Together(self._encode, config.batch, config.replicas, config.wait_ms / 1000)
        self._endpoint = Endpoint(together, self.about, config.model, config.limits, token_digest)

    async def __call__(self, request: Request) -> Response:
        return await self._endpoint(request)

    async def about(self) -> dict[str, Any]:
        return await self._replica.about.remote()

    async def _encode(self, works: list[Any]) -> list[Any]:
        return await self._replica.encode.remote(works)


def _application(config: ServeConfig, root: Path, threads: int, token_digest: str | None) -> Any:
    from ray import serve

    replica = serve.deployment(
        num_replicas=config.replicas,
        max_ongoing_requests=4,
        ray_actor_options={"num_cpus": threads},
    )(_Replica)
    door = serve.deployment(
        max_ongoing_requests=max(1024, 2 * config.batch * config.replicas),
        ray_actor_options={"num_cpus": 0},
    )(_Door)
    return door.bind(replica.bind(config.model, str(root), config.follow_s), config, token_digest)
