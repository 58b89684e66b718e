"""Rendered views: what Pillow gives, several of an image at once, erased, scaled and mixed."""

import io

import numpy as np
import pytest
import torch
from helpers.small_loaders import CPU, RECIPE, RICH, SIZE, make, pixels
from helpers.small_packs import jpeg
from PIL import Image

from softshard.pipeline.images.beton import Beton
from softshard.pipeline.recipes.recipe import (
    CropRecipe,
    MixRecipe,
    RandomErasingRecipe,
    ViewRecipe,
)
from softshard.pipeline.views.geometry import CENTER, view_geometry
from softshard.pipeline.views.loader import ViewLoader
from softshard.pipeline.views.parameters import MEAN_COLOR, view_parameters
from softshard.pipeline.views.render import find_partners


@pytest.mark.parametrize("size", [SIZE, 300])
@pytest.mark.parametrize("view", [0, 1, 2, CENTER])
def test_views_are_what_pillow_gives(photos: Beton, size: int, view: int) -> None:
    """Bit for bit: decoded, cropped, resized (along the columns first) and flipped by Pillow."""
    [batch] = ViewLoader(photos, RECIPE, size, 64, 2, CPU).render(np.arange(len(photos)), view)
    parameters = view_parameters(RECIPE)
    for row, rendered in enumerate(batch.images.permute(0, 2, 3, 1).numpy()):
        geometry = view_geometry(parameters, photos.keys[row], view, photos.heights[row], photos.widths[row])
        top, left, height, width, flip = map(int, geometry)
        image = Image.open(io.BytesIO(jpeg(photos, row))).convert("RGB")
        crop = image.crop((left, top, left + width, top + height)).resize((width, size), Image.Resampling.BILINEAR)
        wanted = crop.resize((size, size), Image.Resampling.BILINEAR)
        assert np.array_equal(rendered, np.asarray(wanted)[:, :: -1 if flip else 1])


def test_a_view_at_another_size_shows_the_same_part(photos: Beton) -> None:
    row = np.array([int(np.argmax(photos.heights * photos.widths))])
    recipe = ViewRecipe(seed=0, count=1, crop=CropRecipe(scale=(0.3, 0.6)))
    [small], [large] = (ViewLoader(photos, recipe, size, 1, 1, CPU).render(row, 0) for size in (32, 96))
    shrunk = large.images.float().unflatten(3, (32, 3)).unflatten(2, (32, 3)).mean(dim=(3, 5))
    assert (shrunk - small.images).abs().mean() < 4


@pytest.mark.parametrize("views", [RECIPE, RICH, RICH.model_copy(update={"dct_scaling": True})])
@pytest.mark.parametrize("count", [1, 5])
def test_several_views_are_what_each_alone_is(photos: Beton, views: ViewRecipe, count: int) -> None:
    loader, rows = make(photos, views=views), np.arange(len(photos))
    numbers = np.random.default_rng(0).integers(0, 8, (len(rows), count))
    several = [batch._replace(images=batch.images.clone()) for batch in loader.render(rows, numbers)]
    assert several[0].images.shape == (16, count, 3, SIZE, SIZE)
    images = torch.cat([batch.images for batch in several])
    for g in range(count):
        alone = [batch._replace(images=batch.images.clone()) for batch in loader.render(rows, numbers[:, g])]
        assert torch.equal(images[:, g], torch.cat([batch.images for batch in alone]))
        for batch, whole in zip(alone, several, strict=True):
            assert torch.equal(batch.labels, whole.labels)
            assert (batch.mixed is None) == (whole.mixed is None) == (not views.mixes)
            if batch.mixed and whole.mixed:
                assert torch.equal(batch.mixed.labels, whole.mixed.labels[:, g])
                assert torch.equal(batch.mixed.lam, whole.mixed.lam[:, g])


@pytest.mark.parametrize("batch_size", [1, 7, 10_000])
@pytest.mark.parametrize("workers", [1, 2])
def test_operations_do_not_depend_on_batches_workers_and_order(digits, batch_size: int, workers: int) -> None:
    rows, order = np.arange(len(digits)), np.random.default_rng(1).permutation(len(digits))
    expected = pixels(make(digits, views=RICH), rows, 3)
    assert torch.equal(pixels(make(digits, batch_size, workers, RICH), rows[order], 3), expected[order])


