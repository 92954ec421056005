"""Checkpoints on disk: what lies in one, which are there, whether they are whole. `trainers/saving.py` writes them.

    <run>/checkpoints/step-00000050.a3f9c1/     the attempt's id is in the name: attempts never share a folder
        rank-00000-of-00002.safetensors         tensors of one worker: weights, optimizer, average, queue
        state.json                              what is not a tensor: step, plan, choices, fingerprints
        manifest.json                           the commit marker, written last: files, sizes, checksums, its own too
    <run>/checkpoints/aside.step-00000060.…/    one that nothing loads any more, with the reason in why.txt

A folder without a manifest never existed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_services.schema import RunError

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.collectives import Group

MANIFEST, STATE, LEASE, WHY = "manifest.json", "state.json", "lease.json", "why.txt"
COPIED = "copied.json"  # of the newest copy in an object store: its step, and its failure where it failed
ASIDE = "aside."
FORMAT = 2
_NAME = re.compile(r"step-(\d+)\.")
READERS = 8  # threads that verify a whole checkpoint: storage is the limit, not checksums


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint on disk: `world_size` files, one a worker, and the state.

    committed_at  seconds since 1970, by the clock of the machine that committed it
    files         {name: (bytes, checksum)}
    unreadable    what is wrong with the manifest; then there is nothing to read but `step`, from the folder's name
    """

    folder: Path
    step: int
    world_size: int = 0
    committed_at: float = 0.0
    files: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    unreadable: str = ""

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / STATE).read_text())

    def tensors(self, prefix: str = "") -> list[SavedTensors]:
        """What each worker saved under `prefix`, in rank order, without the prefix; read when asked for."""
        files = [self.folder / rank_file(rank, self.world_size) for rank in range(self.world_size)]
        return [SavedTensors(path, prefix) for path in files]

    def damage(self, part: int = 0, parts: int = 1, contents: bool = True) -> str:
        """What is wrong with the first file that isn't as it was written, naming it; empty where all are.

        part      of `parts` workers that verify it together: each takes the state, and every parts-th file
        contents  False: only whether every file is there, with its size
        """
        if self.unreadable:
            return self.unreadable
        names = [name for i, name in enumerate(self.files) if name == STATE or i % parts == part]
        with ThreadPoolExecutor(READERS) as readers:
            return next(filter(None, readers.map(lambda name: self._damage_of(name, contents), names)), "")

    def _damage_of(self, name: str, contents: bool) -> str:
        path, (size, checksum) = self.folder / name, self.files[name]
        try:
            if (there := path.stat().st_size) != size:
                return f"{name} has {there:,} bytes, {size:,} were written"
            if contents and file_checksum(path) != checksum:
                return f"{name} is not what was written (its checksum differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} can't be read ({error.strerror or error})"
        return ""

    def verify(self) -> None:
        """Raises RunError naming the first file that is missing, truncated or changed."""
        if damage := self.damage():
            raise RunError(f"checkpoint {self.folder} is damaged: {damage}")


class SavedTensors(Mapping):
    """The tensors of a safetensors file whose names begin with `prefix`; each is read, to the CPU, when asked for."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self._path, self._prefix = path, prefix

    @cached_property
    def _file(self) -> Any:
        from safetensors import safe_open

        return safe_open(self._path, framework="pt")

    @cached_property
    def _names(self) -> set[str]:
        return {name for name in self._file.keys() if name.startswith(self._prefix)}  # noqa: SIM118  not a dict

    def __getitem__(self, name: str) -> Tensor:
        if self._prefix + name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(self._prefix + name)

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


# Which are there.


def committed(root: Path) -> list[Checkpoint]:
    """The committed checkpoints under `root`, oldest first, damaged ones too."""
    folders = [folder for folder in root.glob("step-*") if _NAME.match(folder.name)]
    found = [checkpoint for folder in folders if (checkpoint := _opened(folder))]
    return sorted(found, key=lambda c: (c.step, c.committed_at))


def latest(root: Path) -> Checkpoint | None:
    """The newest committed checkpoint under `root`, or None."""
    every = committed(root)
    return every[-1] if every else None


def fork(checkpoint: Checkpoint, root: Path, lineage: Mapping[str, Any]) -> Checkpoint:
    """The first checkpoint of another run, under its `root`: the same tensors and step, another lineage."""
    if checkpoint.unreadable:
        raise RunError(f"checkpoint {checkpoint.folder} is damaged: {checkpoint.unreadable}")
    folder = root / folder_name(checkpoint.step, secrets.token_hex(3))
    folder.mkdir(parents=True)
    for name in checkpoint.files:
        if name != STATE:
            link_or_copy(checkpoint.folder / name, folder / name)
    write_json(folder / STATE, checkpoint.state | {"lineage": dict(lineage)})
    files = {**checkpoint.files, STATE: described(folder / STATE)}
    return write_manifest(folder, checkpoint.step, checkpoint.committed_at, files)


def link_or_copy(path: str | Path, there: str | Path) -> None:
    """A second name of a file that nobody writes to; where the file system knows none, a copy."""
    try:
        os.link(path, there)
    except OSError:
        shutil.copyfile(path, there)


def newest_whole(root: Path, group: Group) -> Checkpoint | None:
    """The newest committed checkpoint whose every file is as it was written; what is damaged is set aside, with the
    reason. Collective: the workers read a share of the files each.
    """
    while True:
        newest: Checkpoint | None = group.broadcast_object(latest(root) if group.rank == 0 else None)
        if newest is None:
            return None
        damage = next(filter(None, group.gather_objects(newest.damage(group.rank, group.size))), "")
        if not damage:
            return newest
        if group.rank == 0:
            set_aside(newest, f"checkpoint {newest.folder} is damaged: {damage}")


def check_whole(chosen: Checkpoint, every: Sequence[Checkpoint]) -> None:
    """Raises RunError where a checkpoint is damaged, and offers the newest whole one of `every`, oldest first."""
    if not (damage := chosen.damage()):
        return
    whole = next((c for c in reversed(every) if c.step != chosen.step and not c.damage()), None)
    offer = "none of the others is whole: start a new run"
    if whole:
        offer = f"the newest whole one is of step {whole.step}: go on from it with --from-step {whole.step}"
    raise RunError(f"checkpoint {chosen.folder} is damaged: {damage}; {offer}")


def set_aside(checkpoint: Checkpoint, why: str) -> None:
    """Nothing loads or retires it any more; its files stay, for whoever wants to look."""
    (checkpoint.folder / WHY).write_text(f"{why}\n")
    checkpoint.folder.rename(aside_of(checkpoint.folder))


def aside_of(folder: Path) -> Path:
    """Where a checkpoint's folder lies once it is set aside."""
    return folder.with_name(ASIDE + folder.name)


