"""Data sets of the Hugging Face hub, through `datasets` where it is installed, and folders that it saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from data_services.fields import check_fields
from data_services.files import File, Found, reading
from data_services.items import Kind
from data_services.readers.blocks import Block, Want, blocks_of_table
from data_services.schema import RunError, UsageError

if TYPE_CHECKING:
    import datasets

PREFIX = "hf:"
_SPLITS, _STATE = "dataset_dict.json", "state.json"


@dataclass(frozen=True)
class HubPart:
    """A loaded data set of the hub."""

    path: str
    fingerprint: str
    dataset: datasets.Dataset = field(repr=False)
    files: ClassVar[tuple[File, ...]] = ()

    def blocks(self, want: Want) -> Iterator[Block]:
        check_fields(self.dataset.column_names, want.fields, self.path)
        narrow = self.dataset.select_columns(want.fields.named).with_format("arrow")
        for start in range(0, len(narrow), want.block_rows):
            yield from blocks_of_table(self.path, narrow[start : start + want.block_rows], start)


def media_of(dataset: datasets.Dataset) -> dict[str, Kind]:
    """The fields that `datasets` knows as images or sounds, alone or in lists."""
    import datasets

    kinds: dict[type, Kind] = {datasets.Image: "image", datasets.Audio: "audio"}
    found = {name: getattr(feature, "feature", feature) for name, feature in dataset.features.items()}
    return {name: kinds[type(feature)] for name, feature in found.items() if type(feature) in kinds}


def load(path: str, split: str) -> datasets.Dataset:
    """The split of `hf:owner/name`, `hf:owner/name:configuration`, either with @REVISION at its end.

    Downloads what isn't in the cache of `datasets`. Raises UsageError where the package, the data set or the split
    isn't there, RunError where the hub can't be reached.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise UsageError(f"source {path} needs the package `datasets`: pip install datasets") from error
    rest, _, revision = path.removeprefix(PREFIX).partition("@")
    name, _, configuration = rest.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split, revision=revision or None)
    except DatasetNotFoundError as error:
        raise UsageError(f"source {path}: {_first_line(error)}") from error
    except (ConnectionError, OSError) as error:
        offline = "; HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else ""
        raise RunError(f"source {path} can't be fetched from the hub: {_first_line(error)}{offline}") from error
    except ValueError as error:  # an unknown configuration or split
        raise UsageError(f"source {path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def is_saved(found: Found) -> bool:
    """Whether a folder is one of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    names = {file.name for file in found.files}
    return _SPLITS in names or {_STATE, "dataset_info.json"} <= names


def saved_files(path: str, found: Found, split: str) -> list[File]:
    """The Arrow files of a split of such a folder, in its order."""
    files = {file.name: file for file in found.files}
    below = ""
    if _SPLITS in files:
        splits = _json(files[_SPLITS])["splits"]
        if split not in splits:
            raise UsageError(f"source {path} has no split {split!r}; it has {', '.join(splits)}")
        below = f"{split}/"
    elif split not in ("train", saved := _json(files[_STATE]).get("_split")):
        raise UsageError(f"source {path} is the saved split {saved or 'of no name'}, not {split!r}; leave `split` out")
    state = _json(files[below + _STATE]) if below + _STATE in files else {}
    names = [below + entry["filename"] for entry in state.get("_data_files") or []]
    if state.get("_indices_data_files"):
        raise UsageError(f"source {path} was saved by an old `datasets` with rows left out: save it again, flattened")
    missing = [name for name in names if name not in files]
    if missing or not names:
        raise UsageError(f"source {path} lacks {missing[0] if missing else below + _STATE}: save it again")
    return [files[name] for name in names]


def _json(file: File) -> dict[str, Any]:
    with reading(file):
        return json.loads(file.stream().read())
