"""Files and folders appear under their final names whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A sibling path for a file or a folder, renamed to `path` when the block ends well, removed when it does not.

    A file that is there is replaced; so is a folder, when it is empty.

    Raises:
        OSError: When the disk refuses, or when `path` is a folder with something in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that appears whole. Raises OSError when the disk refuses."""
    with atomic_path(path) as partial:
        partial.write_bytes(data)
