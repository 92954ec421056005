"""The tower of sounds: convolutions over a log-mel spectrogram, each of which halves the frames, and their mean; or
the encoder of a Whisper (`whisper.py`).

    gyre_audio.json        `AudioConfig`, with the sizes of a pretrained one
    gyre_model.json        ModelSpec
    model.safetensors      of an export, or where it begins as another model's, by the names of the tower's state_dict()

Shapes: n sounds, F frames end to end, M bands, H channels, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_services.schema import UsageError
from trainers.config import ModelConfig
from trainers.encoders.freezing import freeze
from trainers.encoders.inputs import lengths_of
from trainers.encoders.spec import ModelSpec
from trainers.encoders.tower import MediaTower
from trainers.tower_config import AudioConfig

SETTINGS, WEIGHTS = "gyre_audio.json", "model.safetensors"


class Convolutions(nn.Module):
    """Spectrograms [n, M, F], lengths [n] in frames -> states [n, F', H] and which of them are there [n, F'] bool."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        widths = [config.mels, *[config.hidden] * config.layers]
        self.layers = nn.ModuleList(
            nn.Conv1d(wide, narrow, config.kernel, stride=2, padding=config.kernel // 2)
            for wide, narrow in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden) for _ in range(config.layers))

    def forward(self, spectrograms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        hidden, there = spectrograms, self._there(spectrograms, lengths)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            # What is beyond a sound's end is silence to every layer: its vector doesn't depend on its neighbours.
            hidden = layer(hidden * there[:, None].to(hidden.dtype))
            lengths = (lengths + 1) // 2
            there = self._there(hidden, lengths)
            hidden = F.gelu(norm(hidden.transpose(1, 2))).transpose(1, 2)
        return hidden.transpose(1, 2), there

    @staticmethod
    def _there(hidden: Tensor, lengths: Tensor) -> Tensor:
        return torch.arange(hidden.shape[2], device=hidden.device) < lengths[:, None]


class AudioEncoder(MediaTower):
    """The tower of sounds. Of a chunk it reads `arrays["frames"]` [F, M] float32, and how many are each sound's."""

    def __init__(self, config: AudioConfig, spec: ModelSpec) -> None:
        super().__init__(Convolutions(config), spec)
        self.config = config

    def read(self, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        weight, frames = next(self.backbone.parameters()), arrays.get("frames")
        if frames is None or not len(frames):
            silence = torch.zeros(1, self.config.mels, 1, dtype=weight.dtype, device=weight.device)
            return self.backbone(silence, torch.ones(1, dtype=torch.int64, device=weight.device))
        lengths = arrays[lengths_of("frames")]
        padded = nn.utils.rnn.pad_sequence(list(frames.split(lengths.tolist())), batch_first=True)
        return self.backbone(padded.transpose(1, 2).to(weight.dtype), lengths)

    def flops_per_token(self, length: float) -> float:
        """As of other towers: a token is a frame of the last layer, for which each layer before computes twice as many
        as the one after it."""
        layers = self.backbone.layers
        return float(sum(6 * layer.weight.numel() * 2 ** (len(layers) - 1 - i) for i, layer in enumerate(layers)))


def prepare(config: ModelConfig, folder: Path, texts: ModelSpec) -> None:
    """See `Modality.prepare`."""
    audio = config.audio
    assert audio is not None, "asked for by a recipe that has one"
    if texts.pooling == "tokens":
        raise UsageError("model.audio: a sound has one vector, but model.pooling is tokens; choose another")
    if audio.path is not None:
        from safetensors.torch import save_file

        from trainers.encoders.whisper import pretrained

        audio, weights = pretrained(audio)
        save_file(weights, folder / WEIGHTS)
    hidden, tokens = _sizes(audio)
    of_convolutions = {"hidden", "layers", "kernel"} if audio.encoder else set()
    (folder / SETTINGS).write_text(audio.model_dump_json(indent=2, exclude=of_convolutions) + "\n")
    ModelSpec.of_media("audio", hidden, texts.dim, tokens, texts.normalize).save(folder)


def _sizes(audio: AudioConfig) -> tuple[int, int]:
    """(width of the states, how many a sound has at most)"""
    if audio.encoder is not None:
        from trainers.encoders.whisper import positions

        return audio.encoder.hidden, positions(audio)
    frames = int(audio.max_seconds * audio.rate / audio.hop)
    return audio.hidden, max(1, -(-frames >> audio.layers))


def build(config: ModelConfig, folder: Path) -> MediaTower:
    """See `Modality.build`."""
    assert config.audio is not None, "asked for by a recipe that has one"
    tower = _tower(folder)
    freeze(tower, config.audio.freeze, "model.audio.freeze")
    return tower


def load(folder: Path, attention: str = "auto") -> MediaTower:
    """See `Modality.load`."""
    return _tower(folder).eval()


def _tower(folder: Path) -> MediaTower:
    """With the folder's weights where it has some; a readout that they lack is drawn from the current generator."""
    from safetensors.torch import load_file

    config, spec = AudioConfig.model_validate_json((folder / SETTINGS).read_text()), ModelSpec.load(folder)
    if config.encoder is None:
        tower: MediaTower = AudioEncoder(config, spec)
    else:
        from trainers.encoders.whisper import WhisperTower

        tower = WhisperTower(config, spec)
    if (folder / WEIGHTS).exists():
        found = tower.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        assert not found.unexpected_keys, found.unexpected_keys
        assert all(name.startswith("readout.") for name in found.missing_keys), found.missing_keys
    return tower