def reasons_aside(root: Path) -> dict[Path, str]:
    """{folder: why} of what was set aside under `root`."""
    return {file.parent: file.read_text().strip() for file in sorted(root.glob(f"{ASIDE}*/{WHY}"))}


def last_copy(root: Path) -> tuple[int, str]:
    """The step of the newest copy in an object store, and its failure, empty where it is whole; -1 where none is."""
    try:
        told = json.loads((root / COPIED).read_text())
    except FileNotFoundError:
        return -1, ""
    return told["step"], told["failure"]


def remove(folder: Path) -> None:
    """As far as the file system lets; the commit marker first: what a kill leaves half removed is no checkpoint."""
    with suppress(OSError):
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


# The commit marker.


def write_manifest(folder: Path, step: int, committed_at: float, files: Mapping[str, tuple[int, int]]) -> Checkpoint:
    """Commits the checkpoint. files: as of Checkpoint, the state's among them."""
    world_size = len(files) - 1
    manifest = {"format": FORMAT, "step": step, "world_size": world_size, "committed_at": committed_at, "files": files}
    write_json(folder / MANIFEST, manifest | {"checksum": _sealed(manifest)})
    return Checkpoint(folder, step, world_size, committed_at, files)


def _opened(folder: Path) -> Checkpoint | None:
    """None where there is no manifest, or no longer."""
    step = step_of(folder.name)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if not isinstance(manifest, dict) or "format" not in manifest:
            return Checkpoint(folder, step, unreadable=f"{MANIFEST} is no manifest")
        if manifest["format"] != FORMAT:
            told = f"{MANIFEST} is of format {manifest['format']}, this version reads {FORMAT}"
            return Checkpoint(folder, step, unreadable=told)
        if manifest.pop("checksum", None) != _sealed(manifest) or manifest["step"] != step:
            return Checkpoint(folder, step, unreadable=f"{MANIFEST} is not what was written (its checksum differs)")
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return Checkpoint(folder, step, unreadable=f"{MANIFEST} is not whole")
    files = {name: (size, checksum) for name, (size, checksum) in manifest["files"].items()}
    return Checkpoint(folder, step, manifest["world_size"], manifest["committed_at"], files)


def _sealed(manifest: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


# Files.


def folder_name(step: int, attempt: str) -> str:
    return f"step-{step:08d}.{attempt}"


def step_of(name: str) -> int:
    """The step of a checkpoint's folder. Raises ValueError where it is none's."""
    if (found := _NAME.match(name)) is None:
        raise ValueError(f"{name!r} is no folder of a checkpoint")
    return int(found[1])


def rank_file(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """safetensors, synced to the disk. tensors: on the CPU. Raises OSError, a full disk among them."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)
    except SafetensorError as error:  # the library wraps the operating system's error in its own
        raise OSError(f"{error}") from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a temporary file beside it, synced, then renamed."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(3)}.tmp")
    with open(temporary, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def described(path: Path) -> tuple[int, int]:
    """Size and checksum of a file, as manifests have them."""
    return path.stat().st_size, file_checksum(path)


def file_checksum(path: Path) -> int:
    """CRC-32 of a file's bytes: finds truncation and flipped bits, not malice."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
