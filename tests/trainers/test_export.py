"""The exported model is the trained model: Sentence Transformers' own `encode` gives the trainer's vectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from data_services.schema import RunError, UsageError
from data_services.tokenizer import FolderTokenizer
from tests.trainers.test_encoders import TEXTS, TINY, minilm, tiny, train_tokenizer  # noqa: F401  minilm is a fixture
from trainers.config import FromConfig, ModelConfig
from trainers.encoders.model_folder import ModelSpec, prepare_model_folder
from trainers.encoders.text import LocalEncoder, TextEncoder, build_encoder
from trainers.export import export_sentence_transformer, load_exported

# shorter and longer than max_tokens, nothing but a word of the prompt, and no text at all
SAMPLE = [*TEXTS, "find", "a " * 300, ""]


def vectors(encoder: TextEncoder, spec: ModelSpec, folder: Path, field: str) -> np.ndarray:
    return LocalEncoder(encoder, FolderTokenizer(folder, spec.max_tokens, spec.prompts), 128).encode(SAMPLE, field)


def assert_exported_is_trained(encoder: TextEncoder, spec: ModelSpec, folder: Path, out: Path) -> None:
    assert export_sentence_transformer(encoder.state_dict(), spec, folder, out) == out
    model = SentenceTransformer(str(out), device="cpu")
    for field in ("query", "document"):
        mine = vectors(encoder, spec, folder, field)
        np.testing.assert_allclose(model.encode(SAMPLE, prompt_name=field, batch_size=3), mine, atol=1e-5)
        np.testing.assert_allclose(vectors(load_exported(out), spec, out, field), mine, atol=1e-5)
    assert model.similarity_fn_name == "cosine"


def scrambled(encoder: TextEncoder) -> TextEncoder:
    """Weights far from their initial scale, so that every part of the model matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return encoder


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("pool_prompt", [True, False])
def test_pooling_prompts_and_truncation_survive_export(tmp_path, pooling, pool_prompt):
    encoder, spec = tiny(
        tmp_path / "m",
        query_prompt="find the code: ",
        pooling=pooling,
        pool_prompt=pool_prompt,
        max_tokens=24,
    )
    assert_exported_is_trained(scrambled(encoder), spec, tmp_path / "m", tmp_path / "out")


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("qwen3", {}),
        ("qwen3", {"bidirectional": False, "pooling": "last", "document_prompt": "passage: "}),
        ("bert", {"query_prompt": "q: "}),
        ("llama", {"attention": "sdpa"}),
    ],
)
def test_architectures_and_directions_survive_export(tmp_path, architecture, keys):
    tower = FromConfig(**TINY.model_dump() | {"architecture": architecture})
    encoder, spec = tiny(tmp_path / "m", tower, **keys)
    assert_exported_is_trained(scrambled(encoder), spec, tmp_path / "m", tmp_path / "out")
    causal = json.loads((tmp_path / "out" / "config.json").read_text()).get("is_causal")
    assert causal is (False if spec.bidirectional and architecture != "bert" else None)


def test_a_pretrained_model_comes_in_and_goes_out_unchanged(tmp_path, minilm):  # noqa: F811
    config = ModelConfig(path=str(minilm))
    spec = prepare_model_folder(config, tmp_path / "m")
    encoder = build_encoder(config, tmp_path / "m")
    theirs = SentenceTransformer(str(minilm), device="cpu").encode(SAMPLE)
    np.testing.assert_allclose(vectors(encoder, spec, tmp_path / "m", "query"), theirs, atol=1e-5)
    assert_exported_is_trained(encoder, spec, tmp_path / "m", tmp_path / "out")


def test_another_run_can_start_from_an_exported_model(tmp_path):
    first, spec = tiny(tmp_path / "m")
    out = export_sentence_transformer(scrambled(first).state_dict(), spec, tmp_path / "m", tmp_path / "out")
    second, _ = tiny(tmp_path / "second", init_from=str(out))
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    as_path = ModelConfig(path=str(out))
    spec_again = prepare_model_folder(as_path, tmp_path / "again")
    assert spec_again.bidirectional
    np.testing.assert_allclose(
        vectors(build_encoder(as_path, tmp_path / "again"), spec_again, tmp_path / "again", "query"),
        vectors(first, spec, tmp_path / "m", "query"),
        atol=1e-6,
    )


def test_weights_of_other_shapes_or_tokens_are_refused_naming_the_first(tmp_path):
    encoder, spec = tiny(tmp_path / "m")
    out = export_sentence_transformer(encoder.state_dict(), spec, tmp_path / "m", tmp_path / "out")
    for change, message in [
        ({"intermediate": 64}, r"layers.0.mlp.gate_proj.weight is \(48, 32\) in .* and \(64, 32\) in this"),
        ({"layers": 1}, r"layers.1.\S+ is \(.*\) in .* and missing in this recipe"),
        ({"layers": 3}, r"layers.2.\S+ is missing in .* and \(.*\) in this recipe"),
    ]:
        tower = FromConfig(**TINY.model_dump() | change)
        with pytest.raises(UsageError, match="model.init_from: " + message):
            prepare_model_folder(ModelConfig(config=tower, init_from=str(out)), tmp_path / "no", train_tokenizer)
    other = ModelConfig(path=str(out), init_from=str(tmp_path / "other"))
    _swap_two_tokens(out, tmp_path / "other")
    with pytest.raises(UsageError, match=r"model.init_from: .* another tokenizer"):
        prepare_model_folder(other, tmp_path / "no")


def _swap_two_tokens(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[50:52]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_an_export_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    encoder, spec = tiny(tmp_path / "m")
    weights = encoder.state_dict()
    out = export_sentence_transformer(weights, spec, tmp_path / "m", tmp_path / "out")
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    missing = {name: w for name, w in weights.items() if name != "backbone.norm.weight"}
    with pytest.raises(ValueError, match=r"backbone.norm.weight is missing"):
        export_sentence_transformer(missing, spec, tmp_path / "m", out)
    with pytest.raises(RunError, match="the export to"):
        export_sentence_transformer(weights, spec, tmp_path / "nowhere", out)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert {p.name for p in tmp_path.iterdir()} == {"m", "out"}


def test_weights_are_written_in_fp32_with_nothing_but_what_the_model_saves(tmp_path):
    from safetensors.torch import load_file

    encoder, spec = tiny(tmp_path / "m")
    weights = {name: w.bfloat16() for name, w in encoder.state_dict().items()}
    weights["backbone.rotary_emb.inv_freq"] = torch.ones(8)
    out = export_sentence_transformer(weights, spec, tmp_path / "m", tmp_path / "out")
    written = load_file(out / "model.safetensors")
    assert {f"backbone.{name}" for name in written} == set(encoder.state_dict())
    assert {w.dtype for w in written.values()} == {torch.float32}


def test_only_an_exported_folder_loads(tmp_path):
    tiny(tmp_path / "m")
    with pytest.raises(UsageError, match="no exported model"):
        load_exported(tmp_path / "m")
    with pytest.raises(UsageError, match=r"no gyre_model.json"):
        load_exported(tmp_path)
