"""What the loader hands to labeling and training; known without FFCV, which makes it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Mixed(NamedTuple):
    """labels: int64, those of the images that were mixed in; lam: float32, what is left of the images themselves
    (1 where nothing was mixed in). Both are [B] or [B, G], on the loader's device."""

    labels: Tensor
    lam: Tensor


class Batch(NamedTuple):
    """images: uint8 [B, 3, S, S] (channels_last), or [B, G, 3, S, S] for G views of each image; labels: int64 [B];
    both on the loader's device; rows: int64 [B]; mixed: None unless the recipe mixes.

    On the CPU `images` is the loader's own memory: valid until the next batch is asked for.
    """

    images: Tensor
    rows: NDArray[np.int64]
    labels: Tensor
    mixed: Mixed | None
