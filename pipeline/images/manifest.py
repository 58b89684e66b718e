"""Manifests: what a packed file or a store is, for the checks that guard its use."""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, ValidationError, model_validator

from softshard.pipeline.images.jpeg import jpeg_version
from softshard.pipeline.recipes.recipe import Model, PackRecipe, Precision, TemplateRecipe, ViewRecipe
from softshard.pipeline.runtime.errors import DataError, FormatError

LIBRARIES = ("ffcv", "numba", "numpy", "pillow", "timm", "torch", "zarr")
THUMBNAIL = 8  # pixels a side
MOST_LISTED = 5
M = TypeVar("M", bound=Model)

Crc32 = Annotated[int, Field(ge=0, lt=2**32)]


class PackManifest(Model):
    """Stands beside a .beton as NAME.manifest.json. keys, crc32 and sizes have one entry for each row, in row order.

    Each crc32 is that of the row's JPEG, tables_crc32 that of everything else that is read from the .beton.
    `converted` counts the images whose bytes were not kept, by reason (pack.py lists the reasons).
    """

    format: Literal["softshard-beton"] = "softshard-beton"
    version: Literal[1] = 1
    recipe: PackRecipe
    beton_bytes: int
    tables_crc32: Crc32
    classes: tuple[str, ...]
    keys: tuple[str, ...] = Field(min_length=1)
    crc32: tuple[Crc32, ...]
    sizes: tuple[Annotated[int, Field(ge=1, lt=2**32)], ...]
    converted: dict[str, Annotated[int, Field(ge=1)]]
    skipped: tuple[str, ...]
    libraries: dict[str, str]

    @model_validator(mode="after")
    def _one_entry_a_row(self) -> "PackManifest":
        if not len(self.keys) == len(self.crc32) == len(self.sizes):
            raise ValueError("keys, crc32 and sizes differ in length")
        return self


class TeacherRecord(Model):
    """`interpolation` is what the teacher was trained with; views are always bilinear."""

    model: str
    library: str
    weights_digest: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    weight: float


def _thumbnail_bytes(text: str) -> str:
    expected = THUMBNAIL * THUMBNAIL * 3
    if len(base64.b64decode(text, validate=True)) != expected:
        raise ValueError(f"expected {expected} bytes in base64")
    return text


class Probe(Model):
    """A rendered view: BLAKE2b, 8 bytes, of its uint8 [S, S, 3], and that as 8 x 8 pixels, RGB, in base64."""

    key: str
    view: int = Field(ge=0)
    size: int = Field(ge=1)
    digest: str
    thumbnail: Annotated[str, AfterValidator(_thumbnail_bytes)]


class StoreManifest(Model):
    """The attributes of a store's root group: everything its codes depend on."""

    format: Literal["softshard-labels"] = "softshard-labels"
    version: Literal[1] = 1
    samples: int = Field(ge=1)
    classes: int = Field(ge=2)
    top_k: int = Field(ge=1)
    block_rows: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    class_list_digest: str
    views: ViewRecipe
    teachers: tuple[TeacherRecord, ...]
    ensemble: str
    flip_average: bool
    template: TemplateRecipe | None
    precision: Precision
    channels_last: bool
    compile: bool
    probes: tuple[Probe, ...]
    libraries: dict[str, str]


def key_digest(key: str) -> int:
    """The 64-bit digest of a sample's key: BLAKE2b with 8 bytes, read as a little-endian integer."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def key_digests(keys: Sequence[str]) -> NDArray[np.uint64]:
    """Digests of all keys, uint64 [N]. Raises DataError when a key stands twice or two keys collide."""
    try:
        digests = np.fromiter((key_digest(key) for key in keys), np.uint64, len(keys))
    except UnicodeEncodeError as error:
        raise DataError(f"keys: expected file names in UTF-8, found {error.object!r}; rename it") from None
    order = np.argsort(digests, kind="stable")
    again = np.flatnonzero(digests[order[1:]] == digests[order[:-1]])
    if len(again):
        first, second = (keys[int(row)] for row in order[again[0] : again[0] + 2])
        what = f"the key {first!r} twice" if first == second else f"the keys {first!r} and {second!r} with one digest"
        raise DataError(
            f"keys: expected a different 64-bit digest for each sample, found {what} ({len(again)} such pairs); "
            "rename or remove one of the two images"
        )
    return digests


def match_keys(keys: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each wanted key digest its place among `keys`, -1 where it is none of them: int64, as long as `wanted`."""
    order = np.argsort(keys)
    place = order[np.searchsorted(keys, wanted, sorter=order).clip(max=len(order) - 1)]
    return np.where(keys[place] == wanted, place, -1)


def sealed(manifest: Model) -> dict[str, Any]:
    """A manifest as plain data with its digest, which makes a changed character noticed."""
    document = manifest.model_dump(mode="json")
    return document | {"digest": document_digest(document)}


def load_sealed(model: type[M], text: bytes, where: str, remedy: str) -> M:
    """The manifest in a file that holds what `sealed` made as JSON. Raises FormatError as `parse_sealed` does."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise FormatError(f"{where}: expected a manifest of version 1, found: {error}; {remedy}") from None
    if not isinstance(document, dict):
        raise FormatError(f"{where}: expected a manifest of version 1, found: a {type(document).__name__}; {remedy}")
    return parse_sealed(model, document, where, remedy)


def parse_sealed(model: type[M], document: dict[str, Any], where: str, remedy: str) -> M:
    """The manifest in plain data that `sealed` made. Raises FormatError when it was changed or has other keys."""
    content = {name: value for name, value in document.items() if name != "digest"}
    try:
        # through JSON, where a list is a legal tuple and types stay strict
        manifest = model.model_validate_json(json.dumps(content))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors(include_url=False)[:MOST_LISTED]
        ]
        raise FormatError(
            f"{where}: expected a manifest of version 1, found problems: {'; '.join(problems)}; {remedy}"
        ) from None
    expected, found = document.get("digest"), document_digest(content)
    if found != expected:
        raise FormatError(
            f"{where}: expected a manifest with digest {expected}, found {found}: it was damaged or edited; {remedy}"
        )
    return manifest


def document_digest(document: dict[str, Any]) -> str:
    """BLAKE2b, 8 bytes, in hexadecimal, of the data as JSON with sorted keys, no spaces and nothing but ASCII."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def text_digest(lines: Sequence[str]) -> str:
    """One digest for an ordered list of names (the class list)."""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def array_digest(*arrays: NDArray[Any]) -> int:
    """BLAKE2b, 8 bytes, over the raw bytes of C-contiguous arrays, one after the other; never 0."""
    state = hashlib.blake2b(digest_size=8)
    for array in arrays:
        state.update(np.ascontiguousarray(array).data)
    return int.from_bytes(state.digest(), "little") or 1


def library_versions() -> dict[str, str]:
    return {"libjpeg-turbo": jpeg_version(), **{name: version(name) for name in LIBRARIES}}
