"""Whatever comes as a sound is mono float32 at the rate that is wanted, or one sentence says why not."""

import contextlib

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.media.audio import audio_seconds, decode_audio, resampled
from data_services.media.mel import Mel
from data_services.schema import Undecodable
from tests.data_services.media.pictures import encoded, scene, sounding, tone


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("WAV", {}),
        ("WAV", {"subtype": "FLOAT"}),
        ("WAV", {"subtype": "PCM_U8"}),
        ("WAV", {"subtype": "PCM_24"}),
        *((kind, {}) for kind in ("WAVEX", "RF64", "FLAC", "OGG", "MP3")),
    ],
)
def test_every_format_decodes_to_its_samples(kind, options):
    data = sounding(tone(), kind=kind, **options)
    found = decode_audio(data, 16_000)
    assert found.dtype == np.float32
    assert audio_seconds(data) == pytest.approx(len(found) / 16_000)
    within = {"OGG": 0.05, "MP3": 0.05}.get(kind, 0.01)
    assert np.abs(found[2_000:6_000] - tone()[2_000:6_000]).max() < within


def test_channels_are_averaged():
    both = np.stack([tone(440), np.zeros_like(tone())], 1)
    np.testing.assert_allclose(decode_audio(sounding(both), 16_000), tone(440) / 2, atol=1e-4)


@pytest.mark.parametrize(("rate", "wanted"), [(44_100, 16_000), (8_000, 16_000), (22_050, 8_000)])
def test_resampling_keeps_a_tone_and_cuts_what_would_fold_back(rate, wanted):
    found = decode_audio(sounding(tone(440, 1.0, rate), rate), wanted)
    assert abs(len(found) - wanted) <= 1
    middle = slice(wanted // 10, -wanted // 10)
    assert np.abs(found[middle] - tone(440, 1.0, wanted)[: len(found)][middle]).max() < 0.01
    too_high = tone(0.45 * rate, 1.0, rate)
    if rate > wanted:
        assert np.abs(resampled(too_high, rate, wanted)[middle]).max() < 0.02


def test_a_sound_at_its_rate_is_as_it_is():
    assert resampled(samples := tone(), 16_000, 16_000) is samples


WAV, FLAC = sounding(tone()), sounding(tone(), kind="FLAC")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "a sound is declared and the bytes are none at all"),
        (b"said the cat", "a sound is declared and the bytes are text"),
        (encoded(scene()), "a sound is declared and the bytes are an image"),
        (WAV[:30], "the sound's header is truncated or damaged"),
        (WAV[:50], "the sound is truncated or damaged"),
        (WAV[:-2], "the sound is truncated or damaged"),
        (FLAC[:50], "the sound's header is truncated or damaged"),
        (FLAC[: len(FLAC) // 2], "the sound is truncated or damaged"),
        (sounding(tone()[:0]), "the sound has no sample"),
        (sounding(np.full(99, np.nan, np.float32), subtype="FLOAT"), "the sound has samples that are no finite number"),
        (sounding(tone(), 500), "the sound's rate isn't between 1,000 and 768,000 Hz"),
        (sounding(np.zeros(1_801 * 1_000, np.uint8).astype(np.int16), 1_000, subtype="PCM_U8"),
         "the sound is longer than 1,800 s"),
        (sounding(np.zeros((9, 65), np.int16)), "the sound has more than 64 channels"),
    ],
)  # fmt: skip
def test_what_is_no_sound_is_one_sentence(data, reason):
    with pytest.raises(Undecodable) as told:
        decode_audio(data, 16_000)
    assert str(told.value) == reason


@settings(max_examples=60)
@given(
    data=st.sampled_from([WAV, FLAC]),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4),
)
def test_damaged_bytes_decode_or_are_undecodable(data, cut, flips):
    damaged = bytearray(data)
    for place, mask in flips:
        damaged[int(place * len(damaged))] ^= mask
    with contextlib.suppress(Undecodable):
        assert np.isfinite(decode_audio(bytes(damaged[: int(cut * len(damaged))]), 16_000)).all()


# Spectrograms


def test_the_spectrogram_is_that_of_whispers_feature_extractor():
    from transformers import WhisperFeatureExtractor

    rng = np.random.default_rng(0)
    samples = (tone(700, 1.3) + 0.1 * rng.standard_normal(int(1.3 * 16_000))).astype(np.float32)
    for mels in (80, 128):
        theirs = WhisperFeatureExtractor(feature_size=mels)(samples, sampling_rate=16_000, padding="do_not_pad")
        expected = np.asarray(theirs["input_features"][0]).T
        found = Mel(mels=mels)(samples)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[: len(found)], atol=2e-5)
        assert len(found) == len(expected) == 130


@pytest.mark.parametrize("samples", [1, 159, 160, 399, 400, 16_000])
def test_frames_are_counted_and_cut(samples):
    mel = Mel(max_frames=20)
    assert mel(tone(seconds=1.0)[:samples]).shape == (mel.frames(samples), 80)
    assert mel.frames(samples) == min(max(samples // 160, 1), 20)


def test_a_cut_sound_begins_as_the_whole_does():
    samples = tone(seconds=1.0)
    np.testing.assert_allclose(Mel(max_frames=20)(samples), Mel()(samples)[:20], atol=1e-6)


def test_a_tone_is_loudest_in_its_band():
    spectrogram = Mel()(tone(1_000, 1.0))
    bands = np.array([Mel()(tone(hertz, 1.0))[50].argmax() for hertz in (200, 500, 1_000, 3_000, 7_000)])
    assert (np.diff(bands) > 0).all()
    assert spectrogram[:, 0].max() < spectrogram.max() - 0.5


def test_blanks_hide_their_rectangle_and_nothing_else():
    mel = Mel()
    whole = mel(tone(seconds=1.0))
    shown = mel.blanked(whole, ((0.25, 0.5, 0.0, 1.0), (0.0, 1.0, 0.5, 0.75)), 16_000)
    hidden = np.zeros_like(whole, bool)
    hidden[25:50], hidden[:, 40:60] = True, True
    np.testing.assert_array_equal(shown[~hidden], whole[~hidden])
    np.testing.assert_array_equal(shown[hidden], whole.mean())
    assert mel.blanked(whole, (), 16_000) is whole


def test_soundfile_reads_what_is_declared():
    assert {"WAV", "FLAC", "OGG", "MP3"} <= set(soundfile.available_formats())
