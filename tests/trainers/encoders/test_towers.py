"""Two towers: which one a chunk runs through, where they start, that a step trains both, and the way out and back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from data_services.collate import share_batch
from data_services.inputs import Routed
from data_services.schema import Inputs, UsageError
from data_services.tokenizer import FolderTokenizer
from tests.trainers.encoders.steps import CPU, DECAY, assert_twins, make_step, take, twin_of
from tests.trainers.encoders.tiny import TEXTS, TINY, padded, scrambled, train_tokenizer, train_tokenizer_with_mask
from tests.trainers.test_step import DIM, Tower, batch_of
from trainers.chunks import chunks_of
from trainers.collectives import Group
from trainers.config import ModelConfig
from trainers.encoders.inputs import TowerInputs
from trainers.encoders.local import LocalEncoder
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.text import build_encoder
from trainers.encoders.towers import Layout, Towers, build_towers, export_towers, load_towers, prepare_towers
from trainers.export import export_sentence_transformer
from trainers.model import Trained

RECIPE = {"max_tokens": 40, "towers": "separate", "query_prompt": "find: ", "pool_prompt": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(recipe, model folder, towers of different weights)"""
    place = tmp_path_factory.mktemp("towers") / "model"
    config = ModelConfig(config=TINY, **RECIPE)
    prepare_model_folder(config, place, train_tokenizer)
    prepare_towers(config, place)
    towers = build_towers(config, place).eval()
    scrambled(towers.document)
    return config, place, towers


def test_a_chunk_runs_through_the_tower_of_its_texts(folder):
    _, _, towers = folder
    ids, mask = padded([5, 9])
    prompts = torch.zeros(2, dtype=torch.int64)
    first, second = (TowerInputs(ids, mask, prompts, prompts == 0, tower=number) for number in range(2))
    assert torch.equal(towers(first), towers.query(first))
    assert torch.equal(towers(second), towers.document(second))
    assert not torch.allclose(towers(first), towers(second))


def test_both_start_equal_and_take_no_more_from_the_generator_than_one(folder):
    config, place, _ = folder
    torch.manual_seed(3)
    one, after_one = build_encoder(config, place), torch.rand(1)
    torch.manual_seed(3)
    towers, after_two = build_towers(config, place), torch.rand(1)
    assert torch.equal(after_one, after_two)
    for name, weight in one.state_dict().items():
        assert torch.equal(towers.query.state_dict()[name], weight)
        assert torch.equal(towers.document.state_dict()[name], weight)
    assert towers.parameter_count == 2 * one.parameter_count
    assert not {id(p) for p in towers.query.parameters()} & {id(p) for p in towers.document.parameters()}


# a step


def two_towers():
    torch.manual_seed(1)
    towers = Towers({"query": Tower(), "document": Tower()})
    for p in towers.document.parameters():
        nn.init.normal_(p, std=0.5)
    return Trained(towers, {})


def global_batch():
    batch = batch_of(0, queries=3, negatives=9)
    return replace(batch, queries=Inputs.of_tower(batch.queries, 0), documents=Inputs.of_tower(batch.documents, 1))


def shares_of(workers):
    """Cut by field; one of two workers has a chunk without texts among its queries', and one among its documents'."""
    shares = share_batch(global_batch(), workers, 12)
    empty = {
        int(tower) for share in shares for c, tower in zip(share.chunks, share.chunk_towers, strict=True) if not len(c)
    }
    assert workers == 1 or empty == {0, 1}
    return shares


@pytest.mark.parametrize("side", ["queries", "documents"])
def test_a_momentum_pass_over_one_side_runs_the_chunks_of_its_tower_alone(side):
    """As many on every worker, chunks without texts among them, and every text of the side once."""
    shares = shares_of(2)
    passes = [chunks_of(share, CPU, (side,)) for share in shares]
    assert len(passes[0]) == len(passes[1]) < len(shares[0].chunks)
    for share, chunks in zip(shares, passes, strict=True):
        b, d = len(share.queries), len(share.documents)
        assert {bool(its) for chunk in chunks if len(chunk.rows) for its in chunk.inputs.queries} == {side == "queries"}
        rows = torch.cat([chunk.rows for chunk in chunks]).sort().values.tolist()
        assert rows == (list(range(b)) if side == "queries" else list(range(b, b + d)))


def first_gradients(stage, cached):
    """What a worker has of the step, how the averaged towers encode the batch after it, and the weights."""
    step, group = make_step(two_towers(), stage, cached), Group()
    batch = shares_of(group.size)[group.rank]
    taken = take(step, batch)
    averaged = [step.memory.encoder.forward(inputs=chunk.inputs)[0] for chunk in chunks_of(batch, CPU)]
    return taken, averaged, step.engine.full_weights()


@pytest.mark.parametrize(("world_size", "stage", "cached"), [(1, 0, True), (2, 2, False), (2, 3, True), (2, 3, False)])
def test_a_step_of_two_towers_has_the_gradients_of_the_dense_twin(gloo, world_size, stage, cached):
    answers = gloo(world_size, first_gradients, stage, cached)
    assert_twins([taken for taken, *_ in answers], twin_of(two_towers(), global_batch()))


