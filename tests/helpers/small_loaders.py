"""What tests of rendering lam: loaders of the smallest useful size, and the pixels that they give."""

import numpy as np
import torch

from softshard.pipeline.images.beton import Beton
from softshard.pipeline.recipes.recipe import (
    ColorJitterRecipe,
    MixRecipe,
    RandAugmentRecipe,
    RandomErasingRecipe,
    ViewRecipe,
)
from softshard.pipeline.views.loader import ViewLoader

CPU = torch.device("cpu")
SIZE = 24
RECIPE = ViewRecipe(seed=1, count=8)
RICH = ViewRecipe(
    seed=5,
    count=8,
    rand_augment=RandAugmentRecipe(),
    random_erasing=RandomErasingRecipe(),
    color_jitter=ColorJitterRecipe(hue=0.1),
    mixup=MixRecipe(alpha=0.4, probability=0.5),
    cutmix=MixRecipe(probability=0.5),
)


def make(beton: Beton, batch_size: int = 16, workers: int = 2, views: ViewRecipe | None = RECIPE) -> ViewLoader:
    return ViewLoader(beton, views, SIZE, batch_size, workers, CPU)


def pixels(loader: ViewLoader, rows: np.ndarray, views: np.ndarray | int) -> torch.Tensor:
    return torch.cat([batch.images.clone() for batch in loader.render(rows, views)])
