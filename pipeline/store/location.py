"""Where a store of labels lies: a folder, or a prefix in a bucket (s3://, gs://).

The few things that zarr does not do: whether something is there, making all files of a new store appear together, sizes
of objects, room on the disk. Credentials and endpoints of buckets come from the variables of their command line tools
(AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, ...), which obstore reads.

Folders do not go through obstore's LocalStore. It writes each file whole, but cannot make a folder appear at once: a
writer that is killed would leave a folder that is no store, and two writers would mix their files. It renames a folder,
too, but does not promise it, and reports one that is in use as one that is not found. What it leaves unfinished
(NAME#1) it hides from its own lists.
"""

import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore, from_url

from softshard.pipeline.runtime.errors import DataError, FormatError
from softshard.pipeline.runtime.files import atomic_path, write_atomically

SCHEMES = ("s3://", "gs://")
ROOT = "zarr.json"  # a store is there when this is


class Location(Protocol):
    """Where one store lies. `name` is the path or address as it was given."""

    name: str

    def exists(self) -> bool:
        """Whether something is there. Raises FormatError for a file, DataError for a bucket that is out of reach."""
        ...

    def create(self, files: Mapping[str, bytes]) -> bool:
        """Put all files there, so that the store is whole once it is there; False when another process was faster.

        Raises:
            DataError: When the disk or the bucket refuses.
        """
        ...

    def write_beside(self, suffix: str, data: bytes) -> None:
        """Write labels<suffix> beside labels.zarr. Raises DataError when the disk or the bucket refuses."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file below a folder of the store, by its path from there."""
        ...

    def free_bytes(self) -> int | None:
        """Room for more; None when no limit is known."""
        ...

    def sweep(self, before: float) -> None:
        """Remove what writers that were killed before a time (seconds since 1970) left unfinished."""
        ...


class Folder:
    """A folder on a disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def exists(self) -> bool:
        if self.path.exists() and not self.path.is_dir():
            raise FormatError(
                f"{self.name}: expected a store of labels, which is a folder, found a file; check the path"
            )
        return self.path.exists()

    def create(self, files: Mapping[str, bytes]) -> bool:
        with writing(self.name):
            try:
                with atomic_path(self.path) as partial:
                    for name, data in files.items():
                        (partial / name).parent.mkdir(parents=True, exist_ok=True)
                        (partial / name).write_bytes(data)
            except OSError:
                if not self.path.is_dir():
                    raise
                return False  # not empty: another process was faster
        return True

    def write_beside(self, suffix: str, data: bytes) -> None:
        with writing(self.name):
            write_atomically(self.path.with_suffix(suffix), data)

    def sizes(self, folder: str) -> dict[str, int]:
        root = self.path / folder
        return {str(file.relative_to(root)): file.stat().st_size for file in root.rglob("*") if file.is_file()}

    def free_bytes(self) -> int | None:
        parent = next(folder for folder in self.path.absolute().parents if folder.exists())
        return shutil.disk_usage(parent).free

    def sweep(self, before: float) -> None:
        beside = self.path.parent.glob(f".{self.path.name}.*.partial")
        for left in (*beside, *self.path.rglob("*.partial")):
            with suppress(FileNotFoundError):  # another launch may sweep, too
                if left.stat().st_mtime < before:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()


class Bucket:
    """A prefix in a bucket."""

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        try:
            self.objects: ObjectStore = from_url(self.name)
            self._beside: ObjectStore = from_url(self.name.rpartition("/")[0])
        except (BaseError, ValueError) as error:
            raise DataError(
                f"{self.name}: expected the address of a bucket, found: {first_line(error)}; check it"
            ) from None

    def exists(self) -> bool:
        with _reaching(self.name):
            try:
                obstore.head(self.objects, ROOT)
            except FileNotFoundError:
                return False
        return True

    def create(self, files: Mapping[str, bytes]) -> bool:
        if self.exists():
            return False
        with writing(self.name):
            for name, data in files.items():
                if name != ROOT:
                    obstore.put(self.objects, name, data)
            try:
                obstore.put(self.objects, ROOT, files[ROOT], mode="create")
            except AlreadyExistsError:
                return False
        return True

    def write_beside(self, suffix: str, data: bytes) -> None:
        stem = self.name.rpartition("/")[2].partition(".")[0]
        with writing(self.name):
            obstore.put(self._beside, f"{stem}{suffix}", data)

    def sizes(self, folder: str) -> dict[str, int]:
        prefix = f"{folder}/"
        with _reaching(self.name):
            batches = obstore.list(self.objects, prefix)  # pyright: ignore[reportUnknownMemberType]
            objects = [meta for batch in batches for meta in batch]
        return {str(meta["path"]).removeprefix(prefix): int(meta["size"]) for meta in objects}

    def free_bytes(self) -> int | None:
        return None

    def sweep(self, before: float) -> None:
        """Nothing: an object appears whole."""


def locate(address: str | Path) -> Location:
    """The location of a store.

    Args:
        address: A path, s3://bucket/path or gs://bucket/path.

    Raises:
        DataError: For an address of another kind, and one that names no bucket.
    """
    name = str(address)
    if name.startswith(SCHEMES):
        return Bucket(name)
    if "://" in name:
        raise DataError(f"{name}: expected a path or an address with {' or '.join(SCHEMES)}, found another; check it")
    return Folder(Path(address))


@contextmanager
def writing(where: str) -> Generator[None]:
    """What the disk or the bucket reports, as this project's error."""
    try:
        yield
    except (OSError, BaseError) as error:
        raise DataError(
            f"{where}: expected to write, found: {first_line(error)}; make room or check permissions, then run again: "
            "finished blocks are kept"
        ) from error


@contextmanager
def _reaching(where: str) -> Generator[None]:
    try:
        yield
    except BaseError as error:
        raise DataError(f"cannot reach {where}: {first_line(error)}; check the address and the credentials") from error


def first_line(error: Exception) -> str:
    """What an error of obstore says, without its debug output."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