def test_the_momentum_encoder_averages_both_towers_and_workers_call_them_in_the_same_order(gloo):
    answers = gloo(2, first_gradients, 3, False)
    start = two_towers().state_dict()
    model = two_towers()
    # average <- 0.9 average + 0.1 weights
    model.load_state_dict({name: w.lerp(answers[0][-1][name], 1 - DECAY) for name, w in start.items()})
    for batch, (_, averaged, _) in zip(shares_of(2), answers, strict=True):
        for chunk, vectors in zip(chunks_of(batch, CPU), averaged, strict=True):
            torch.testing.assert_close(vectors, model(chunk.inputs)[0], rtol=1e-4, atol=1e-5)
    assert vectors.shape[1] == DIM


# out and back


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    _, place, towers = folder
    out = tmp_path_factory.mktemp("out") / "export"
    return export_towers(towers.state_dict(), place, out)


def local(towers, place):
    tokenizer = FolderTokenizer(place, towers.spec.max_tokens, towers.spec.prompts)
    return LocalEncoder(towers, Routed({"query": tokenizer, "document": tokenizer}, "field"))


def test_sentence_transformers_encodes_queries_and_documents_as_the_trainer_does(folder, exported):
    from sentence_transformers import SentenceTransformer

    _, place, towers = folder
    theirs, ours = SentenceTransformer(str(exported), device="cpu"), local(towers, place)
    queries, documents = ours.encode(TEXTS, "query"), ours.encode(TEXTS, "document")
    np.testing.assert_allclose(theirs.encode_query(TEXTS), queries, atol=1e-5)
    np.testing.assert_allclose(theirs.encode_document(TEXTS), documents, atol=1e-5)
    assert not np.allclose(queries, documents, atol=1e-2)
    for field, wanted in (("query", queries), ("document", documents)):
        alone = SentenceTransformer(str(exported / field), device="cpu")
        np.testing.assert_allclose(alone.encode(TEXTS, prompt_name=field), wanted, atol=1e-5)


def test_two_towers_of_token_vectors_export_as_one_late_interaction_model(tmp_path):
    from sentence_transformers import MultiVectorEncoder

    config = ModelConfig(config=TINY, towers="separate", pooling="tokens", token_dim=8, query_length=12)
    prepare_model_folder(config, tmp_path / "m", train_tokenizer_with_mask)
    prepare_towers(config, tmp_path / "m")
    towers = build_towers(config, tmp_path / "m").eval()
    scrambled(towers.document)
    out = export_towers(towers.state_dict(), tmp_path / "m", tmp_path / "out")
    theirs, ours = MultiVectorEncoder(str(out), device="cpu"), local(towers, tmp_path / "m")
    for field, vectors in (("query", theirs.encode_query(TEXTS)), ("document", theirs.encode_document(TEXTS))):
        for got, want in zip(vectors, ours.encode_tokens(TEXTS, field), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
    assert "MultiVectorEncoder" in (out / "README.md").read_text()


def test_an_export_comes_back_with_every_weight(folder, exported):
    _, _, towers = folder
    back = load_towers(exported)
    (exported / "gyre_towers.json").rename(exported / "aside")
    assert Layout.load(exported) == Layout({"query": "query", "document": "document"}, "field")  # of an earlier version
    (exported / "aside").rename(exported / "gyre_towers.json")
    for name, weight in towers.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name
    with pytest.raises(UsageError, match="so it is no export of several towers"):
        load_towers(exported / "query")


def test_the_document_tower_starts_from_its_own_path(folder, exported, tmp_path):
    _, _, towers = folder
    paths = {"path": str(exported / "query"), "document_path": str(exported / "document")}
    config = ModelConfig(towers="separate", **paths)
    spec = prepare_model_folder(config, tmp_path / "m")
    prepare_towers(config, tmp_path / "m")
    made = build_towers(config, tmp_path / "m").eval()
    assert spec.prompts["query"] == "find: "
    for name, weight in towers.state_dict().items():
        assert torch.equal(made.state_dict()[name], weight), name


def test_a_document_tower_that_does_not_fit_is_refused_by_name(exported, tmp_path):
    prepare_model_folder(ModelConfig(path=str(exported / "query")), tmp_path / "m")
    with pytest.raises(ValueError, match="`document_path` needs `towers: separate`"):
        ModelConfig(path="a", document_path="b")
    missing = ModelConfig(path=str(exported / "query"), document_path="no/such", towers="separate")
    with pytest.raises(UsageError, match=r"model.document_path: 'no/such' is neither a folder"):
        prepare_towers(missing, tmp_path / "m")
    wide = TINY.model_copy(update={"intermediate": 64})
    spec = prepare_model_folder(ModelConfig(config=wide, **RECIPE), tmp_path / "wide", train_tokenizer)
    weights = build_encoder(ModelConfig(config=wide, **RECIPE), tmp_path / "wide").state_dict()
    export_sentence_transformer(weights, spec, tmp_path / "wide", tmp_path / "other")
    other = ModelConfig(path=str(exported / "query"), document_path=str(tmp_path / "other"), towers="separate")
    with pytest.raises(UsageError, match="differs from the query tower in its weights"):
        prepare_towers(other, tmp_path / "m")
    assert not (tmp_path / "m" / "document").exists()
