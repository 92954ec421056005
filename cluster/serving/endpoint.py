"""HTTP: who may ask, how much, and what is counted. Nothing of Ray here: any ASGI server can run it."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cluster.serving.model import Done, Work
from cluster.serving.protocol import BadRequest, Limits, parse, response

OPEN = ("/health",)  # a load balancer has no token
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

Encode = Callable[[Work], Awaitable[Done]]
About = Callable[[], Awaitable[dict[str, Any]]]


def digest(token: str) -> str:
    """What a server keeps of its token."""
    return hashlib.sha256(token.encode()).hexdigest()


class Endpoint:
    """Answers `POST /v1/embeddings`, `GET /v1/models`, `/health` and `/metrics`.

    encode        a request's texts to its vectors
    about         see `ServedModel.about`; a failure is an unhealthy server
    served        the MODEL as the server was started with
    token_digest  see `digest`; None: no token is asked for
    """

    def __init__(
        self, encode: Encode, about: About, served: str, limits: Limits, token_digest: str | None = None
    ) -> None:
        self._encode, self._about, self._served, self._limits = encode, about, served, limits
        self._token_digest = token_digest
        self._known: dict[str, Any] | None = None
        self._metrics = _Metrics()
        self._routes: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
            "/v1/embeddings": ("POST", self._embeddings),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._prometheus),
        }

    async def __call__(self, request: Request) -> Response:
        began = time.perf_counter()
        path = request.url.path
        try:
            answer = await self._route(request, path)
        except BadRequest as bad:
            headers = {"WWW-Authenticate": "Bearer"} if bad.status == 401 else None
            answer = _json(bad.body(), bad.status, headers)
        self._metrics.count(path if path in self._routes else "other", answer.status_code, time.perf_counter() - began)
        return answer

    async def _route(self, request: Request, path: str) -> Response:
        if path not in OPEN:
            self._check_token(request)
        if path not in self._routes:
            raise BadRequest(404, f"there is no {path}; there are {', '.join(self._routes)}", code="not_found")
        method, answer = self._routes[path]
        if request.method != method:
            raise BadRequest(405, f"{path} takes {method}", code="method_not_allowed")
        return await answer(request)

    def _check_token(self, request: Request) -> None:
        if self._token_digest is None:
            return
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(digest(token.strip()), self._token_digest):
            told = "wrong token" if token else "no token: send `Authorization: Bearer TOKEN`"
            raise BadRequest(401, told, code="invalid_api_key")

    async def _embeddings(self, request: Request) -> Response:
        known = self._known or await self._look()
        body = await self._body(request)
        names = [known["model"], known["model"].rpartition("/")[0], self._served]
        asked = parse(body, self._limits, [n for n in names if n], known["dimensions"])
        done = await self._encode(Work(asked.texts, asked.field))
        if done.model != known["model"]:
            await self._look()
        if done.refused:
            raise BadRequest(400, done.refused, "input", "context_length_exceeded")
        self._metrics.texts.inc(len(asked.texts))
        self._metrics.tokens.inc(done.tokens)
        return Response(response(asked, done.vectors, done.tokens, done.model), media_type="application/json")

    async def _body(self, request: Request) -> bytes:
        limit = self._limits.max_body_bytes
        too_large = BadRequest(
            413, f"the body is larger than {limit} bytes: send fewer texts at once", code="too_large"
        )
        if int(request.headers.get("content-length") or 0) > limit:
            raise too_large
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
        except ClientDisconnect as gone:
            raise BadRequest(400, "the client went away", code="disconnected") from gone
        return bytes(body)

    async def _models(self, request: Request) -> Response:
        known = await self._look()
        return _json({"object": "list", "data": [{"id": known["model"], "object": "model", "owned_by": "gyre"}]})

    async def _health(self, request: Request) -> Response:
        try:
            known = await self._look()
        except Exception as error:  # noqa: BLE001  whatever keeps the model from answering
            return _json({"status": "unavailable", "why": type(error).__name__}, 503)
        return _json({"status": "ok", **known})

    async def _prometheus(self, request: Request) -> Response:
        known = await self._look()
        self._metrics.model.info({"model": known["model"], "follows": self._served, "trouble": known["trouble"]})
        return Response(generate_latest(self._metrics.registry), media_type="text/plain; version=0.0.4")

    async def _look(self) -> dict[str, Any]:
        self._known = await self._about()
        return self._known


class _Metrics:
    def __init__(self) -> None:
        self.registry = of = CollectorRegistry()
        self._requests = Counter("gyre_requests", "Requests answered", ("path", "status"), registry=of)
        self._seconds = Histogram("gyre_request_seconds", "From request to answer", buckets=_SECONDS, registry=of)
        self.texts = Counter("gyre_texts", "Texts embedded", registry=of)
        self.tokens = Counter("gyre_tokens", "Tokens of those texts, prompts included", registry=of)
        self.model = Info(
            "gyre_model", "Which version answers, and what keeps it from following its alias", registry=of
        )

    def count(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, str(status)).inc()
        if path == "/v1/embeddings" and status == 200:
            self._seconds.observe(seconds)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, "application/json")
