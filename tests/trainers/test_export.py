"""The exported model is the trained model: Sentence Transformers' own `encode` gives the trainer's vectors."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

from data_services.schema import RunError, UsageError
from data_services.tokenizer import FolderTokenizer
from tests.trainers.encoders.tiny import TEXTS, TINY, of, scrambled, tiny, train_tokenizer
from trainers.config import FromConfig, ModelConfig
from trainers.encoders.local import LocalEncoder
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.spec import ModelSpec
from trainers.encoders.text import TextEncoder, build_encoder
from trainers.export import export_sentence_transformer, load_exported

# shorter and longer than max_tokens, nothing but a word of the prompt, and no text at all
SAMPLE = [*TEXTS, "find", "a " * 300, ""]


def local(encoder: TextEncoder, folder: Path) -> LocalEncoder:
    spec = encoder.spec
    return LocalEncoder(encoder, FolderTokenizer(folder, spec.max_tokens, spec.prompts), 128)


def vectors(encoder: TextEncoder, folder: Path, field: str, texts: list[str] = SAMPLE) -> np.ndarray:
    return local(encoder, folder).encode(texts, field)


def trained_and_loaded(encoder: TextEncoder, folder: Path, out: Path) -> Iterator[tuple[str, list[LocalEncoder]]]:
    """By field: the trained encoder, the exported one, and one of a run that starts from the export."""
    started, beside = ModelConfig(path=str(out)), out.with_name("started")
    prepare_model_folder(started, beside)
    loaded = (encoder, folder), (load_exported(out), out), (build_encoder(started, beside), beside)
    ours = [local(*each) for each in loaded]
    for field in encoder.spec.prompts:
        yield field, ours


def assert_exported_is_trained(
    encoder: TextEncoder, spec: ModelSpec, folder: Path, out: Path, texts: list[str] = SAMPLE, trusted: bool = False
) -> SentenceTransformer:
    """Sentence Transformers, gyre and a new run that starts from the export all give the trained vectors."""
    assert export_sentence_transformer(encoder.state_dict(), spec, folder, out) == out
    model = SentenceTransformer(str(out), device="cpu", trust_remote_code=trusted)
    for field, ours in trained_and_loaded(encoder, folder, out):
        mine, *others = (each.encode(texts, field) for each in ours)
        for other in (model.encode(texts, prompt_name=field, batch_size=3), *others):
            np.testing.assert_allclose(other, mine, atol=1e-5)
    assert model.similarity_fn_name == ("cosine" if spec.normalize else "dot")
    return model


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max", "weighted_mean"])
@pytest.mark.parametrize("pool_prompt", [True, False])
def test_pooling_prompts_and_truncation_survive_export(tmp_path, pooling, pool_prompt):
    keys = {"query_prompt": "find the code: ", "pooling": pooling, "pool_prompt": pool_prompt, "max_tokens": 24}
    encoder, spec = tiny(tmp_path / "m", **keys)
    # the maximum over no token at all is not a number in Sentence Transformers
    texts = SAMPLE[:-1] if pooling == "max" else SAMPLE
    assert_exported_is_trained(scrambled(encoder), spec, tmp_path / "m", tmp_path / "out", texts)


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("qwen3", {}),
        ("qwen3", {"bidirectional": False, "pooling": "last", "document_prompt": "passage: "}),
        ("bert", {"query_prompt": "q: "}),
        ("llama", {"attention": "sdpa"}),
        ("mistral", {}),
        ("qwen2", {}),
        ("gemma", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
    ],
)
def test_architectures_and_directions_survive_export(tmp_path, architecture, keys):
    encoder, spec = tiny(tmp_path / "m", of(architecture), **keys)
    assert_exported_is_trained(scrambled(encoder), spec, tmp_path / "m", tmp_path / "out")
    causal = json.loads((tmp_path / "out" / "config.json").read_text()).get("is_causal")
    assert causal is (False if spec.bidirectional and architecture != "bert" else None)


@pytest.mark.parametrize(
    "keys",
    [
        {"head": {"sizes": [12]}},
        {"head": {"sizes": [40, 12], "activation": "gelu", "last_activation": "tanh", "bias": False}},
        {"head": {"sizes": [40, 12], "activation": "silu"}, "normalize": False},
        {"head": {"sizes": [32, 8], "use": "training"}, "layers": [0, 1, 2]},
        {"normalize": False},
        {"mean_layers": 3, "query_prompt": "find: ", "pool_prompt": False},
        {"mean_layers": 2, "head": {"sizes": [12]}, "pooling": "last"},
        {"task_prompts": {"sts": {"query": "same as "}}, "pool_prompt": False},
    ],
)
def test_what_follows_the_transformer_survives_export(tmp_path, keys):
    encoder, spec = tiny(tmp_path / "m", **keys)
    model = assert_exported_is_trained(scrambled(encoder), spec, tmp_path / "m", tmp_path / "out")
    assert model.get_embedding_dimension() == spec.dim
    assert (tmp_path / "out" / "2_Normalize").exists() == (spec.normalize and len(model) == 3)


def test_latent_attention_is_exported_with_the_code_that_runs_it(tmp_path):
    keys = {"pooling": "latent", "latent": {"count": 5, "heads": 4}, "query_prompt": "find: ", "pool_prompt": False}
    encoder, spec = tiny(tmp_path / "m", **keys)
    model = assert_exported_is_trained(scrambled(encoder), spec, tmp_path / "m", tmp_path / "out", trusted=True)
    model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"token_dim": 8, "document_prompt": "d: "},
        {"token_dim": 8, "skip_punctuation": True, "query_prompt": "q: "},
        {"tower": of("bert"), "query_length": 16, "query_prompt": "q: ", "max_tokens": 24},
        {"normalize": False, "mean_layers": 2},
    ],
)
def test_late_interaction_survives_export(tmp_path, keys):
    encoder, spec = tiny(tmp_path / "m", pooling="tokens", **keys)
    export_sentence_transformer(scrambled(encoder).state_dict(), spec, tmp_path / "m", tmp_path / "out")
    model = MultiVectorEncoder(str(tmp_path / "out"), device="cpu")
    encode = {"query": model.encode_query, "document": model.encode_document}
    for field, ours in trained_and_loaded(encoder, tmp_path / "m", tmp_path / "out"):
        theirs = encode[field](SAMPLE, batch_size=3, convert_to_numpy=True)
        for mine in (each.encode_tokens(SAMPLE, field) for each in ours):
            assert [len(tokens) for tokens in mine] == [len(tokens) for tokens in theirs]
            np.testing.assert_allclose(np.concatenate(mine), np.concatenate(theirs), atol=1e-5)
    assert model.similarity_fn_name == "maxsim"


def test_a_late_interaction_model_can_be_pooled_to_one_vector_and_cannot_get_a_second_projection(tmp_path):
    keys = {"query_length": 16, "skip_punctuation": True, "token_dim": 8}
    encoder, spec = tiny(tmp_path / "m", of("bert"), pooling="tokens", **keys)
    out = export_sentence_transformer(encoder.state_dict(), spec, tmp_path / "m", tmp_path / "out")
    pooled = prepare_model_folder(ModelConfig(path=str(out), pooling="mean"), tmp_path / "pooled")
    assert (pooled.query_length, pooled.skipped, pooled.dim) == (None, {}, 8)
    for key in ({"token_dim": 4}, {"pooling": "mean", "head": {"sizes": [4]}}):
        with pytest.raises(UsageError, match=r"model.(token_dim|head): .*/out has a projection of its own"):
            prepare_model_folder(ModelConfig(path=str(out), **key), tmp_path / "no")


def test_a_run_that_starts_from_another_takes_its_head_up_or_says_why_not(tmp_path):
    first, spec = tiny(tmp_path / "m", head={"sizes": [8]})
    out = export_sentence_transformer(scrambled(first).state_dict(), spec, tmp_path / "m", tmp_path / "out")
    second, _ = tiny(tmp_path / "second", init_from=str(out), head={"sizes": [8]})
    assert torch.equal(first.readout.head[0].weight, second.readout.head[0].weight)
    for keys, there in (({}, "missing"), ({"head": {"sizes": [9]}}, r"\(9,\)")):
        with pytest.raises(UsageError, match=rf"model.init_from: readout.head.0.bias is \(8,\) there and {there} in"):
            tiny(tmp_path / "no", init_from=str(out), **keys)


def test_a_pretrained_model_comes_in_and_goes_out_unchanged(tmp_path, minilm):
    config = ModelConfig(path=str(minilm))
    spec = prepare_model_folder(config, tmp_path / "m")
    encoder = build_encoder(config, tmp_path / "m")
    theirs = SentenceTransformer(str(minilm), device="cpu").encode(SAMPLE)
    np.testing.assert_allclose(vectors(encoder, tmp_path / "m", "query"), theirs, atol=1e-5)
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
        vectors(build_encoder(as_path, tmp_path / "again"), tmp_path / "again", "query"),
        vectors(first, tmp_path / "m", "query"),
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
