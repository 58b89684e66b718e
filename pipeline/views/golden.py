"""Golden probes: a few rendered views in a store's manifest, to notice that pixels are no longer what was labeled.

Everything about a view is fixed in this package but for the JPEG decoder, which is the system's.
"""

import base64
import hashlib
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from softshard.pipeline.images.beton import Beton
from softshard.pipeline.images.manifest import THUMBNAIL, Probe, StoreManifest, library_versions
from softshard.pipeline.recipes.recipe import ViewRecipe
from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.views.loader import ViewLoader

COUNT = 32
LARGEST_DIFFERENCE = 1.0  # of 255, on average over the thumbnails


def make_probes(beton: Beton, views: ViewRecipe, size: int) -> tuple[Probe, ...]:
    """Probes of up to COUNT images, evenly spaced in the file, in views that are evenly spaced as well."""
    count = min(COUNT, len(beton))
    rows, numbers = (np.arange(count) * length // count for length in (len(beton), views.count))
    keys = beton.manifest.keys
    return tuple(
        Probe(
            key=keys[row],
            view=int(view),
            size=size,
            digest=_digest(pixels),
            thumbnail=base64.b64encode(_thumbnail(pixels).tobytes()).decode(),
        )
        for row, view, pixels in zip(rows, numbers, _render(beton, views, rows, numbers, size), strict=True)
    )


def check_probes(beton: Beton, manifest: StoreManifest, where: str) -> None:
    """Render the probes of a store's manifest again from a .beton, which may hold a part of the images.

    Warns when pixels differ by less than LARGEST_DIFFERENCE on average, or when none of the probes' images is there;
    raises DataError when they differ by more. Both name the libraries that differ.
    """
    wanted = {probe.key for probe in manifest.probes}
    row_of = {key: row for row, key in enumerate(beton.manifest.keys) if key in wanted}
    probes = [probe for probe in manifest.probes if probe.key in row_of]
    if not probes:
        warnings.warn(
            f"{where}: expected some of its {len(manifest.probes)} golden probes among the images of {beton.path}, "
            "found none; whether pixels are those that were labeled is not checked",
            stacklevel=2,
        )
        return
    rows, views = np.array([row_of[probe.key] for probe in probes]), np.array([probe.view for probe in probes])
    rendered = _render(beton, manifest.views, rows, views, probes[0].size)
    pairs = list(zip(probes, rendered, strict=True))
    changed = [probe for probe, pixels in pairs if _digest(pixels) != probe.digest]
    if not changed:
        return
    mean = float(np.mean([np.abs(_thumbnail(pixels).astype(int) - _recorded(probe)).mean() for probe, pixels in pairs]))
    message = (
        f"{where}: expected the pixels that were labeled, found others in {len(changed)} of {len(probes)} golden "
        f"probes, such as view {changed[0].view} of {changed[0].key}; they differ by {mean:.3f} of 255 on average; "
        f"{_libraries(manifest)}"
    )
    if mean >= LARGEST_DIFFERENCE:
        raise DataError(f"{message}; use the libraries that labeled it, or label again")
    warnings.warn(message, stacklevel=2)


def _render(
    beton: Beton, views: ViewRecipe, rows: NDArray[np.int64], numbers: NDArray[np.int64], size: int
) -> NDArray[np.uint8]:
    """uint8 [N, S, S, 3]."""
    loader = ViewLoader(beton, views, size, len(rows), 1, torch.device("cpu"))
    [images] = [batch.images.permute(0, 2, 3, 1).numpy().copy() for batch in loader.render(rows, numbers)]
    return images


def _digest(pixels: NDArray[np.uint8]) -> str:
    return hashlib.blake2b(pixels.tobytes(), digest_size=8).hexdigest()


def _thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def _recorded(probe: Probe) -> NDArray[np.uint8]:
    return np.frombuffer(base64.b64decode(probe.thumbnail), np.uint8).reshape(THUMBNAIL, THUMBNAIL, 3)


def _libraries(manifest: StoreManifest) -> str:
    here = library_versions()
    names = [name for name in here if manifest.libraries.get(name) != here[name]]
    different = ", ".join(f"{name} {manifest.libraries.get(name)} then and {here[name]} now" for name in names)
    return different or "the libraries are the same, so the processor or the code of this project differs"
