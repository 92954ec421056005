"""What towers of images and of sounds read: pixels as the processor of the folder would make them; mel frames."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_services.media.audio import decode_audio, resampled
from data_services.media.image import decode_image
from data_services.media.mel import Mel
from data_services.ragged import Inputs, Ragged
from data_services.schema import Item, Media, UsageError

PREPROCESSOR = "preprocessor_config.json"
AUDIO_SETTINGS = "gyre_audio.json"
PIXELS, FRAMES = "pixels", "frames"  # names of arrays


@dataclass(frozen=True)
class ImageFront:
    """A `Tokenize` of images: resized, and cropped in the middle, by Pillow; `pixels` [T, 3, height, width] uint8.

    Numbers stay bytes, which the tower brings to its own scale: a quarter of what would travel otherwise. Resizing is
    that of Transformers' processors of the CLIP family, to the bit.

    height, width   in pixels
    shortest_edge   the side that the shorter one is resized to before the crop; None: both sides, the ratio changes
    resample        Pillow's number of the filter
    tokens          placeholders of an image, as many as its tower computes
    """

    height: int
    width: int
    shortest_edge: int | None
    resample: int
    tokens: int

    @classmethod
    def of(cls, folder: Path, tokens: int) -> ImageFront:
        """By the folder's preprocessor_config.json. UsageError where it asks for what isn't done here."""
        config = json.loads((folder / PREPROCESSOR).read_text())
        size, crop = _sides(config.get("size")), _sides(config.get("crop_size"))
        cropped = config.get("do_center_crop", False)
        shortest = size.get("shortest_edge") if cropped else None
        final = crop if cropped else size
        if not config.get("do_resize", True) or not {"height", "width"} <= set(final) or (cropped and not shortest):
            raise UsageError(
                f"{folder / PREPROCESSOR} has size {config.get('size')} and crop_size {config.get('crop_size')}: gyre "
                "resizes to a height and width, or the shortest_edge and crops to a height and width"
            )
        if shortest is not None and shortest < max(final.values()):
            raise UsageError(
                f"{folder / PREPROCESSOR} crops {final} from a shortest_edge of {shortest}, which is smaller"
            )
        return cls(final["height"], final["width"], shortest, int(config.get("resample", 3)), tokens)

    def __call__(self, items: Sequence[Item], field: str, tasks: Sequence[int] | None = None) -> Inputs:
        """Raises Undecodable where one is damaged, or no image."""
        pixels = np.zeros((len(items), 3, self.height, self.width), np.uint8)
        for i, item in enumerate(items):
            assert isinstance(item, Media), "the tower of images is given images"
            pixels[i] = self.pixels(item).transpose(2, 0, 1)
        every = np.arange(len(items) + 1)
        return Inputs(
            np.zeros(len(items) * self.tokens, np.int32), every * self.tokens, {PIXELS: Ragged(pixels, every)}
        )

    def prompt_tokens(self, field: str, task: int | None = None) -> int:
        """An image has no prompt."""
        return 0

    def pixels(self, item: Media) -> np.ndarray:
        """[height, width, 3] uint8."""
        from PIL import Image

        decoded = decode_image(item.data) if isinstance(item.data, bytes) else item.data
        height, width = decoded.shape[:2]
        to_height, to_width = self.height, self.width
        if self.shortest_edge is not None:
            short, long = sorted((height, width))
            sides = self.shortest_edge, int(self.shortest_edge * long / short)
            to_height, to_width = sides if height <= width else sides[::-1]
        if (height, width) != (to_height, to_width):
            resized = Image.fromarray(decoded).resize((to_width, to_height), Image.Resampling(self.resample))
            decoded = np.asarray(resized)
        top, left = (to_height - self.height) // 2, (to_width - self.width) // 2
        return decoded[top : top + self.height, left : left + self.width]


@dataclass(frozen=True)
class AudioFront:
    """A `Tokenize` of sounds: `frames` [F, bands] float32, log-mel.

    halvings  so many times the tower halves the frames: it computes one token for 2^halvings of them
    whole     whether it does so for as many frames as a sound may have, whatever it has
    """

    mel: Mel
    halvings: int
    whole: bool = False

    @classmethod
    def of(cls, folder: Path) -> AudioFront:
        """By the folder's gyre_audio.json."""
        config = json.loads((folder / AUDIO_SETTINGS).read_text())
        most = max(1, int(config["max_seconds"] * config["rate"] / config["hop"]))
        mel = Mel(config["rate"], config["mels"], config["window"], config["hop"], most)
        return cls(mel, 1, whole=True) if config.get("encoder") else cls(mel, config["layers"])

    def __call__(self, items: Sequence[Item], field: str, tasks: Sequence[int] | None = None) -> Inputs:
        """Raises Undecodable where one is damaged, or no sound."""
        frames = [self.frames(item) for item in items]
        offsets = np.cumsum([0, *map(len, frames)])
        tokens = [-(-(self.mel.max_frames if self.whole else len(its)) >> self.halvings) for its in frames]
        every = Ragged(np.concatenate(frames), offsets)
        return Inputs(np.zeros(sum(tokens), np.int32), np.cumsum([0, *tokens]), {FRAMES: every})

    def prompt_tokens(self, field: str, task: int | None = None) -> int:
        """A sound has no prompt."""
        return 0

    def frames(self, item: Item) -> np.ndarray:
        """[F, bands] float32 of a sound, without what a view has blanked."""
        assert isinstance(item, Media), "the tower of sounds is given sounds"
        if isinstance(item.data, bytes):
            samples = decode_audio(item.data, self.mel.rate)
        else:
            samples = resampled(item.data, item.rate, self.mel.rate)
        return self.mel.blanked(self.mel(samples), item.blanks, len(samples))


def _sides(size: int | dict[str, int] | None) -> dict[str, int]:
    """A number alone is a shortest edge, or both sides of a crop."""
    if isinstance(size, int):
        return {"shortest_edge": size, "height": size, "width": size}
    return size or {}


def thumbnails(items: Sequence[Item], side: int = 16) -> np.ndarray:
    """[n, side·side] float32 of images: grey, both sides resized."""
    from PIL import Image

    front = ImageFront(side, side, None, int(Image.Resampling.BOX), 1)
    return np.stack(
        [front.pixels(item).mean(axis=2).ravel() for item in items if isinstance(item, Media)], dtype=np.float32
    )
