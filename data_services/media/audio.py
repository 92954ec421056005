"""Encoded sound to samples. libsndfile decodes (through soundfile), SciPy resamples.

Legend: S samples of one channel, float32 in [-1, 1]; rates in samples a second (Hz).
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np

from data_services.media.kinds import kind_of
from data_services.schema import Undecodable

if TYPE_CHECKING:
    import soundfile

_RIFF = ("WAV", "WAVEX", "RF64")
FORMATS = (*_RIFF, "FLAC", "OGG", "MP3")
MAX_SECONDS = 1_800
MAX_CHANNELS = 64
RATES = range(1_000, 768_001)
_BLOCK_FRAMES = 1 << 16


def audio_seconds(data: bytes) -> float:
    """How long an encoded sound lasts, by its header. Undecodable as `decode_audio`."""
    with _open(data) as sound:
        return sound.frames / sound.samplerate


def decode_audio(data: bytes, rate: int) -> np.ndarray:
    """The sound [S] float32 at `rate`: the mean of its channels, resampled.

    Raises Undecodable where the bytes are no sound of `FORMATS`, are truncated or damaged, empty, or longer than
    MAX_SECONDS.
    """
    samples, own_rate = samples_of(data)
    return resampled(samples, own_rate, rate)


def samples_of(data: bytes) -> tuple[np.ndarray, int]:
    """(the mean of a sound's channels [S] float32, its rate). Undecodable as `decode_audio`."""
    import soundfile

    with _open(data) as sound:
        try:
            blocks = [block.mean(1) for block in sound.blocks(_BLOCK_FRAMES, dtype="float32", always_2d=True)]
        except soundfile.SoundFileError as error:
            raise Undecodable(_DAMAGED) from error
        rate, declared = sound.samplerate, sound.frames
        played = sum(map(len, blocks))
        whole = not _is_cut(data) if sound.format in _RIFF else played == declared
    if not whole:
        raise Undecodable(_DAMAGED)
    if not played:
        raise Undecodable("the sound has no sample")
    samples = np.concatenate(blocks)
    if not np.isfinite(samples).all():
        raise Undecodable("the sound has samples that are no finite number")
    return samples, rate


_DAMAGED = "the sound is truncated or damaged"


def _open(data: bytes) -> soundfile.SoundFile:
    import soundfile

    kind = kind_of(data)
    if kind != "audio":
        raise Undecodable(f"a sound is declared and the bytes are {'an image' if kind == 'image' else kind}")
    try:
        sound = soundfile.SoundFile(io.BytesIO(data))
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise Undecodable("the sound's header is truncated or damaged") from error
    try:
        _check(sound)
    except Undecodable:
        sound.close()
        raise
    return sound


def _check(sound: soundfile.SoundFile) -> None:
    if sound.format not in FORMATS:
        raise Undecodable(f"the sound is none of {', '.join(FORMATS)}")
    if sound.samplerate not in RATES:
        raise Undecodable(f"the sound's rate isn't between {RATES[0]:,} and {RATES[-1]:,} Hz")
    if sound.channels > MAX_CHANNELS:
        raise Undecodable(f"the sound has more than {MAX_CHANNELS} channels")
    if sound.frames > MAX_SECONDS * sound.samplerate:
        raise Undecodable(f"the sound is longer than {MAX_SECONDS:,} s")


def _is_cut(data: bytes) -> bool:
    """Whether a WAV file ends before its data do: libsndfile plays what is there.

    RIFF: chunks of a name (4 bytes), a size (4 bytes, little-endian) and as many bytes, padded to an even number. A
    size of all ones stands for one that wasn't known (RF64 keeps it elsewhere; a pipe never knew it).
    """
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name == b"data":
            return size != 0xFFFF_FFFF and place + 8 + size > len(data)
        place += 8 + size + size % 2
    return True


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """[S] float32 at another rate: polyphase filtering, what lies above half the lower rate is cut off."""
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return resample_poly(samples, wanted // common, rate // common).astype(np.float32)
