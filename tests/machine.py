"""What tests take from the machine that they run on."""

import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


def free_port() -> int:
    """A port that a server may listen on a moment later.

    Those that the system gives to whoever asks for any, from 32,768 on, may have gone to another
    process by then, and Ray's workers have those up to 19,999.
    """
    while True:
        port = random.randrange(20_000, 32_768)
        with socket.socket() as one, suppress(OSError):
            one.bind(("", port))
            return port


@contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[Path]:
    """A file system at a new folder, of a size as mount takes it; skips where none may be made."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, check=False).returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def grow(folder: Path, size: str) -> None:
    """Make more room in what `small_file_system` made."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
