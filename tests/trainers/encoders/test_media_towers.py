"""Towers of sounds and of a kind of one's own, the one that docs/multimodal.md shows."""

import json
import sys

import numpy as np
import pytest
import torch

from cluster.models import exported_encoder, tokenizer_of
from data_services.schema import Media, Undecodable, UsageError
from tests.test_docs_snippets import named_block
from tests.trainers.encoders.sounds import tone
from tests.trainers.encoders.test_image import PICTURES, SIZES, png
from tests.trainers.encoders.tiny import TEXTS, TINY, scrambled, train_tokenizer
from trainers.chunks import chunk_of
from trainers.config import ModelConfig
from trainers.encoders.local import LocalEncoder
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.towers import build_towers, export_towers, prepare_towers
from trainers.tower_config import AudioConfig, EncoderSizes, FieldsConfig, ImageConfig, ImageFromConfig, OwnConfig

SOUND = AudioConfig(rate=8000, mels=12, window=200, hop=80, max_seconds=1, hidden=16, layers=2, kernel=3)
TONES = [tone(hertz, seconds) for hertz, seconds in ((440, 0.02), (880, 0.5), (220, 1.4), (300, 0.2))]
EVENTS = [Media("events", json.dumps(its).encode()) for its in ([[0, 1], [2.5, 7]], [[1, 3]], [[0, 1], [1, 2], [9, 4]])]


def made(folder, **towers):
    config = ModelConfig(config=TINY, max_tokens=40, **towers)
    prepare_model_folder(config, folder, train_tokenizer)
    prepare_towers(config, folder)
    torch.manual_seed(0)
    return config, scrambled(build_towers(config, folder)).eval()


def comes_back(config, towers, folder, out, items):
    """The export encodes as the towers do, a mixture of kinds too, and each item as it does alone."""
    ours = LocalEncoder(towers, tokenizer_of(folder), 30)
    vectors = ours.encode(items, "document")
    export_towers(towers.state_dict(), folder, out, config)
    back = exported_encoder(out)
    np.testing.assert_allclose(back.encode([TEXTS[0], *items, TEXTS[1]], "document")[1:-1], vectors, atol=1e-5)
    np.testing.assert_allclose(back.encode(TEXTS, "query"), ours.encode(TEXTS, "query"), atol=1e-5)
    alone = np.concatenate([ours.encode([item], "document") for item in items])
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    assert "exported_encoder" in (out / "README.md").read_text()
    return vectors


