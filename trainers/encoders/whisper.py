"""The encoder of a Whisper as the tower of sounds (Radford et al., arXiv:2212.04356).

It reads spectrograms of one length and masks nothing: what is behind a sound's end is silence, which it sees. Its
states there aren't pooled.

Shapes: n sounds, F frames end to end, M bands, P positions, two frames each, H the encoder's width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from data_services.schema import UsageError
from trainers.encoders.inputs import lengths_of
from trainers.encoders.model_folder import resolve
from trainers.encoders.spec import ModelSpec
from trainers.encoders.tower import MediaTower
from trainers.tower_config import AudioConfig, EncoderSizes

PREPROCESSOR = "preprocessor_config.json"
BELOW_LOUDEST = 2.0  # where the spectrogram's scale ends, see `data_services.media.mel`


class WhisperTower(MediaTower):
    """Of a chunk it reads `arrays["frames"]` [F, M] float32, and how many are each sound's."""

    def __init__(self, config: AudioConfig, spec: ModelSpec) -> None:
        super().__init__(WhisperEncoder(_whisper_config(config)), spec)
        self.config = config

    def read(self, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        weight, frames = self.backbone.conv1.weight, arrays.get("frames")
        if frames is None or not len(frames):  # a chunk without sounds
            frames, lengths = weight.new_zeros(1, self.config.mels), torch.ones(1, dtype=torch.int64)
        else:
            lengths = arrays[lengths_of("frames")]
        whole = 2 * positions(self.config)
        sounds = [_filled(sound, whole) for sound in frames.split(lengths.tolist())]
        states = self.backbone(torch.stack(sounds).transpose(1, 2).to(weight.dtype)).last_hidden_state
        heard = torch.arange(states.shape[1], device=states.device)
        return states, heard < ((lengths.to(states.device) + 1) // 2)[:, None]


def _filled(sound: Tensor, frames: int) -> Tensor:
    """[frames, M] of [F, M]: silence behind it, as the scale of the sound's loudest has it."""
    filled = (sound.max() - BELOW_LOUDEST).expand(frames, sound.shape[1]).clone()
    filled[: len(sound)] = sound
    return filled


def positions(config: AudioConfig) -> int:
    """States of a sound, of any length."""
    return max(1, -(-int(config.max_seconds * config.rate / config.hop) // 2))


def _whisper_config(config: AudioConfig) -> WhisperConfig:
    sizes = config.encoder
    assert sizes is not None, "asked for by a recipe that has one"
    return WhisperConfig(
        d_model=sizes.hidden,
        encoder_layers=sizes.layers,
        encoder_attention_heads=sizes.heads,
        encoder_ffn_dim=sizes.intermediate,
        num_mel_bins=config.mels,
        max_source_positions=positions(config),
        dropout=0.0,
    )


def pretrained(config: AudioConfig) -> tuple[AudioConfig, dict[str, Tensor]]:
    """What a Whisper's folder says in the place of the recipe's sizes, and its encoder's weights by name."""
    from transformers import AutoModel

    assert config.path is not None, "asked for by a recipe that has one"
    source = resolve(config.path, key="model.audio.path")
    if not (source / PREPROCESSOR).exists() or not any(source.glob("*.safetensors")):
        raise UsageError(f"model.audio.path: {source} has no {PREPROCESSOR} or no safetensors weights; give a Whisper")
    whole = AutoConfig.from_pretrained(source)
    if whole.model_type != "whisper":
        raise UsageError(f"model.audio.path: {source} is a {whole.model_type}; the tower of sounds takes a Whisper")
    front: dict[str, Any] = json.loads((source / PREPROCESSOR).read_text())
    found = AudioConfig(
        encoder=EncoderSizes(
            hidden=whole.d_model,
            layers=whole.encoder_layers,
            heads=whole.encoder_attention_heads,
            intermediate=whole.encoder_ffn_dim,
        ),
        rate=front["sampling_rate"],
        mels=whole.num_mel_bins,
        window=front["n_fft"],
        hop=front["hop_length"],
        max_seconds=2 * whole.max_source_positions * front["hop_length"] / front["sampling_rate"],
        freeze=config.freeze,
    )
    weights = AutoModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32).encoder.state_dict()
    return found, {f"backbone.{name}": weight for name, weight in weights.items()}
