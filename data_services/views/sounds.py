"""Views of sounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from data_services.draws import Draws
from data_services.items import Media
from data_services.schema import Section


class SpecAugment(Section):
    """Stretches of time and bands of frequency are left out of the spectrogram; its mean stands there.

    Each is as wide as a uniform draw says, up to its share, and stands anywhere. Park et al., arXiv:1904.08779, without
    their time warping. Only where the blanks are is said here: they are laid on what the model's front makes of the
    sound.
    """

    kind: Literal["spec_augment"] = "spec_augment"
    times: int = Field(2, ge=0, description="stretches of time")
    time_share: float = Field(0.1, ge=0, le=1, description="of the sound, the longest stretch")
    bands: int = Field(2, ge=0, description="bands of frequency")
    band_share: float = Field(0.2, ge=0, le=1, description="of the mels, the widest band")

    def __call__(self, sounds: Sequence[Media], draws: Draws) -> list[Media]:
        times = _stretches(draws.stream(0), self.times, self.time_share)
        bands = _stretches(draws.stream(1), self.bands, self.band_share)
        return [
            replace(
                sound, blanks=(*sound.blanks, *((a, b, 0.0, 1.0) for a, b in time), *((0.0, 1.0, *b) for b in band))
            )
            for sound, time, band in zip(sounds, times.tolist(), bands.tolist(), strict=True)
        ]


def _stretches(draws: Draws, count: int, share: float) -> np.ndarray:
    """[n, count, 2] begin and end of stretches in [0, 1]."""
    n = len(draws.keys)
    width = share * draws.stream(0).each(np.full(n, count)).reshape(n, count)
    begin = (1 - width) * draws.stream(1).each(np.full(n, count)).reshape(n, count)
    return np.stack([begin, begin + width], axis=2)