def test_a_sound_has_one_vector_whatever_is_encoded_beside_it(tmp_path):
    config, towers = made(tmp_path / "m", audio=SOUND)
    vectors = comes_back(config, towers, tmp_path / "m", tmp_path / "out", TONES)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.abs(vectors @ vectors.T - np.eye(4))[~np.eye(4, dtype=bool)].min() < 0.999
    inputs = tokenizer_of(tmp_path / "m")(TONES, "document")
    frames = inputs.arrays["frames"].lengths
    assert frames.tolist() == [2, 50, 100, 20]  # of 100 a second, the third cut at a second
    assert inputs.lengths.tolist() == [-(-n // 4) for n in frames]
    with pytest.raises(Undecodable, match="a sound is declared"):
        tokenizer_of(tmp_path / "m")([Media("audio", b"\x89PNG\r\n\x1a\n")], "document")


WHISPER = AudioConfig(
    encoder=EncoderSizes(hidden=16, layers=2, heads=2, intermediate=24), rate=8000, mels=12, window=200, hop=80,
    max_seconds=0.6,
)  # fmt: skip


def test_a_whispers_encoder_is_a_tower_of_sounds(tmp_path):
    config, towers = made(tmp_path / "m", audio=WHISPER)
    comes_back(config, towers, tmp_path / "m", tmp_path / "out", TONES)
    inputs = tokenizer_of(tmp_path / "m")(TONES, "document")
    assert inputs.arrays["frames"].lengths.tolist() == [2, 50, 60, 20]
    assert inputs.lengths.tolist() == [30] * 4  # it computes as much of every sound
    with pytest.raises(ValueError, match="kernel is of convolutions"):
        AudioConfig(encoder=WHISPER.encoder, kernel=3)


def test_a_pretrained_whisper_brings_its_spectrogram_and_what_its_encoder_makes_of_it(tmp_path):
    """Of a sound as long as it reads its states are those of Transformers' front and encoder."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    from data_services.media.audio import decode_audio

    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    sizes |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "vocab_size": 60}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    torch.manual_seed(4)
    whole = WhisperModel(WhisperConfig(**sizes, **ids, num_mel_bins=80, max_source_positions=50)).eval()
    whole.save_pretrained(tmp_path / "whisper")
    front = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    front.save_pretrained(tmp_path / "whisper")
    audio = AudioConfig(path=str(tmp_path / "whisper"), freeze=["backbone.*"])
    config = ModelConfig(config=TINY, max_tokens=40, audio=audio)
    prepare_model_folder(config, tmp_path / "m", train_tokenizer)
    prepare_towers(config, tmp_path / "m")
    towers = build_towers(config, tmp_path / "m").eval()
    assert {name for name, p in towers.audio.named_parameters() if p.requires_grad} == {"readout.head.0.weight"}
    sound = tone(440, 1.0, rate=16_000)
    with torch.inference_mode():
        features = front(decode_audio(sound.data, 16_000), sampling_rate=16_000, return_tensors="pt").input_features
        states = whole.encoder(features).last_hidden_state
        wanted = torch.nn.functional.normalize(towers.audio.readout.head[0](states.mean(1)), dim=1)
    found = LocalEncoder(towers, tokenizer_of(tmp_path / "m")).encode([sound], "document")
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.fixture
def events(tmp_path, monkeypatch):
    """The modality of the page, as a module of the working directory."""
    (tmp_path / "my_events.py").write_text(named_block("multimodal.md", "my_events.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield OwnConfig(path="my_events:Events", allow_code=True, options={"codes": 50})
    sys.modules.pop("my_events", None)


def test_the_kind_of_the_page_is_a_tower_like_others(events, tmp_path):
    config, towers = made(tmp_path / "m", own={"events": events}, audio=SOUND)
    assert towers.names == ("text", "audio", "events")
    comes_back(config, towers, tmp_path / "m", tmp_path / "out", EVENTS)
    read = tokenizer_of(tmp_path / "m")
    with pytest.raises(Undecodable, match="no JSON list of pairs"):
        read([Media("events", b"[[1]")], "document")


def test_code_of_ones_own_must_be_allowed_and_make_a_tower_of_the_width(events, tmp_path):
    with pytest.raises(ValueError, match="set allow_code: true to let it run"):
        OwnConfig(path="my_events:Events", options={"codes": 50})
    with pytest.raises(ValueError, match="a kind that is taken"):
        ModelConfig(config=TINY, own={"audio": events})
    wrong = events.model_copy(update={"path": "my_events:Nothing"})
    with pytest.raises(UsageError, match=r"model.own.events.path: module 'my_events' has no 'Nothing'"):
        made(tmp_path / "m", own={"events": wrong})


WEIGHTS = {"title": 1.0, "photo": 2.0, "body": 0.5}
PHOTO = png(PICTURES[1])
PARTS = [
    {"title": TEXTS[1], "photo": PHOTO, "body": TEXTS[0]},
    {"body": TEXTS[3]},
    {"photo": png(PICTURES[0])},
    {"title": TEXTS[4], "body": TEXTS[3]},
]


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """(recipe's section, towers, model folder) of texts, images and items of both."""
    place = tmp_path_factory.mktemp("fields") / "m"
    image = ImageConfig(config=ImageFromConfig(**SIZES))
    return *made(place, image=image, fields=FieldsConfig(weights=WEIGHTS, learned=True)), place


def test_parts_are_summed_by_their_weights_without_those_that_an_item_lacks(fields, tmp_path):
    config, towers, folder = fields
    towers.parts.log_weights.data.copy_(torch.tensor(list(WEIGHTS.values())).log())  # as they start
    encode = LocalEncoder(towers, tokenizer_of(folder), 50).encode
    vectors = encode(PARTS, "document")
    for item, vector in zip(PARTS, vectors, strict=True):
        total = sum(WEIGHTS[name] * encode([part], "document")[0] for name, part in item.items())
        np.testing.assert_allclose(vector, total / np.linalg.norm(total), atol=1e-5)
    comes_back(config, towers, folder, tmp_path / "out", PARTS)
    with pytest.raises(Undecodable, match=r"a part 'headline', and model\.fields names title, photo, body"):
        tokenizer_of(folder)([{"headline": "x"}], "document")


def test_weights_of_parts_are_learned_and_a_chunk_without_a_part_runs_its_tower_with_a_gradient_of_zero(fields):
    _, towers, folder = fields
    names = {id(p): name for name, p in towers.named_parameters()}
    assert len(names) == len(dict(towers.named_parameters()))  # the parts' towers are the others, not copies
    inputs = tokenizer_of(folder)(PARTS, "document")
    for rows in ([1, 3], [2], []):  # texts alone, an image alone, nothing
        towers.zero_grad()
        some, none = inputs.take(np.array(rows, np.int64)), np.zeros(len(rows), np.int64)
        chunk = chunk_of(some, none, none == 1, torch.device("cpu"), tower=towers.names.index("parts"))
        towers(chunk.inputs).sum().backward()
        assert all(p.grad is not None for p in towers.image.parameters() if p.requires_grad)
        assert all(p.grad is not None for p in towers.text.parameters() if p.requires_grad)
        assert bool(towers.text.backbone.get_input_embeddings().weight.grad.any()) == (rows == [1, 3])
        assert bool(towers.image.readout.head[0].weight.grad.any()) == (rows == [2])
    towers.zero_grad()
    chunk = chunk_of(inputs, np.zeros(4, np.int64), np.zeros(4, bool), torch.device("cpu"), tower=2)
    towers(chunk.inputs)[:, 0].sum().backward()
    assert towers.parts.log_weights.grad.abs().min() > 0
