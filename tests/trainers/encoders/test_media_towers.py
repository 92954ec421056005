"""Towers of sounds and of a kind of one's own, the one that docs/multimodal.md shows."""

import json
import sys

import numpy as np
import pytest
import torch

from cluster.models import exported_encoder
from cluster.prepare import tokenizer_of
from data_services.schema import Media, Undecodable, UsageError
from tests.test_docs import named_block
from tests.trainers.encoders.sounds import tone
from tests.trainers.encoders.tiny import TEXTS, TINY, scrambled, train_tokenizer
from trainers.config import AudioConfig, ModelConfig, OwnConfig
from trainers.encoders.local import LocalEncoder
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.towers import build_towers, export_towers, prepare_towers

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
