"""Each view of images and sounds by its law; what a batch shows depends on (seed, step, row, field) alone."""

import numpy as np
import pytest
from pydantic import ValidationError

from data_services.draws import Draws, row_keys
from data_services.items import TEXT, Kinds, Media
from data_services.schema import Undecodable, UsageError
from data_services.views.config import Shown, Views, check_views
from data_services.views.images import ColourImage, CropImage, FlipImage
from data_services.views.sounds import SpecAugment
from tests.data_services.media.pictures import encoded, scene

N = 400


def draws(seed: int = 0, n: int = N, step: int = 3) -> Draws:
    return Draws(row_keys(np.arange(n), step, seed))


def places(height: int = 30, width: int = 50) -> np.ndarray:
    """An image whose pixels say where they are: (row, column, 0)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, 0 * x], 2).astype(np.uint8)


def test_a_crop_is_a_rectangle_of_the_image_with_the_shares_and_shapes_that_are_asked_for():
    view = CropImage(min_area=0.3, max_area=0.8, max_ratio=1.5)
    cropped = view([places()] * N, draws())
    for image in cropped:
        height, width = image.shape[:2]
        top, left = int(image[0, 0, 0]), int(image[0, 0, 1])
        np.testing.assert_array_equal(image, places()[top : top + height, left : left + width])
    sizes = np.array([image.shape[:2] for image in cropped])
    fits = (sizes < [30, 50]).all(1)  # the others were cut to a side of the image
    share, ratio = sizes[fits].prod(1) / 1500, sizes[fits, 1] / sizes[fits, 0]
    assert 0.27 < share.min() < 0.4 < share.max() < 0.83
    assert 1 / 1.65 < ratio.min() < 0.75
    assert 1.3 < ratio.max() < 1.65
    corners = np.array([image[0, 0, :2] for image in cropped])
    assert (corners.min(0) == 0).all()
    assert (corners.max(0) > [8, 12]).all()


def test_a_whole_crop_is_the_image():
    whole = CropImage(min_area=1, max_area=1, max_ratio=1)([scene(20, 20)], draws(n=1))[0]
    np.testing.assert_array_equal(whole, scene(20, 20))


def test_the_share_of_a_crop_is_uniform():
    view = CropImage(min_area=0.2, max_area=1.0, max_ratio=1)
    square = np.zeros((200, 200, 3), np.uint8)
    shares = np.array([image.shape[0] * image.shape[1] for image in view([square] * 2_000, draws(n=2_000))]) / 40_000
    assert np.abs(np.histogram(shares, 8, (0.2, 1.0))[0] - 250).max() < 60


def test_half_of_the_images_are_mirrored():
    flipped = FlipImage()([scene()] * N, draws())
    mirrored = [np.array_equal(image, scene()[:, ::-1]) for image in flipped]
    assert all(its or np.array_equal(image, scene()) for its, image in zip(mirrored, flipped, strict=True))
    assert 0.4 < np.mean(mirrored) < 0.6
    assert not any(np.array_equal(i, scene()[:, ::-1]) for i in FlipImage(probability=0)([scene()] * N, draws()))


def test_brightness_is_a_factor_between_its_bounds():
    view = ColourImage(brightness=0.4, contrast=0, saturation=0)
    flat = np.full((4, 4, 3), 100, np.uint8)
    levels = np.array([image[0, 0, 0] for image in view([flat] * N, draws())])
    assert 60 <= levels.min() < 65
    assert 135 < levels.max() <= 140
    assert abs(levels.mean() - 100) < 4


def test_contrast_keeps_the_mean_and_saturation_keeps_the_grey():
    grey = np.array([0.299, 0.587, 0.114])
    image = np.clip(scene(), 60, 180)  # nothing is cut at 0 or 255
    for view in (ColourImage(brightness=0, contrast=0.3, saturation=0), ColourImage(brightness=0, contrast=0)):
        for changed in view([image] * 20, draws(n=20)):
            if view.contrast:
                assert abs((changed @ grey).mean() - (image @ grey).mean()) < 1
                continue
            np.testing.assert_allclose(changed @ grey, image @ grey, atol=1.5)


def test_a_grey_image_has_no_colour_and_no_change_is_no_change():
    view = ColourImage(brightness=0, contrast=0, saturation=0, grey=1)
    changed = view([scene()], draws(n=1))[0]
    assert (np.ptp(changed, axis=2) == 0).all()
    still = ColourImage(brightness=0, contrast=0, saturation=0)([scene()], draws(n=1))[0]
    np.testing.assert_array_equal(still, scene())


def test_blanks_are_as_many_and_as_wide_as_they_may_be():
    view = SpecAugment(times=2, time_share=0.2, bands=1, band_share=0.5)
    sound = Media("audio", b"RIFF")
    found = np.array([its.blanks for its in view([sound] * N, draws())])  # [N, 3, 4]
    times, bands = found[:, :2], found[:, 2]
    assert (times[..., 2:] == [0, 1]).all()
    assert (bands[:, :2] == [0, 1]).all()
    for stretch, share in ((times[..., :2].reshape(-1, 2), 0.2), (bands[:, 2:], 0.5)):
        width = stretch[:, 1] - stretch[:, 0]
        assert width.min() >= 0
        assert 0.9 * share < width.max() <= share
        assert abs(width.mean() - share / 2) < 0.1 * share
        assert 0 <= stretch.min() < 0.02
        assert 0.98 < stretch.max() <= 1


@pytest.mark.parametrize("view", [CropImage(), FlipImage(), ColourImage(grey=0.3)])
def test_what_is_shown_of_an_image_depends_on_its_key_alone(view):
    images = [scene(20 + i, 30) for i in range(8)]
    together = view(images, draws(n=8))
    some = view([images[5], images[2]], draws(n=8).take(np.array([5, 2])))
    np.testing.assert_array_equal(some[0], together[5])
    np.testing.assert_array_equal(some[1], together[2])
    again = view(images, draws(step=4, n=8))
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(together, again, strict=True))


VIEWS = Views(
    query=[{"kind": "crop", "min_share": 0.5}],
    positive=[{"kind": "crop_image", "max_area": 0.6}, {"kind": "crop"}, {"kind": "flip"}],
)


def shown(queries, documents, rows) -> Shown:
    n = len(queries)
    return Shown(
        queries, documents, row_keys(np.array(rows), 7, 1), 100 + np.array(rows), np.arange(n), np.ones(n, np.int8)
    ).viewed([VIEWS], np.zeros(n, np.int64))


def test_views_act_on_items_and_parts_of_their_kind():
    picture = Media("image", encoded(scene()))
    text = " ".join(f"w{i}" for i in range(40))
    pairs = {"title": text, "photo": picture, "other": picture, "sound": Media("audio", b"RIFF")}
    batch = shown([text, text], [picture, pairs], [4, 9])
    assert all(len(str(query).split()) < 40 for query in batch.queries)
    alone, parts = batch.documents
    assert alone.data.size < scene().size
    assert parts["sound"].data == b"RIFF"
    assert len(parts["title"].split()) < 40
    assert parts["photo"].data.flags.c_contiguous
    assert parts["photo"].data.shape != parts["other"].data.shape or (parts["photo"].data != parts["other"].data).any()
    assert pairs["photo"].data == picture.data  # what came in is as it was
    only = shown([text], [pairs], [9])
    np.testing.assert_array_equal(only.documents[0]["photo"].data.shape, parts["photo"].data.shape)


def test_bytes_that_cannot_be_decoded_say_so():
    with pytest.raises(Undecodable, match="an image is declared and the bytes are text"):
        shown(["w1 w2"], [Media("image", b"no image")], [1])


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (TEXT, "views.positive has crop_image, a view of image, but positive is of kind text"),
        (Kinds("image", {"title": "text", "photo": "image"}), "views.query has crop, a view of text, but query is of"),
        (Kinds("text", "image"), "views.positive has crop, a view of text, but positive is of kind image"),
    ],
)
def test_a_view_that_would_act_on_nothing_is_refused(kinds, message):
    with pytest.raises(UsageError, match=message):
        check_views(VIEWS, kinds, "pairs")


def test_views_that_fit_are_none_to_refuse():
    check_views(VIEWS, Kinds("text", {"title": "text", "photo": "image"}), "pairs")
    check_views(None, Kinds("image", "audio"), "pairs")
    with pytest.raises(UsageError, match=r"views\.pair takes parts of a text"):
        check_views(Views(pair={"kind": "context"}), Kinds("image", "image"), "pairs")


def test_an_order_of_bounds_that_cannot_be_is_refused():
    with pytest.raises(ValidationError, match=r"min_area 0\.9 is above max_area 0\.5"):
        CropImage(min_area=0.9, max_area=0.5)
