"""View recipes as numbers for compiled code."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softshard.pipeline.recipes.recipe import POLICIES, ColorJitterRecipe, MixRecipe, RandomErasingRecipe, ViewRecipe
from softshard.pipeline.views.kernels.rng import ONE, QUANTILES, beta_quantiles, fixed, normal_quantiles, sqrt_aspects

MEAN_COLOR = (124, 116, 104)  # of ImageNet: what lies outside a moved image, and what erases
DEVIATION = (58, 57, 57)


class ViewParameters(NamedTuple):
    """Fractions and levels are multiples of 1 / ONE. What a recipe leaves out has probability or strength 0."""

    seed: np.uint64
    random_crop: np.int64
    scale_low: np.int64
    scale_high: np.int64
    ratio_low: np.int64
    ratio_high: np.int64
    sqrt_aspect: NDArray[np.int64]
    flip: np.int64
    center: np.int64
    dct_scaling: np.int64
    policy: np.int64
    operations: np.int64
    probability: np.int64
    magnitude: np.int64
    deviation: np.int64
    increasing: np.int64
    normal: NDArray[np.int64]
    bins: np.int64
    jitter: NDArray[np.int64]
    erase: np.int64
    erase_low: np.int64
    erase_high: np.int64
    erase_aspect: NDArray[np.int64]
    erase_count: np.int64
    erase_noise: np.int64
    noise: NDArray[np.uint8]
    mixup: np.int64
    mixup_lams: NDArray[np.int64]
    cutmix: np.int64
    cutmix_lams: NDArray[np.int64]


def view_parameters(views: ViewRecipe | None, center: float = 1.0) -> ViewParameters:
    """Numbers of a recipe. `center` is the side of the center crop as a fraction of the shorter side of the image;
    without a recipe only the center view can be rendered."""
    recipe = views or ViewRecipe(seed=0, count=1, crop=None, hflip=0.0)
    crop, rand = recipe.crop, recipe.rand_augment
    scale, ratio = (crop.scale, crop.ratio) if crop else ((1.0, 1.0), (1.0, 1.0))
    erasing = recipe.random_erasing or RandomErasingRecipe(probability=0.0)
    normal = normal_quantiles()
    return ViewParameters(
        seed=np.uint64(recipe.seed),
        random_crop=np.int64(crop is not None),
        scale_low=fixed(scale[0]),
        scale_high=fixed(scale[1]),
        ratio_low=fixed(ratio[0]),
        ratio_high=fixed(ratio[1]),
        sqrt_aspect=sqrt_aspects(*ratio),
        flip=fixed(recipe.hflip),
        center=fixed(center),
        dct_scaling=np.int64(recipe.dct_scaling),
        policy=np.int64(sum(n for n, name in enumerate(POLICIES, 1) if getattr(recipe, name) is not None)),
        operations=np.int64(rand.operations if rand else 0),
        probability=fixed(rand.probability if rand else 0.0),
        magnitude=fixed(rand.magnitude if rand else 0.0),
        deviation=fixed(rand.std if rand else 0.0),
        increasing=np.int64(rand is not None and rand.increasing),
        normal=normal,
        bins=np.int64(recipe.trivial_augment.bins if recipe.trivial_augment else 2),
        jitter=_jitter(recipe),
        erase=fixed(erasing.probability),
        erase_low=fixed(erasing.area[0]),
        erase_high=fixed(erasing.area[1]),
        erase_aspect=sqrt_aspects(*erasing.aspect),
        erase_count=np.int64(erasing.count),
        erase_noise=np.int64(erasing.mode == "pixel"),
        noise=_noise(normal),
        mixup=_probability(recipe.mixup),
        mixup_lams=_lams(recipe.mixup),
        cutmix=_probability(recipe.cutmix),
        cutmix_lams=_lams(recipe.cutmix),
    )


def center_fraction(size: int, crop_pct: float) -> float:
    """timm's evaluation: the shorter side becomes floor(size / crop_pct), of which the center `size` are kept."""
    return size / math.floor(size / crop_pct)


def _jitter(recipe: ViewRecipe) -> NDArray[np.int64]:
    """Strengths of brightness, contrast, saturation and hue."""
    if recipe.three_augment:
        strength = recipe.three_augment.jitter
        jitter = ColorJitterRecipe(brightness=strength, contrast=strength, saturation=strength)
    else:
        jitter = recipe.color_jitter or ColorJitterRecipe(brightness=0.0, contrast=0.0, saturation=0.0)
    return np.array([fixed(s) for s in (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)])


def _noise(normal: NDArray[np.int64]) -> NDArray[np.uint8]:
    """For each channel the quantiles of its mean and deviation, in steps of pixels: uint8 [3, QUANTILES]."""
    colors = np.outer(DEVIATION, normal) + np.outer(MEAN_COLOR, np.full(QUANTILES, ONE))
    return ((colors + ONE // 2) // ONE).clip(0, 255).astype(np.uint8)


def _probability(mix: MixRecipe | None) -> np.int64:
    """-1 when it is off: of two that are on, a coin decides which one may act."""
    return fixed(mix.probability) if mix else np.int64(-1)


def _lams(mix: MixRecipe | None) -> NDArray[np.int64]:
    return beta_quantiles(mix.alpha) if mix else np.full(QUANTILES, ONE)
