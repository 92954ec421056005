"""The model card of an export, and the export on a hub."""

import base64
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import ModelCard

from cluster.config import load_recipe
from cluster.model_card import CardFacts, licence_of, write_card
from cluster.revision import code_revision
from data_services.schema import UsageError
from tests.e2e.commands import SHELL, TREE

RECIPE = {
    "name": "small",
    "data": {"sources": [{"path": "hf:owner/pairs"}], "steps": 3},
    "model": {"path": "owner/base"},
    "registry": {"card": {"licence": "mit", "languages": ["en", "code"], "description": "For code.\nNot for prose."}},
}
ROWS = {"bm25": {"ndcg@10": 0.3, "mrr@10": 0.2}, "trained": {"ndcg@10": 0.41239, "mrr@10": 0.35}}


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return load_recipe(tmp_path / "recipe.yaml")


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "README.md").write_text("# A text embedding model trained with gyre\n\nLoad it so.\n")
    (folder / "config.json").write_text("{}")
    return folder


def test_a_card_has_what_the_hub_reads_and_how_the_model_is_loaded(recipe, export):
    facts = CardFacts(recipe, {"heldout": ROWS}, {"run": "small-1", "code": "abc"})
    write_card(export, facts)
    card = ModelCard.load(export / "README.md")
    about = card.data.to_dict()
    assert (about["license"], about["language"]) == ("mit", ["en", "code"])
    assert (about["datasets"], about["base_model"]) == (["owner/pairs"], "owner/base")
    assert (about["library_name"], about["pipeline_tag"]) == ("sentence-transformers", "sentence-similarity")
    assert about["metrics"] == ["mrr", "ndcg"]
    (result,) = (r for r in card.data.eval_results if r.metric_name == "ndcg@10")
    assert (result.metric_value, result.dataset_split, result.dataset_type) == (0.41239, "heldout", "owner/pairs")
    for part in ("# small\n", "Load it so.", "| trained | 0.4124 | 0.3500 |", "Not for prose.", "- run: `small-1`"):
        assert part in card.text
    assert licence_of(export) == "mit"
    first = (export / "README.md").read_text()
    write_card(export, facts)
    assert (export / "README.md").read_text() == first


def test_a_folder_without_card_or_licence_has_none_and_a_broken_card_is_said(export, tmp_path):
    assert licence_of(export) == licence_of(tmp_path) == ""
    (export / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(UsageError, match=r"README\.md has metadata that isn't YAML"):
        licence_of(export)


def test_the_code_revision_is_this_trees():
    head = subprocess.run(["git", "-C", TREE, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert code_revision().startswith(head.stdout.strip() if head.returncode == 0 else "gyre ")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a commit of small files needs."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("authorization") != "Bearer hub-token":
            return self._answer({"error": "Unauthorized"}, 401)
        if self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            return self._answer({"url": f"{self.server.url}/me/mine"})
        if self.path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self._answer({"files": [f | {"shouldIgnore": False, "oid": None} for f in files]})
        if self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.files |= {f["path"]: base64.b64decode(f["content"]) for f in files}
            commit = {"commitOid": "0" * 40, "commitUrl": f"{self.server.url}/me/mine/commit/{'0' * 40}"}
            return self._answer(commit | {"pullRequestUrl": None})
        return self._answer({"errors": [], "warnings": []})

    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.made = f"http://127.0.0.1:{server.server_port}", {}, None
    threading.Thread(target=server.serve_forever).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_export_is_pushed_whole_in_one_commit_or_says_why_not(hub, export, tmp_path):
    def push(out, **env):
        own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "cluster.cli", "export", str(export), str(tmp_path / out)]
        command += ["--push-to-hub", "me/mine"]
        return subprocess.run(command, cwd=TREE, env=SHELL | own | env, capture_output=True, text=True, timeout=240)

    done = push("out", HF_TOKEN="hub-token")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/me/mine"
    assert "private" in json.dumps(hub.made)
    assert hub.files == {p.name: p.read_bytes() for p in export.iterdir()}
    hub.files.clear()
    refused = push("other", HF_TOKEN="wrong")
    assert refused.returncode == 1
    assert "gyre: the hub doesn't let this user write to me/mine" in refused.stderr
    assert not hub.files
    assert (tmp_path / "other" / "config.json").is_file()