def test_a_view_that_erases_differs_from_one_that_does_not_only_in_its_boxes(photos: Beton) -> None:
    plain = ViewRecipe(seed=5, count=8)
    erasing = RandomErasingRecipe(probability=1.0, area=(0.2, 0.2), aspect=(1.0, 1.0), mode="const")
    rows = np.arange(len(photos))
    before, after = (
        pixels(make(photos, views=views), rows, 0)
        for views in (plain, plain.model_copy(update={"random_erasing": erasing}))
    )
    side = round(SIZE * 0.2**0.5)
    color = torch.tensor(MEAN_COLOR)[:, None, None]
    for one, other in zip(before, after, strict=True):
        changed = (one != other).any(dim=0)
        assert 0 < changed.sum() <= side * side
        assert torch.equal(other[:, changed], color.expand(3, SIZE, SIZE)[:, changed].to(torch.uint8))


def test_dct_scaling_changes_large_crops_alone_and_only_a_little(photos: Beton) -> None:
    whole = ViewRecipe(seed=1, count=1, crop=CropRecipe(scale=(1.0, 1.0)), hflip=0.0)
    rows = np.arange(len(photos))
    plain = pixels(make(photos, views=whole), rows, 0).float()
    scaled = pixels(make(photos, views=whole.model_copy(update={"dct_scaling": True})), rows, 0).float()
    geometry = [
        view_geometry(view_parameters(whole), key, 0, height, width)
        for key, height, width in zip(photos.keys, photos.heights, photos.widths, strict=True)
    ]
    large = torch.tensor([min(box[2], box[3]) >= 2 * SIZE for box in geometry])
    difference = (plain - scaled).abs().mean(dim=(1, 2, 3))
    assert 2 <= large.sum() < len(rows)
    assert difference[~large].max() == 0
    assert 0 < difference[large].max() < 5


@pytest.mark.parametrize("only", ["mixup", "cutmix"])
def test_mixing_is_what_the_shares_say(digits: Beton, only: str) -> None:
    """The mixed view from the two views alone: a blend, or pixels of one or the other."""
    mix, rows = MixRecipe(alpha=1.0), np.arange(len(digits))
    plain, views = ViewRecipe(seed=2, count=2), ViewRecipe.model_validate({"seed": 2, "count": 2, only: mix})
    own = pixels(make(digits, views=plain), rows, 1).float()
    partners = find_partners(view_parameters(views), digits.keys, np.argsort(digits.keys), np.ones((len(rows), 1), int))
    others = pixels(make(digits, views=plain), partners[:, 0], 1).float()
    start = 0
    for batch in make(digits, views=views).render(rows, 1):
        part = slice(start, start + len(batch.rows))
        start += len(batch.rows)
        assert batch.mixed is not None
        assert batch.mixed.lam.dtype == torch.float32
        assert torch.equal(batch.mixed.labels, torch.from_numpy(digits.labels[partners[part, 0]]))
        lam = batch.mixed.lam[:, None, None, None]
        images = batch.images.float()
        if only == "mixup":
            assert (images - lam * own[part] - (1 - lam) * others[part]).abs().max() <= 0.51
        else:
            taken = (images != own[part]).any(dim=1)
            assert torch.where(taken[:, None], images == others[part], images == own[part]).all()
            assert (taken.float().mean(dim=(1, 2)) <= 1 - batch.mixed.lam + 1e-5).all()


def test_partners_do_not_depend_on_the_order_of_the_rows(digits: Beton) -> None:
    parameters, views = view_parameters(RICH), np.ones((len(digits), 1), np.int64)
    shuffled = np.random.default_rng(0).permutation(len(digits))
    rows = find_partners(parameters, digits.keys, np.argsort(digits.keys), views)[:, 0]
    keys = digits.keys[shuffled]
    other = find_partners(parameters, keys, np.argsort(keys), views)[:, 0]
    assert 20 < (rows >= 0).sum() < 180
    assert np.array_equal(np.where(other < 0, 0, keys[other]), np.where(rows < 0, 0, digits.keys[rows])[shuffled])
