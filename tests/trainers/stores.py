"""An object store on this machine that speaks S3, and does to uploads what networks and stores do."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE_S = 60


class Faulty:
    """A WSGI application before another: uploads whose object matches `applies` fail in one way, `times` times."""

    def __init__(self, application: Any) -> None:
        self._application, self._lock = application, threading.Lock()
        self.heal()

    def fail(self, how: str, times: int = 1_000_000, applies: Callable[[str], bool] = lambda name: True) -> None:
        """how: "500", "truncated" (the second half of the body is lost) or "slow" (until `heal`)."""
        self._how, self._left, self._applies, self.seen = how, times, applies, 0
        self._healed = threading.Event()

    def heal(self) -> None:
        if hasattr(self, "_healed"):
            self._healed.set()
        self._how, self._left, self.seen = "", 0, 0
        self._applies = lambda name: True

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        upload = environ["REQUEST_METHOD"] == "PUT"
        with self._lock:
            struck = upload and self._left > 0 and self._applies(environ["PATH_INFO"])
            self._left -= struck
            self.seen += struck
            how, healed = self._how, getattr(self, "_healed", None)
        if struck and how == "500":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("500 Internal Server Error", [("Content-Type", "text/plain"), ("Content-Length", "0")])
            return [b""]
        if struck and how == "slow":
            assert healed is not None
            assert healed.wait(PATIENCE_S)
        if struck and how == "truncated":
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = body[: len(body) // 2]
            environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        return self._application(environ, start_response)


@contextmanager
def object_store(monkeypatch: Any) -> Iterator[Faulty]:
    """A bucket `runs` behind faults; the environment names the server, as a user's does."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from pyarrow import fs
    from werkzeug.serving import make_server

    faulty = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faulty, True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    made = fs.S3FileSystem(endpoint_override=address, region="us-east-1", allow_bucket_creation=True)
    made.create_dir("runs")
    try:
        yield faulty
    finally:
        faulty.heal()
        fs.S3FileSystem(endpoint_override=address, region="us-east-1", allow_bucket_deletion=True).delete_dir_contents(
            "runs", missing_dir_ok=True
        )
        server.shutdown()
        thread.join()
