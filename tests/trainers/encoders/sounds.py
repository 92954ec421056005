"""Tones for tests of sounds."""

import io
import wave

import numpy as np

from data_services.schema import Media


def tone(hertz: float, seconds: float, rate: int = 8000) -> Media:
    """A sine as a WAV of 16 bits."""
    out, time = io.BytesIO(), np.arange(int(rate * seconds)) / rate
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.sin(2 * np.pi * hertz * time) * 20_000).astype("<i2").tobytes())
    return Media("audio", out.getvalue())
