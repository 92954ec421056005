"""A disk small enough to be filled: a tmpfs, where this user may mount one."""

from __future__ import annotations

import contextlib
import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

LEFT_BYTES = 1 << 16  # for a line of metrics, not for a checkpoint


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "gyre-test", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """Fills the disk but for LEFT_BYTES with one file, which is returned."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 14))
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017  the loop has no other end
        file.truncate(file.tell() - LEFT_BYTES)
    return ballast
