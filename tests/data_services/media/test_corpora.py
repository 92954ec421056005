"""The corpora that are drawn and sounded here: their splits, their truth, and that they come out the same."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from data_services.corpora import charts, glyphs, pages, tones
from data_services.corpora.catalogue import corpora
from data_services.corpora.splits import SPLITS, split_of
from data_services.items import Kinds
from data_services.media.audio import decode_audio
from data_services.media.image import decode_image
from data_services.near_duplicates import find_duplicates
from data_services.schema import UsageError
from data_services.sources import SourceConfig, open_source
from data_services.statistics import describe

SMALL = "validation"


@pytest.fixture(scope="module")
def rows():
    """The rows of every split of the corpora that are quickly made; of glyphs the small split."""
    made = {name: {split: list(corpora()[name].rows(split)) for split in SPLITS} for name in ("charts", "tones")}
    return made | {name: {SMALL: list(corpora()[name].rows(SMALL))} for name in ("glyphs", "pages")}


def test_a_seventh_is_held_out_and_a_tenth_of_the_rest_is_for_validation():
    places = [split_of(f"name {i}") for i in range(20_000)]
    shares = [places.count(split) / len(places) for split in ("heldout", "validation", "train")]
    np.testing.assert_allclose(shares, [1 / 7, 6 / 70, 54 / 70], atol=0.01)


def test_a_name_and_its_picture():
    image = np.asarray(glyphs.picture("+"))
    assert image.shape == (glyphs.SIDE, glyphs.SIDE)
    ink = np.argwhere(image < 128)
    assert abs(ink[:, 1].mean() - 15.5) < 1.5  # in the middle
    assert np.asarray(glyphs.picture(".")).argmin() > np.asarray(glyphs.picture("'")).argmin()  # on one baseline
    wide = np.argwhere(np.asarray(glyphs.picture("⟹")) < 200)
    assert wide.min() >= 1
    assert wide.max() <= 30


def test_glyphs_are_thousands_of_names_held_out_by_name(rows):
    assert 300 < len(rows["glyphs"][SMALL]) < 700
    names = [row["query"] for row in rows["glyphs"][SMALL]]
    assert len(set(names)) == len(names)
    assert all(split_of(name) == SMALL for name in names)
    assert all(len(row["positive"]) == 1 for row in rows["glyphs"][SMALL])  # recall@1 can be 1
    letter = next(row for row in itertools.islice(glyphs.rows("train"), 40) if row["query"].startswith("latin"))
    assert len(letter["positive"]) == len(glyphs.STYLES)
    assert len({*letter["positive"]}) > 3


def test_every_true_caption_of_a_picture_is_among_its_positives(rows):
    for split in ("validation", "heldout"):
        said = {text for row in rows["charts"][split] for text in row["positive"]}
        for row in rows["charts"][split][::20]:
            true = {text for text in said if holds(text, row["name"])}
            assert true == set(row["positive"]), row["name"]


def holds(caption: str, name: str) -> bool:
    """Whether a caption is true of a picture, told from the picture's name alone."""
    words = name.split()
    if words[0] == "bars":
        _, tallest, shortest, number = words
        bars = len(charts.Bars.of(tallest, shortest, int(number)).bars)
        count = {3: "three", 4: "four", 5: "five"}[bars]
        if caption.startswith("a chart whose"):
            return caption.endswith((f"tallest bar is {tallest}", f"shortest bar is {shortest}"))
        if caption.startswith("a chart with"):
            return caption == f"a chart with {tallest} above all and {shortest} at the bottom"
        ends = (
            f"the tallest {tallest}, the shortest {shortest}",
            f"{shortest} is the shortest and {tallest} the tallest",
        )
        return count in caption and caption.endswith(ends)
    first, second = words[:3], words[-3:]
    relation = " ".join(words[3:-3])
    turned = {"left of": "right of", "above": "below"}[relation]
    for one, other, how in ((first, second, relation), (second, first, turned)):
        for drop in (0, 1):
            said = caption.replace("an ", "a ")
            if said in (f"a {' '.join(one[drop:])} {how} a {' '.join(other[drop:])}", f"a {' '.join(one)}"):
                return True
    return False


def test_captions_have_their_grades_and_training_leaves_the_parts_out(rows):
    assert {score for row in rows["charts"]["heldout"] for score in row["scores"]} == {1, 2, 3}
    assert {score for row in rows["charts"]["train"] for score in row["scores"]} == {2, 3}
    assert 3_000 < len(rows["charts"]["train"]) < 6_000
    assert all(len(row["positive"]) == len(set(row["positive"])) for row in rows["charts"]["heldout"])


def test_what_a_picture_shows_is_what_is_said(rows):
    for row in rows["charts"]["heldout"][::10]:
        pixels = decode_image(row["query"])
        colours = {tuple(p) for p in pixels.reshape(-1, 3)}
        said = {colour for colour in charts.COLOURS if colour in row["name"].split()}
        assert {charts.COLOURS[colour] for colour in said} <= colours


def test_pairs_of_things_are_on_one_side_only(rows):
    pairs = {
        split: {frozenset((" ".join(n[1:3]), " ".join(n[-2:]))) for r in rows["charts"][split]
                if (n := r["name"].split())[0] != "bars"}
        for split in SPLITS
    }  # fmt: skip
    assert not pairs["train"] & pairs["heldout"]
    assert not pairs["validation"] & pairs["heldout"]


