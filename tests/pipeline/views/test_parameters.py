"""Recipes as numbers: every value arrives where it belongs, and what is left out is off."""

import numpy as np
import pytest
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from softshard.pipeline.recipes.recipe import (
    AutoAugmentRecipe,
    ColorJitterRecipe,
    CropRecipe,
    MixRecipe,
    RandAugmentRecipe,
    RandomErasingRecipe,
    ThreeAugmentRecipe,
    TrivialAugmentRecipe,
    ViewRecipe,
)
from softshard.pipeline.views import policies
from softshard.pipeline.views.kernels.rng import ONE, beta_quantiles, normal_quantiles, sqrt_aspects
from softshard.pipeline.views.parameters import DEVIATION, MEAN_COLOR, ViewParameters, center_fraction, view_parameters


def parameters_of(**parts) -> ViewParameters:
    return view_parameters(ViewRecipe(seed=2**64 - 1, count=1, **parts))


def test_colors_are_imagenets() -> None:
    assert tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN) == MEAN_COLOR
    assert tuple(round(255 * deviation) for deviation in IMAGENET_DEFAULT_STD) == DEVIATION


def test_a_full_recipe_arrives() -> None:
    erasing = RandomErasingRecipe(probability=0.5, area=(0.125, 0.25), aspect=(0.25, 4.0), count=5, mode="const")
    p = parameters_of(
        crop=CropRecipe(scale=(0.25, 0.5), ratio=(0.5, 2.0)),
        hflip=0.125,
        rand_augment=RandAugmentRecipe(magnitude=7.5, std=0.25, increasing=True, operations=3, probability=0.75),
        color_jitter=ColorJitterRecipe(brightness=0.5, contrast=0.25, saturation=0.125, hue=0.0625),
        random_erasing=erasing,
        mixup=MixRecipe(alpha=0.2, probability=0.25),
        cutmix=MixRecipe(alpha=4.0, probability=0.75),
        dct_scaling=True,
    )
    numbers = {name: int(value) for name, value in p._asdict().items() if np.ndim(value) == 0}
    assert numbers == {
        "seed": 2**64 - 1, "random_crop": 1, "scale_low": ONE // 4, "scale_high": ONE // 2, "ratio_low": ONE // 2,
        "ratio_high": 2 * ONE, "flip": ONE // 8, "center": ONE, "dct_scaling": 1, "policy": policies.RAND,
        "operations": 3, "probability": ONE * 3 // 4, "magnitude": ONE * 15 // 2, "deviation": ONE // 4,
        "increasing": 1, "bins": 2, "erase": ONE // 2, "erase_low": ONE // 8, "erase_high": ONE // 4, "erase_count": 5,
        "erase_noise": 0, "mixup": ONE // 4, "cutmix": ONE * 3 // 4,
    }  # fmt: skip
    assert p.jitter.tolist() == [ONE // 2, ONE // 4, ONE // 8, ONE // 16]
    for found, expected in (
        (p.sqrt_aspect, sqrt_aspects(0.5, 2.0)),
        (p.erase_aspect, sqrt_aspects(0.25, 4.0)),
        (p.normal, normal_quantiles()),
        (p.mixup_lams, beta_quantiles(0.2)),
        (p.cutmix_lams, beta_quantiles(4.0)),
    ):
        np.testing.assert_array_equal(found, expected)


def test_what_a_recipe_leaves_out_is_off() -> None:
    p = parameters_of(crop=None, hflip=0.0)
    off = ("random_crop", "flip", "policy", "operations", "probability", "erase", "dct_scaling")
    assert [int(getattr(p, name)) for name in off] == [0] * len(off)
    assert (p.mixup, p.cutmix) == (-1, -1)
    assert not p.jitter.any()


@pytest.mark.parametrize(
    ("name", "recipe", "policy"),
    [
        ("rand_augment", RandAugmentRecipe(), policies.RAND),
        ("auto_augment", AutoAugmentRecipe(), policies.AUTO),
        ("trivial_augment", TrivialAugmentRecipe(bins=17), policies.TRIVIAL),
        ("three_augment", ThreeAugmentRecipe(), policies.THREE),
    ],
)
def test_each_policy_has_its_number(name: str, recipe, policy: int) -> None:
    p = parameters_of(**{name: recipe})
    assert p.policy == policy
    assert p.bins == (17 if name == "trivial_augment" else 2)


def test_three_augments_jitter_leaves_the_hue() -> None:
    jitter = parameters_of(three_augment=ThreeAugmentRecipe(jitter=0.25)).jitter
    assert jitter.tolist() == [ONE // 4, ONE // 4, ONE // 4, 0]


def test_timms_default_erases_with_noise() -> None:
    p = parameters_of(random_erasing=RandomErasingRecipe())
    assert (p.erase, p.erase_count, p.erase_noise) == (ONE // 4, 1, 1)


def test_parameters_have_the_same_types_whatever_the_recipe() -> None:
    """So that compiled code is compiled once."""
    recipes = [{}, {"crop": None}, {"rand_augment": RandAugmentRecipe()}, {"mixup": MixRecipe(alpha=0.3)}]
    kinds = {tuple((np.asarray(value).dtype.str, np.ndim(value)) for value in parameters_of(**r)) for r in recipes}
    kinds.add(tuple((np.asarray(value).dtype.str, np.ndim(value)) for value in view_parameters(None, 0.875)))
    assert len(kinds) == 1


def test_without_a_recipe_the_center_is_all_there_is() -> None:
    p = view_parameters(None, 0.875)
    assert (p.center, p.random_crop, p.flip, p.policy, p.erase, p.mixup, p.cutmix) == (ONE * 7 // 8, 0, 0, 0, 0, -1, -1)


def test_the_centers_fraction_is_timms() -> None:
    assert center_fraction(224, 0.875) == 224 / 256
    assert center_fraction(224, 0.9) == 224 / 248
    assert center_fraction(288, 1.0) == 1
