"""Whatever comes as an image is upright 8-bit RGB, or one sentence says why not."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from data_services.media.image import bounded, decode_image, fitted, image_size, resized
from data_services.schema import Undecodable
from tests.data_services.media.pictures import claims, encoded, scene, sounding, tone, turned

SCENE = scene()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG", "JPEG2000", "AVIF"])
def test_every_format_decodes_to_its_pixels(kind):
    lossless = kind in ("PNG", "BMP", "TIFF", "PPM")
    data = encoded(SCENE, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert image_size(data) == SCENE.shape[:2]
    found = decode_image(data)
    assert (found.shape, found.dtype) == (SCENE.shape, np.uint8)
    assert np.abs(found.astype(int) - SCENE).mean() <= (0 if lossless else 12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_put_upright(orientation):
    data = turned(SCENE, orientation)
    np.testing.assert_array_equal(decode_image(data), SCENE)
    assert image_size(data) == SCENE.shape[:2]


@pytest.mark.parametrize("exif", [b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00nonsense", b"Exif\x00\x00"])
def test_a_broken_exif_header_changes_nothing(exif):
    assert decode_image(encoded(SCENE, "JPEG", exif=exif)).shape == SCENE.shape


def with_transparency(mode: str) -> Image.Image:
    """Left half opaque dark red, right half transparent."""
    image = Image.new("RGBA", (8, 4), (100, 0, 0, 255))
    image.paste((0, 0, 255, 0), (4, 0, 8, 4))
    if mode == "P":
        return image.quantize(4)
    return image.convert(mode)


@pytest.mark.parametrize(("mode", "dark"), [("RGBA", (100, 0, 0)), ("P", (100, 0, 0)), ("LA", (30, 30, 30))])
def test_what_is_transparent_is_white(mode, dark):
    found = decode_image(encoded(with_transparency(mode)))
    assert tuple(found[0, 0]) == dark
    assert tuple(found[0, 7]) == (255, 255, 255)


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert tuple(decode_image(encoded(image))[0, 0]) == (127, 127, 127)


def test_one_colour_may_be_declared_transparent():
    image = Image.new("RGB", (4, 4), (10, 20, 30))
    assert (decode_image(encoded(image, transparency=(10, 20, 30))) == 255).all()


def test_palettes_grey_bilevel_and_cmyk_become_rgb():
    red = Image.new("RGB", (6, 6), (255, 0, 0))
    assert tuple(decode_image(encoded(red.quantize(4)))[0, 0]) == (255, 0, 0)
    assert tuple(decode_image(encoded(red.convert("L")))[0, 0]) == (76, 76, 76)
    assert (decode_image(encoded(Image.new("1", (6, 6), 1))) == 255).all()
    found = decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))[8, 8]
    assert np.abs(found.astype(int) - (254, 0, 0)).max() < 6


def swapped_profile() -> bytes:
    """An ICC profile whose red is sRGB's blue and the other way round."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"----", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"----", b"bXYZ", 1)
    return swapped.replace("sRGB".encode("utf-16-be"), "BGR ".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_another_profile_become_srgbs(mode):
    image, alpha = Image.fromarray(SCENE).quantize(16), Image.new("L", SCENE.shape[1::-1], 255)
    image = image if mode == "P" else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(alpha)
    plain = decode_image(encoded(image)).astype(int)
    found = decode_image(encoded(image, icc_profile=swapped_profile())).astype(int)
    assert np.abs(found - plain[..., ::-1]).max() <= 2
    assert np.abs(found - plain).max() > 50


@pytest.mark.parametrize("profile", [ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"nonsense"])
def test_a_profile_of_srgb_and_one_that_is_broken_change_nothing(profile):
    np.testing.assert_array_equal(decode_image(encoded(SCENE, icc_profile=profile)), SCENE)


def test_sixteen_bits_are_cut_to_eight_and_ranges_that_are_not_known_are_refused():
    levels = np.array([[0, 255, 256, 65_535]] * 2, np.uint16)
    np.testing.assert_array_equal(decode_image(encoded(levels))[0, :, 0], [0, 0, 1, 255])
    floats = Image.fromarray(np.ones((4, 4), np.float32))
    with pytest.raises(Undecodable, match="floating-point pixels, whose range isn't known"):
        decode_image(encoded(floats, "TIFF"))
    wide = Image.fromarray(np.full((4, 4), 1 << 20, np.int32))
    with pytest.raises(Undecodable, match="32-bit pixels, whose range isn't known"):
        decode_image(encoded(wide, "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_shown(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    file = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert tuple(decode_image(file.getvalue())[0, 0]) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an image is declared and the bytes are none at all"),
        (b"a cat on a mat", "an image is declared and the bytes are text"),
        ("<!DOCTYPE html><p>Größe".encode(), "an image is declared and the bytes are text"),
        (b"%PDF-1.7 \x00\x01", "an image is declared and the bytes are a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "an image is declared and the bytes are text"),
        (b"\x00\x00\x00\x18ftypmp42", "an image is declared and the bytes are a film"),
        (sounding(tone()), "an image is declared and the bytes are a sound"),
        (bytes(range(256)), "an image is declared and the bytes are of a format that isn't known"),
        (b"\x89PNG\r\n\x1a\n", "the image's header is truncated or damaged"),
        (encoded(SCENE)[:40], "the image's header is truncated or damaged"),
        (encoded(SCENE)[:-30], "the image is truncated or damaged"),
        (encoded(SCENE, "JPEG")[:-40], "the image is truncated or damaged"),
        (encoded(SCENE[:1, :1]), "the image has a side of fewer than 2 pixels"),
        (encoded(SCENE[:1]), "the image has a side of fewer than 2 pixels"),
        (claims(20_000, 20_000), "the image has more than 67,108,864 pixels"),
        (claims(9_000, 9_000), "the image has more than 67,108,864 pixels"),
        (claims(2_000_000_000, 2_000_000_000), "the image has more than 67,108,864 pixels"),
        (claims(2_000, 19), "the image has one side more than 100 times as long as the other"),
    ],
)
def test_what_is_no_image_is_one_sentence(data, reason):
    with pytest.raises(Undecodable) as told:
        decode_image(data)
    assert str(told.value) == reason


def test_a_small_file_of_many_pixels_is_told_by_its_header():
    data = encoded(Image.new("1", (20_000, 20_000)))  # 50 kB that decode to 1.2 GB
    with pytest.raises(Undecodable, match="more than 67,108,864 pixels"):
        image_size(data)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"]),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=8),
)
def test_damaged_bytes_decode_or_are_undecodable(kind, cut, flips):
    data = bytearray(encoded(SCENE, kind))
    for place, mask in flips:
        data[int(place * len(data))] ^= mask
    with contextlib.suppress(Undecodable):
        found = decode_image(bytes(data[: int(cut * len(data))]))
        assert (found.ndim, found.dtype) == (3, np.uint8)


