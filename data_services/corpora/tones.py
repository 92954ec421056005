"""`builtin:tones`: synthesised sounds, and what they are in words.

A row says a sound's timbre, pitch, course, loudness and length (the query), with some sounds that are so (the
positives): they differ in their exact pitch, level and place in the recording, by a hash. Held out are combinations of
timbre, pitch and course, with one sound each.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from data_services.corpora.splits import split_of
from data_services.draws import Draws
from data_services.schema import text_id

# Raised when the same code would give other rows.
CODE_VERSION = 1
RATE = 8_000  # Hz
SECONDS = 1.0
TIMBRES = ("pure", "hollow", "bright", "noisy")
PITCHES = {"very low": 110.0, "low": 220.0, "middle": 440.0, "high": 880.0, "very high": 1760.0}  # Hz
COURSES = ("steady", "rising", "falling", "trembling", "beating twice", "beating four times")
LEVELS = {"soft": 0.12, "loud": 0.6}
LENGTHS = {"short": 0.4, "long": 0.8}  # seconds
SOUNDS_A_ROW = 4


def stamp() -> dict[str, Any]:
    return {"code_version": CODE_VERSION, "numpy": np.__version__}


def rows(split: str) -> Iterator[dict[str, Any]]:
    for timbre, pitch, course in product(TIMBRES, PITCHES, COURSES):
        if split_of(f"{timbre} {pitch} {course}") != split:
            continue
        for level, length in product(LEVELS, LENGTHS):
            name = f"{level} {length} {timbre} {pitch} {course}"
            sounds = range(SOUNDS_A_ROW if split == "train" else 1)
            yield {
                "name": name,
                "query": f"a {level}, {length}, {timbre} tone of {pitch} pitch, {course}",
                "positive": [
                    wav(sound(timbre, PITCHES[pitch], course, LEVELS[level], LENGTHS[length], text_id(f"{name} {i}")))
                    for i in sounds
                ],
            }


def sound(timbre: str, hertz: float, course: str, level: float, seconds: float, key: int) -> np.ndarray:
    """[S] float64 in [-1, 1]. key: what is drawn, the exact pitch, the level, when it begins, the noise."""
    draws = Draws(np.array([key], np.int64).view(np.uint64))
    tuned, louder, late = (draws.stream(i).one()[0] for i in range(3))
    time = np.arange(int(seconds * RATE)) / RATE
    bend = {"rising": 0.5, "falling": -0.5}.get(course, 0.0)  # octaves, either way from the middle
    octaves = bend * (2 * time / seconds - 1) + (0.03 * np.sin(2 * np.pi * 7 * time) if course == "trembling" else 0)
    phase = np.cumsum(hertz * 2 ** (octaves + 0.1 * (tuned - 0.5))) / RATE
    samples = _wave(timbre, phase, draws.stream(3))
    beats = {"beating twice": 2, "beating four times": 4}.get(course)
    if beats:
        samples = samples * (np.sin(2 * np.pi * beats * time / seconds - np.pi / 2) > -0.4)
    fade = np.minimum(1, np.minimum(time, time[::-1]) / 0.01)
    whole = np.zeros(int(SECONDS * RATE))
    begin = int(late * (len(whole) - len(samples)))
    whole[begin : begin + len(samples)] = samples * fade * level * (0.8 + 0.4 * louder)
    return whole


def _wave(timbre: str, phase: np.ndarray, draws: Draws) -> np.ndarray:
    """[S] in [-1, 1] of a phase in turns: the fundamental, with odd overtones, with all of them, or with noise."""
    fundamental = np.sin(2 * np.pi * phase)
    if timbre == "pure":
        return fundamental
    if timbre == "noisy":
        return 0.5 * fundamental + draws.each(np.array([len(phase)])) - 0.5
    overtones = range(1, 8, 2) if timbre == "hollow" else range(1, 8)
    # Those that would pass half the rate anywhere are left out, else they fold back.
    steepest = np.diff(phase, prepend=0).max()
    return sum(np.sin(2 * np.pi * n * phase) / n for n in overtones if n * steepest < 0.5) / 2  # type: ignore[return-value]


def wav(samples: np.ndarray) -> bytes:
    """16-bit PCM of one channel."""
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(RATE)
        written.writeframes(np.rint(samples * 32_767).astype("<i2").tobytes())
    return file.getvalue()
