"""Sound to a log-mel spectrogram, as Whisper's encoders take it: Radford et al., arXiv:2212.04356, section 2.2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Blank = tuple[float, float, float, float]
"""A rectangle of a spectrogram that isn't shown: time from, to, mel from, to; shares of the sound and of the mels."""

_FLOOR = 1e-10  # of the power, before its logarithm
_DECADES = 8.0  # that are shown below the loudest
_FRAMES_AT_ONCE = 4_096


@dataclass(frozen=True)
class Mel:
    """Samples [S] float32 to the logarithm of the power in each mel band [frames, mels] float32, about -1 … 1.5.

    rate        of the samples, Hz
    mels        bands, equally wide on the mel scale (Slaney 1998, "Auditory Toolbox") from 0 to rate / 2
    window      samples of a frame, under a periodic Hann window
    hop         samples from one frame to the next: frames = S // hop, at least 1
    max_frames  what comes later is cut off
    """

    rate: int = 16_000
    mels: int = 80
    window: int = 400
    hop: int = 160
    max_frames: int = 3_000

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        frames = self.frames(len(samples))
        around = self.window // 2
        short = samples[: frames * self.hop + around]
        padded = np.pad(short, (around, self.window - around), mode="constant" if len(short) <= around else "reflect")
        views = np.lib.stride_tricks.sliding_window_view(padded, self.window)[:: self.hop][:frames]
        filters, hann = _filters(self.rate, self.window, self.mels), _hann(self.window)
        power = np.concatenate(
            [
                np.abs(np.fft.rfft(views[start : start + _FRAMES_AT_ONCE] * hann)) ** 2 @ filters
                for start in range(0, frames, _FRAMES_AT_ONCE)
            ]
        )
        logarithm = np.log10(np.maximum(power, _FLOOR))
        return ((np.maximum(logarithm, logarithm.max() - _DECADES) + 4) / 4).astype(np.float32)

    def frames(self, samples: int) -> int:
        """Frames of so many samples."""
        return min(max(samples // self.hop, 1), self.max_frames)

    def blanked(self, spectrogram: np.ndarray, blanks: Sequence[Blank], samples: int) -> np.ndarray:
        """The spectrogram [frames, mels] of so many samples with its mean in place of what `blanks` hide."""
        if not blanks:
            return spectrogram
        shown = spectrogram.copy()
        whole = max(samples / self.hop, 1.0)
        for begin, end, low, high in blanks:
            time = slice(round(begin * whole), round(end * whole))
            shown[time, round(low * self.mels) : round(high * self.mels)] = spectrogram.mean()
        return shown


@lru_cache(maxsize=8)
def _hann(window: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)


@lru_cache(maxsize=8)
def _filters(rate: int, window: int, mels: int) -> np.ndarray:
    """[window // 2 + 1, mels] triangles of equal area over the frequencies of the Fourier transform."""
    edges = _hertz(np.linspace(0, _mel(np.array(rate / 2)), mels + 2))  # [mels + 2]
    bins = np.fft.rfftfreq(window, 1 / rate)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(np.minimum(rising, falling), 0) * 2 / (edges[2:] - edges[:-2])


_LINEAR_HZ, _LINEAR_MELS, _STEP = 1_000.0, 15.0, np.log(6.4) / 27  # linear up to 1 kHz, logarithmic above


def _mel(hertz: np.ndarray) -> np.ndarray:
    above = _LINEAR_MELS + np.log(np.maximum(hertz, _LINEAR_HZ) / _LINEAR_HZ) / _STEP
    return np.where(hertz < _LINEAR_HZ, hertz * _LINEAR_MELS / _LINEAR_HZ, above)


def _hertz(mel: np.ndarray) -> np.ndarray:
    above = _LINEAR_HZ * np.exp(_STEP * (np.maximum(mel, _LINEAR_MELS) - _LINEAR_MELS))
    return np.where(mel < _LINEAR_MELS, mel * _LINEAR_HZ / _LINEAR_MELS, above)