def test_a_page_has_the_words_that_its_query_asks_for(rows):
    assert len(rows["pages"][SMALL]) > 200
    for row in rows["pages"][SMALL]:
        assert 1 <= len(row["positive"]) < 5
    heading, words = "Castles", ["zinc", "amber", "olive"]
    page = np.asarray(pages.draw(heading, words))
    assert (page == np.asarray(pages.draw(heading, words[::-1]))).all()  # sorted, as printed
    assert (page != np.asarray(pages.draw(heading, words[:2]))).any()
    assert (page[:20] != np.asarray(pages.draw("Letters", words))[:20]).any()


@pytest.mark.parametrize(("pitch", "hertz"), tones.PITCHES.items())
def test_a_tone_has_its_pitch_and_its_length(pitch, hertz):
    for key in range(4):
        samples = tones.sound("pure", hertz, "steady", 0.6, 0.8, key)
        spectrum = np.abs(np.fft.rfft(samples))
        loudest = spectrum.argmax() / (len(samples) / tones.RATE)
        assert abs(np.log2(loudest / hertz)) < 0.06
        assert np.count_nonzero(np.abs(samples) > 1e-3) == pytest.approx(0.8 * tones.RATE, rel=0.05)


def test_timbres_courses_and_levels_differ_as_their_words_say():
    def spectrum(timbre):
        return np.abs(np.fft.rfft(tones.sound(timbre, 220.0, "steady", 0.6, 0.8, 3)))

    pure, hollow, bright = (spectrum(timbre) for timbre in ("pure", "hollow", "bright"))
    base = pure.argmax()

    def overtone(of, n):
        return of[n * base - 4 : n * base + 5].max() / of[base - 2 : base + 3].max()

    assert overtone(pure, 3) < 0.05
    assert overtone(hollow, 3) > 0.2 > 0.1 > overtone(hollow, 2)
    assert overtone(bright, 2) > 0.3
    rising = tones.sound("pure", 440.0, "rising", 0.6, 0.8, 3)
    heard = rising[np.flatnonzero(np.abs(rising) > 0.01)[0] :][: int(0.8 * tones.RATE)]
    crossings = [np.count_nonzero(np.diff(np.sign(part))) for part in np.array_split(heard, 2)]
    assert crossings[1] > 1.2 * crossings[0]
    loud, soft = (np.abs(tones.sound("pure", 440.0, "steady", level, 0.8, 3)).max() for level in (0.6, 0.12))
    assert loud == pytest.approx(5 * soft)
    assert loud <= 1


def test_tones_are_held_out_by_timbre_pitch_and_course(rows):
    combinations = {
        split: {row["query"].split(", ", 2)[2] for row in rows["tones"][split]} for split in SPLITS
    }  # fmt: skip
    assert not combinations["train"] & combinations["heldout"]
    assert all(len(row["positive"]) == tones.SOUNDS_A_ROW for row in rows["tones"]["train"])
    samples = decode_audio(rows["tones"]["heldout"][0]["positive"][0], 16_000)
    assert len(samples) == 16_000 * tones.SECONDS


def test_the_same_rows_come_out_twice(rows):
    for name in ("glyphs", "tones", "charts", "pages"):
        again = list(itertools.islice(corpora()[name].rows(SMALL), 5))
        assert again == rows[name][SMALL][:5]
        assert corpora()[name].stamp() == corpora()[name].stamp()


@pytest.mark.parametrize(
    ("name", "kinds"), [("charts", Kinds("image", "text")), ("tones", Kinds("text", "audio"))]
)  # fmt: skip
def test_a_corpus_is_a_source_and_its_figures_are_there(tmp_path, name, kinds):
    source = open_source(SourceConfig(path=f"builtin:{name}", split=SMALL), tmp_path)
    assert (source.kinds, source.quarantined) == (kinds, {})
    found = describe(source, find_duplicates(source), {})
    side = "query" if name == "charts" else "positive"
    assert found.texts[side]["texts"] >= source.rows
    units = {"charts": {"bytes", "height", "width"}, "tones": {"bytes", "seconds"}}[name]
    assert set(found.lengths[side]) == units
    if name == "charts":
        assert found.lengths["query"]["height"]["min"] == charts.SIDE
    assert open_source(SourceConfig(path=f"builtin:{name}", split=SMALL), tmp_path).fingerprint == source.fingerprint


def test_kinds_of_a_built_in_corpus_are_its_own(tmp_path):
    with pytest.raises(UsageError, match="builtin:glyphs says itself which of its fields are images"):
        open_source(SourceConfig(path="builtin:glyphs", kinds={"positive": "image"}), tmp_path)
    with pytest.raises(UsageError, match="no built-in source builtin:glyph; nearest: builtin:glyphs"):
        open_source(SourceConfig(path="builtin:glyph"), tmp_path)


def test_pictures_are_packed_without_loss():
    picture = glyphs.picture("g")
    found = decode_image(glyphs.drawing.png(picture))
    np.testing.assert_array_equal(found[..., 0], np.asarray(picture))
    assert Image.open(io.BytesIO(glyphs.drawing.png(picture))).mode == "L"
