"""The server's protocol, limits and statuses over HTTP, with a real model and without Ray."""

import base64
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from cluster.embedding import load_encoder
from cluster.registry import model_folder, promote, register
from cluster.serving.deployment import ServeConfig, serving, wait_for_ever
from cluster.serving.endpoint import Endpoint, digest
from cluster.serving.model import ServedModel, Work
from cluster.serving.protocol import Limits
from cluster.tracking import Tracker, client
from data_services.schema import RunError, UsageError
from tests.e2e.commands import PATIENCE_S
from tests.trainers.encoders.tiny import scrambled, tiny
from trainers.export import export_sentence_transformer

TOKEN = "secret of a test"
SERVED = "models:/tiny@champion"


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Two models whose vectors differ."""
    made = []
    for i in range(2):
        folder = tmp_path_factory.mktemp("export")
        encoder, spec = tiny(folder / "model", query_prompt="find the code: ", max_tokens=24)
        encoder = scrambled(encoder) if i else encoder
        made.append(export_sentence_transformer(encoder.state_dict(), spec, folder / "model", folder / "out"))
    return made


@pytest.fixture
def served(root, exports):
    """Both registered, the first champion, and the model that follows the alias."""
    for export in exports:
        run_id = Tracker.start("exp", "run", {}, root).run_id
        register("tiny", export, run_id=run_id, scores={"validation": {}}, gate=None, tags={})
    model = ServedModel(SERVED, root, follow_s=0.05)
    yield model
    model.close()


class Client:
    """Requests to a server in a thread of this process."""

    def __init__(self, model, limits=None, token=TOKEN):
        async def encode(work):
            return model.encode([work])[0]

        async def about():
            return model.about()

        self.endpoint = Endpoint(encode, about, SERVED, limits or Limits(), digest(token) if token else None)
        methods = ["GET", "POST", "PUT"]
        app = Starlette(routes=[Route("/{path:path}", self.endpoint.__call__, methods=methods)])
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        wait_until(lambda: self._server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def __call__(self, body=None, path="/v1/embeddings", token=TOKEN, method=None):
        """(status, JSON or text)."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, method=method)
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text, status = answer.read().decode(), answer.status
        except urllib.error.HTTPError as error:
            text, status = error.read().decode(), error.code
        return status, json.loads(text) if text.startswith("{") else text

    def close(self):
        self._server.should_exit = True
        self._thread.join()


def wait_until(true):
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def ask(served):
    client = Client(served, Limits(max_body_bytes=3000, max_texts=4))
    yield client
    client.close()


def test_the_vectors_are_the_models_in_both_encodings_and_for_both_prompts(ask, exports):
    encoder, texts = load_encoder(exports[0], "query"), ["read a file", "open", "read a file"]
    for kind in ("query", "document"):
        wanted = encoder.encode(texts, kind)
        status, plain = ask({"input": texts, "input_type": kind, "model": "tiny/1"})
        assert status == 200
        assert (plain["object"], plain["model"]) == ("list", "tiny/1")
        assert [row["index"] for row in plain["data"]] == [0, 1, 2]
        np.testing.assert_allclose([row["embedding"] for row in plain["data"]], wanted, atol=1e-6)
        _, coded = ask({"input": texts, "input_type": kind, "encoding_format": "base64", "user": "me"})
        decoded = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in coded["data"]]
        np.testing.assert_allclose(decoded, wanted, atol=1e-6)
        assert coded["usage"]["prompt_tokens"] == int(encoder.tokenize(texts, kind).lengths.sum())
    _, one = ask({"input": "read a file", "dimensions": 8, "model": "tiny"})
    whole = encoder.encode(texts[:1], "document")[0, :8]
    np.testing.assert_allclose(one["data"][0]["embedding"], whole / np.linalg.norm(whole), atol=1e-6)


