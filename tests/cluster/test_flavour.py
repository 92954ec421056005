"""The registered model as MLflow loads it, in a process that knows nothing of gyre, and what its files show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.model_facts import export_parity, is_pickle, latency_p95_ms, measure
from cluster.models import exported_encoder, resolve
from cluster.registry import LINEAGE, model_folder, register
from cluster.tracking import Tracker, tracking_uri
from tests.trainers.encoders.tiny import scrambled, tiny
from trainers.export import export_sentence_transformer

TEXTS = ["how to read a file", "def read(path): ...", "a " * 300]
ELSEWHERE = """
import json, sys
import mlflow
mlflow.set_tracking_uri(sys.argv[2])
model = mlflow.pyfunc.load_model(sys.argv[1])
texts = json.load(sys.stdin)
found = {"document": model.predict(texts).tolist()}
found["query"] = model.predict(texts, params={"prompt_name": "query"}).tolist()
found["flavour"] = mlflow.sentence_transformers.load_model(sys.argv[1]).encode(texts, prompt_name="query").tolist()
found["example"] = model.input_example
found["output"] = model.metadata.get_output_schema().to_dict()
assert not {"cluster", "trainers", "data_services"} & set(sys.modules)
print(json.dumps(found))
"""


def said_elsewhere(folder, script, *arguments):
    """What a script says of TEXTS in a fresh process that knows nothing of the working tree."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, *arguments],
        input=json.dumps(TEXTS),
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith(("GYRE_", "PYTHON"))},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    encoder, spec = tiny(folder / "model", query_prompt="find the code: ", max_tokens=24)
    return export_sentence_transformer(scrambled(encoder).state_dict(), spec, folder / "model", folder / "out")


def test_a_fresh_process_elsewhere_loads_the_exporters_vectors_with_mlflow_alone(root, export, tmp_path):
    run_id = Tracker.start("exp", "run", {}, root).run_id
    scores = {"validation": {}, "heldout": {}}
    version = register("tiny", export, run_id=run_id, scores=scores, gate=None, tags={LINEAGE["run"]: "r"})
    assert "champion" in version.aliases
    found = said_elsewhere(tmp_path, ELSEWHERE, "models:/tiny@champion", tracking_uri(root))
    encoder = exported_encoder(export)
    for part, field in (("document", "document"), ("query", "query"), ("flavour", "query")):
        np.testing.assert_allclose(found[part], encoder.encode(TEXTS, field), atol=1e-5)
    assert found["example"]
    assert found["output"][0]["tensor-spec"]["shape"] == [-1, encoder.encoder.dim]
    folder, _ = model_folder("models:/tiny@champion")
    assert {p.name: p.read_bytes() for p in folder.glob("*") if p.is_file()} == {
        p.name: p.read_bytes() for p in export.glob("*") if p.is_file()
    }
    assert resolve("models:/tiny/1").folder == folder


SEVERAL = """
import json, sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
texts, found = json.load(sys.stdin), {}
for name in ("towers", "tokens"):
    model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    sides = {side: model.predict(texts, params={"prompt_name": side}) for side in ("query", "document")}
    found[name] = sides if name == "tokens" else {side: its.tolist() for side, its in sides.items()}
    found[name]["inputs"] = model.metadata.get_input_schema().to_dict()
assert not {"cluster", "trainers", "data_services"} & set(sys.modules)
print(json.dumps(found))
"""


def several(folder, **keys):
    """An export of two towers whose weights differ."""
    from tests.trainers.encoders.tiny import TINY, train_tokenizer, train_tokenizer_with_mask
    from trainers.config import ModelConfig
    from trainers.encoders.model_folder import prepare_model_folder
    from trainers.encoders.towers import build_towers, export_towers, prepare_towers

    config = ModelConfig(config=TINY, max_tokens=40, towers="separate", **keys)
    train = train_tokenizer_with_mask if config.query_length else train_tokenizer
    prepare_model_folder(config, folder / "model", train)
    prepare_towers(config, folder / "model")
    towers = build_towers(config, folder / "model").eval()
    scrambled(towers.document)
    return export_towers(towers.state_dict(), folder / "model", folder / "out")


def test_two_towers_and_token_vectors_load_elsewhere_with_mlflow_too(root, tmp_path):
    exports = {
        "towers": several(tmp_path / "towers", query_prompt="find: "),
        "tokens": several(tmp_path / "tokens", pooling="tokens", token_dim=8, query_length=12),
    }
    for name, folder in exports.items():
        run_id = Tracker.start("exp", name, {}, root).run_id
        register(name, folder, run_id=run_id, scores={"validation": {}, "heldout": {}}, gate=None, tags={})
    found = said_elsewhere(tmp_path, SEVERAL, tracking_uri(root))
    for field in ("query", "document"):
        ours = exported_encoder(exports["towers"]).encode(TEXTS, field)
        np.testing.assert_allclose(found["towers"][field], ours, atol=1e-5)
        tokens = exported_encoder(exports["tokens"]).encode_tokens(TEXTS, field)  # type: ignore[attr-defined]
        for got, want in zip(found["tokens"][field], tokens, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
    assert found["towers"]["inputs"] == [{"type": "string", "required": True}]
    assert resolve("models:/tokens@champion").folder.name == "model.sentence_transformer"


def test_the_facts_of_an_export(export):
    facts = measure(export, parity=True)
    assert facts.safetensors >= 1
    assert facts.pickles == ()
    assert facts.size_mb == pytest.approx(sum(p.stat().st_size for p in export.rglob("*") if p.is_file()) / 1e6)
    assert facts.export_parity < 1e-5
    assert latency_p95_ms(export) > 0


def test_an_export_that_isnt_what_gyre_computes_has_no_parity(export, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(export, other)
    settings = json.loads((other / "config_sentence_transformers.json").read_text())
    settings["prompts"]["query"] = "another prompt: "
    (other / "config_sentence_transformers.json").write_text(json.dumps(settings))
    assert export_parity(other) > 1e-3


@pytest.mark.parametrize("name", ["pytorch_model.bin", "head.pt", "weights.dat"])
def test_a_pickle_is_known_by_its_name_or_its_first_bytes(tmp_path, name):
    import pickle

    file = tmp_path / name
    file.write_bytes(pickle.dumps([1]))
    assert is_pickle(file)
    harmless = Path(tmp_path / "notes.txt")
    harmless.write_text("")
    assert not is_pickle(harmless)