def test_a_jpeg_is_decoded_no_larger_than_it_is_needed():
    large = scene(300, 400)
    data = encoded(large, "JPEG", quality=95)
    assert decode_image(data, least_side=70).shape == (75, 100, 3)
    assert decode_image(data, least_side=80).shape == (150, 200, 3)
    assert decode_image(data, least_side=301).shape == decode_image(data).shape == (300, 400, 3)
    small = decode_image(data, least_side=70)
    assert np.abs(small.astype(int) - resized(large, 75, 100)).mean() < 3
    assert decode_image(encoded(large), least_side=70).shape == (300, 400, 3)  # a PNG is decoded whole


def test_resizing_keeps_what_is_shown():
    image = scene(60, 100)
    half = resized(image, 30, 50)
    assert np.abs(half.astype(float) - image.reshape(30, 2, 50, 2, 3).mean((1, 3))).max() < 5
    np.testing.assert_array_equal(resized(image, 60, 100), image)
    np.testing.assert_array_equal(fitted(image, 60), image[:, 20:80])
    np.testing.assert_array_equal(resized(image, 20, 30, (5, 7, 20, 30)), image[5:25, 7:37])
    assert bounded(image, 6_000) is image
    assert bounded(image, 1_500).shape == (30, 50, 3)
    assert bounded(scene(2, 190), 10).shape == (1, 30, 3)