def test_wrong_requests_get_a_status_and_a_sentence(ask):
    for body, status, told in [
        (b"{", 400, "the body is not JSON"),
        (b"[" * 2000, 400, "the body is not JSON"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        ([1], 400, "the body is no JSON object"),
        ({}, 400, "input must be a text"),
        ({"input": []}, 400, "at least one text"),
        ({"input": [""]}, 400, "input[0] is empty"),
        ({"input": ["a", [1, 2]]}, 400, "input[1] is list; this server takes texts"),
        ({"input": ["a"] * 5}, 400, "input has 5 texts, 4 at most"),
        ({"input": ["a", "b " * 300]}, 400, "input[1] has "),
        ({"input": "a" * 4000}, 413, "larger than 3000 bytes"),
        ({"input": "a", "model": "other"}, 404, "model 'other' is not served here; tiny/1 is"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions is 0; the model's vectors have"),
        ({"input": "a", "dimensions": True}, 400, "dimensions is True"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format is 'hex'; it must be float or base64"),
        ({"input": "a", "input_type": "passage"}, 400, "input_type is 'passage'"),
        ({"input": "a", "dimension": 8}, 400, "unknown key 'dimension'; did you mean dimensions?"),
    ]:
        answered, answer = ask(body)
        assert answered == status, answer
        assert told in answer["error"]["message"]
        assert answer["error"]["type"] == "invalid_request_error"
    assert ask({"input": "a"}, method="PUT")[0] == 405
    assert ask(path="/v1/embedings", method="GET")[0] == 404


def test_without_the_token_only_health_answers(ask):
    for token, told in ((None, "send `Authorization: Bearer TOKEN`"), ("wrong", "wrong token")):
        for path, body in (("/v1/embeddings", {"input": "a"}), ("/metrics", None), ("/v1/models", None)):
            status, answer = ask(body, path, token)
            assert status == 401
            assert told in answer["error"]["message"]
        assert ask(path="/health", token=token)[1]["model"] == "tiny/1"


def test_metrics_count_requests_texts_and_tokens(ask):
    ask({"input": ["read", "write"]})
    ask(b"{")
    text = ask(path="/metrics")[1]
    assert 'gyre_requests_total{path="/v1/embeddings",status="200"} 1.0' in text
    assert 'gyre_requests_total{path="/v1/embeddings",status="400"} 1.0' in text
    assert "gyre_texts_total 2.0" in text
    assert 'model="tiny/1"' in text
    assert [m["id"] for m in ask(path="/v1/models")[1]["data"]] == ["tiny/1"]


def test_an_alias_is_followed_and_no_request_is_dropped(ask, served, exports):
    answers, stop = [], threading.Event()

    def keep_asking():
        while not stop.is_set():
            answers.append(ask({"input": "read a file"}))

    asking = threading.Thread(target=keep_asking)
    asking.start()
    wait_until(lambda: answers)
    promote("tiny", 2)
    wait_until(lambda: answers[-1][1].get("model") == "tiny/2")
    stop.set()
    asking.join()
    assert {status for status, _ in answers} == {200}
    by_model = {a["model"]: a["data"][0]["embedding"] for _, a in answers}
    for i, export in enumerate(exports, 1):
        wanted = load_encoder(export, "document").encode(["read a file"], "document")[0]
        np.testing.assert_allclose(by_model[f"tiny/{i}"], wanted, atol=1e-6)
    assert ask({"input": "a", "model": "tiny/2"})[0] == 200


def test_a_registry_that_is_away_leaves_the_old_version_in_place(served, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    wait_until(lambda: "doesn't answer" in served.trouble)
    assert served.encode([Work(("read",), "query")])[0].model == "tiny/1"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    wait_until(lambda: not served.trouble)


def test_a_new_version_whose_files_are_damaged_leaves_the_old_one_in_place(served):
    weights = model_folder("models:/tiny/2")[0] / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()  # it may be a link to the export
    weights.write_bytes(whole[:-100])
    with pytest.raises(RunError, match="aren't those that were registered"):
        promote("tiny", 2)
    client().set_registered_model_alias("tiny", "champion", "2")
    wait_until(lambda: "is damaged (" in served.trouble)
    assert served.encode([Work(("read",), "query")])[0].model == "tiny/1"
    weights.write_bytes(whole)
    wait_until(lambda: served.encode([Work(("read",), "query")])[0].model == "tiny/2")


def test_requests_together_get_what_they_would_get_alone(served):
    works = [Work(("read a file", "open"), "query"), Work(("x " * 99,), "query"), Work(("write",), "document")]
    for together, work in zip(served.encode(works), works, strict=True):
        alone = served.encode([work])[0]
        np.testing.assert_allclose(together.vectors, alone.vectors, atol=1e-6)
        assert (together.tokens, together.refused) == (alone.tokens, alone.refused)
    assert "input[0] has " in served.encode(works)[1].refused


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_waits_for_either_signal_and_then_goes_on_to_shut_down(number):
    before = signal.getsignal(number)

    def send():
        wait_until(lambda: signal.getsignal(number) != before)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    wait_for_ever()
    sender.join()
    assert signal.getsignal(number) == before


def test_an_open_address_needs_a_token_and_a_port_must_be_free(root, monkeypatch):
    monkeypatch.delenv("GYRE_SERVE_TOKEN", raising=False)
    with pytest.raises(UsageError, match="set GYRE_SERVE_TOKEN"), serving(ServeConfig(SERVED, host="0.0.0.0")):
        pass
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServeConfig(SERVED, port=taken.getsockname()[1])
        with pytest.raises(UsageError, match="choose another --port"), serving(config):
            pass
    with pytest.raises(UsageError, match="no registered model 'tiny'"), serving(ServeConfig(SERVED, port=0)):
        pass
