"""Contact sheets: the loader's own pixels, and words that say how to make them."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_packs import jpeg
from PIL import Image, ImageFont

from softshard.pipeline.__main__ import main
from softshard.pipeline.images.beton import Beton
from softshard.pipeline.recipes.recipe import (
    ColorJitterRecipe,
    MixRecipe,
    RandAugmentRecipe,
    RandomErasingRecipe,
    ThreeAugmentRecipe,
    TrivialAugmentRecipe,
    ViewRecipe,
)
from softshard.pipeline.runtime.errors import RecipeError
from softshard.pipeline.views import mixing, policies
from softshard.pipeline.views.contact_sheet import (
    COLUMN,
    GAP,
    MARGIN,
    PAPER,
    RULE,
    Tile,
    draw_sheet,
    find_rows,
    render_tiles,
    view_ranges,
    wrap,
)
from softshard.pipeline.views.describe import ViewDescription, describe_view, operation_in_words
from softshard.pipeline.views.kernels import color, spatial
from softshard.pipeline.views.kernels.rng import ONE
from softshard.pipeline.views.loader import ViewLoader
from softshard.pipeline.views.parameters import MEAN_COLOR, view_parameters
from softshard.pipeline.views.render import LAM_BITS, operate

SIZE = 40
RECIPES = {
    "crop": {},
    "RandAugment": {
        "rand_augment": RandAugmentRecipe(operations=4, probability=1.0),
        "color_jitter": ColorJitterRecipe(hue=0.3),
        "random_erasing": RandomErasingRecipe(probability=0.7, count=3, mode="const"),
    },
    "TrivialAugment": {"trivial_augment": TrivialAugmentRecipe(), "crop": None},
    "ThreeAugment": {"three_augment": ThreeAugmentRecipe(), "cutmix": MixRecipe(probability=0.5)},
    "mixing": {
        "mixup": MixRecipe(probability=0.8),
        "cutmix": MixRecipe(),
        "random_erasing": RandomErasingRecipe(mode="const"),
    },
}
LABEL = """
beton: {beton}
store: labels.zarr
classes: 2
views: {{seed: 3, count: 8, rand_augment: {{}}, mixup: {{probability: 0.5}}}}
teachers: [{{model: resnet18, size: {size}}}]
top_k: 1
"""


@pytest.fixture
def config(photos: Beton, tmp_path: Path) -> Path:
    path = tmp_path / "label.yaml"
    path.write_text(LABEL.format(beton=photos.path, size=SIZE))
    return path


def tiles_of(beton: Beton, views: ViewRecipe, rows: list[int], count: int) -> list[list[Tile]]:
    """The tiles of views 0 to count - 1."""
    return render_tiles(beton, views, rows, np.arange(count), SIZE, 2)


def render(
    config: Path, out: Path, keys: str = "temple/200x300.jpg,flower/17x301.jpg", views: str = "0-2", *rest
) -> int:
    return main(["render", "--config", str(config), "--keys", keys, "--views", views, "--out", str(out), *rest])


def replay(beton: Beton, row: int, explanation: ViewDescription, size: int) -> np.ndarray:
    """What an explanation says, without the loader: Pillow decodes, crops and resizes."""
    top, left, height, width = explanation.crop
    image = Image.open(io.BytesIO(jpeg(beton, row))).convert("RGB").crop((left, top, left + width, top + height))
    image = image.resize((width, size), Image.Resampling.BILINEAR).resize((size, size), Image.Resampling.BILINEAR)
    pixels, spare = np.array(image), np.empty((2, size, size, 3), np.uint8)
    if explanation.flip:
        pixels = pixels[:, ::-1].copy()
    for operation, argument in explanation.operations:
        operate(operation, argument, pixels, spare)
    for box in explanation.erased:
        color.fill(pixels, *box, MEAN_COLOR)
    return pixels


def mix(explanation: ViewDescription, lam: float, pixels: np.ndarray, other: np.ndarray) -> None:
    if explanation.kind == mixing.MIXUP:
        color.blend(pixels, other, int(lam * ONE) >> LAM_BITS)
    else:
        color.paste(pixels, other, *explanation.cut)


@pytest.mark.parametrize("name", RECIPES)
def test_pixels_are_what_the_explanation_says(photos: Beton, name: str) -> None:
    views = ViewRecipe(seed=5, count=8, **RECIPES[name])
    parameters = view_parameters(views)
    rows, seen = [0, 3, 9, 14], set()
    for row, tiles in zip(rows, tiles_of(photos, views, rows, 8), strict=True):
        for number, tile in enumerate(tiles):
            found = tile.explanation
            seen |= (
                {operation for operation, _ in found.operations} | {-1 - found.kind} | {("erased", len(found.erased))}
            )
            expected = replay(photos, row, found, SIZE)
            if found.partner >= 0:
                partner = describe_view(photos, parameters, found.partner, number, SIZE)
                mix(found, tile.lam, expected, replay(photos, found.partner, partner, SIZE))
            np.testing.assert_array_equal(tile.pixels, expected, f"view {number} of row {row}: {tile.words}")
    assert len(seen) >= {"crop": 2, "RandAugment": 15, "TrivialAugment": 10, "ThreeAugment": 8, "mixing": 5}[name]


def test_noise_is_where_the_explanation_says(photos: Beton) -> None:
    plain = ViewRecipe(seed=5, count=4)
    erasing = plain.model_copy(update={"random_erasing": RandomErasingRecipe(probability=1.0)})
    [before], [after] = (tiles_of(photos, views, [0], 4) for views in (plain, erasing))
    for old, new in zip(before, after, strict=True):
        [(top, left, height, width)] = new.explanation.erased
        changed = (old.pixels != new.pixels).any(axis=2)
        rows, columns = changed.any(axis=1).nonzero()[0], changed.any(axis=0).nonzero()[0]
        assert (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1) == (top, left, top + height, left + width)
        assert new.words == [*old.words, f"erased {width}x{height} at {left},{top}, noise"]


def test_small_scales_of_decoding_are_said(photos: Beton) -> None:
    views = ViewRecipe(seed=5, count=8, crop=None, dct_scaling=True)
    [tiles] = tiles_of(photos, views, find_rows(photos, ["temple/427x640.jpg"]), 2)
    assert [tile.explanation.denominator for tile in tiles] == [8, 8]
    assert tiles[0].words[:2] == ["crop 427x427 at 106,0 (67%)", "decoded at 1/8"]


@pytest.mark.parametrize(
    ("operation", "argument", "words"),
    [
        (policies.AUTO_CONTRAST, 0, "auto contrast"),
        (policies.ROTATE, -25 * spatial.DEGREE // 2, "rotate 12.5° clockwise"),
        (policies.POSTERIZE, 1, "posterize to 1 bit"),
        (policies.SOLARIZE, 128, "solarize from 128 up"),
        (policies.SOLARIZE_ADD, 60, "solarize add 60 below 128"),
        (policies.SHARPNESS, policies.FACTOR * 3 // 2, "sharpness x 1.50"),
        (policies.SHEAR_X, -ONE // 4, "shear x by -0.25"),
        (policies.TRANSLATE_X, ONE // 8, "translate x 12.5% of the side to the left"),
        (policies.TRANSLATE_Y, -ONE // 8, "translate y 12.5% of the side down"),
        (policies.BLUR, 2 << 10, "blur of radius 0.89% of the side"),
        (policies.HUE, 192, "hue by -90°"),
    ],
)
def test_operations_in_words(operation: int, argument: int, words: str) -> None:
    assert operation_in_words(operation, argument) == words


@pytest.mark.parametrize(
    ("operation", "argument", "row", "column"),
    [
        (policies.ROTATE, 90 * spatial.DEGREE, 2, 10),  # what was right is up: counter-clockwise
        (policies.TRANSLATE_X, ONE // 4, 10, 13),  # to the left
        (policies.TRANSLATE_Y, ONE // 4, 5, 18),  # up
    ],
)
def test_directions_in_words_are_those_of_the_pixels(operation: int, argument: int, row: int, column: int) -> None:
    image = np.zeros((21, 21, 3), np.uint8)
    image[10, 18] = 255
    operate(operation, argument, image, np.empty((2, 21, 21, 3), np.uint8))
    assert image[row, column].min() > 100


def test_the_sheet_shows_what_the_loader_renders(photos: Beton, config: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "sheet.png"
    assert (
        render(config, out, "temple/200x300.jpg,flower/17x301.jpg", "1,5-6", "--views.seed", "4", "--size", "50") == 0
    )
    assert capsys.readouterr().out == f"{out}: 3 views of 2 images, 50 x 50 pixels each\n"
    assert list(out.parent.iterdir()) == [out]
    views = ViewRecipe(
        seed=4, count=8, rand_augment=RandAugmentRecipe(), mixup=MixRecipe(probability=0.5)
    )  # fmt: skip
    loader = ViewLoader(photos, views, 50, 8, 1, torch.device("cpu"))
    sheet = np.array(Image.open(out))
    assert sheet.shape[1] == 3 * COLUMN + 2 * GAP + 2 * MARGIN
    rows, tops = find_rows(photos, ["temple/200x300.jpg", "flower/17x301.jpg"]), []
    for column, view in enumerate((1, 5, 6)):
        [images] = [batch.images.movedim(1, -1).numpy().copy() for batch in loader.render(np.array(rows), view)]
        tops.append([top_of(sheet, picture, MARGIN + column * (COLUMN + GAP)) for picture in images])
    assert tops[0] == tops[1] == tops[2]
    assert tops[0][1] - tops[0][0] > 50


def top_of(sheet: np.ndarray, picture: np.ndarray, left: int) -> int:
    size = len(picture)
    [top] = [y for y in range(len(sheet) - size) if (sheet[y : y + size, left : left + size] == picture).all()]
    return top


def test_the_teachers_size_is_taken(config: Path, tmp_path: Path, capsys) -> None:
    assert render(config, tmp_path / "sheet.PNG", "temple/8x8.jpg", "0") == 0
    assert f"{SIZE} x {SIZE} pixels" in capsys.readouterr().out


def test_keys_may_be_given_one_by_one(photos: Beton) -> None:
    assert find_rows(photos, ["temple/8x8.jpg", "flower/8x8.jpg"]) == find_rows(
        photos, ["temple/8x8.jpg,flower/8x8.jpg"]
    )


@pytest.mark.parametrize("size", [1, 60, 300])
@pytest.mark.parametrize("count", [1, 3])
def test_words_stay_in_their_place(photos: Beton, size: int, count: int) -> None:
    """Words run neither into the next column nor into a picture nor into the next row."""
    words = ["a line that is far too long for its column, so that it is broken", "m" * 200, "erased", "n/" * 90]
    explanation = describe_view(photos, view_parameters(ViewRecipe(seed=0, count=1)), 0, 0, size)
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    tiles = [
        [Tile(10**17, picture, explanation, 1.0, words[: row + column + 1]) for column in range(count)]
        for row in range(2)
    ]
    sheet = np.array(draw_sheet([("k" * 500, "class " + "c" * 90), ("\u6f22" * 80, "")], tiles))
    column = max(COLUMN, size)
    [rule, *none] = np.flatnonzero((sheet[:, MARGIN] == RULE).all(axis=1) & (sheet[:, -MARGIN] == RULE).all(axis=1))
    assert (sheet[rule, MARGIN:-MARGIN] == RULE).all()
    assert none == []
    margins = [
        sheet[:, : MARGIN - 2],
        sheet[:, sheet.shape[1] - MARGIN + 1 :],
        sheet[-GAP // 2 :],
        sheet[rule + 1 : rule + 4],
    ]
    assert all((margin == PAPER).all() for margin in margins)
    tops = [np.flatnonzero([(sheet[y : y + size, MARGIN : MARGIN + size] == picture).all() for y in part]) for part in
            (range(rule), range(rule, len(sheet) - size))]  # fmt: skip
    for start, found in zip((0, rule), tops, strict=True):
        for left in range(MARGIN, sheet.shape[1] - column, column + GAP):
            block = sheet[start + found[-1] :, left : left + size][:size]
            np.testing.assert_array_equal(block, picture)
            gap = sheet[start + found[-1] : rule if start == 0 else None, left + column : left + column + GAP]
            assert (gap == PAPER).all()


@pytest.mark.parametrize(
    "text", ["", "a", "one two  three", "a/b/" * 30 + "c d", "x" * 300, "/", "\u00fc\u6f22 \U0001f600"]
)
@pytest.mark.parametrize("width", [20, 100])
def test_lines_are_no_longer_than_they_may_be(text: str, width: int) -> None:
    font = ImageFont.load_default(12)
    lines = wrap(text, font, width)
    assert all(font.getlength(line) <= width for line in lines)
    written = text.encode("ascii", "backslashreplace").decode()
    assert "".join(lines).replace(" ", "") == written.replace(" ", "")


def test_view_ranges() -> None:
    assert view_ranges("0,3,5-6, 7 - 7 ", 8) == [range(1), range(3, 4), range(5, 7), range(7, 8)]
    assert view_ranges(f"0-{10**15}", 10**16) == [range(10**15 + 1)]
    with pytest.raises(RecipeError, match="from 0 to 2"):
        view_ranges("3", 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keys": "temple/8x9.jpg"}, ["--keys", "found 'temple/8x9.jpg'", "temple/8x8.jpg"]),
        ({"keys": "8x8.jpg"}, ["found '8x8.jpg'", "temple/8x8.jpg", "flower/8x8.jpg"]),
        ({"keys": "tempel/8x8.jpg,,flower/gray.JPEG"}, ["found 'tempel/8x8.jpg'", "temple/8x8.jpg", "found ''"]),
        ({"views": "0-8"}, ["--views: expected numbers from 0 to 7", "found 8"]),
        ({"views": "5-3"}, ["--views: expected ranges that go up", "3-5"]),
        ({"views": "1;2"}, ["--views: expected numbers and ranges", "'1;2'"]),
        ({"views": "-1"}, ["--views: expected numbers and ranges", "'-1'"]),
        ({"views": "0-"}, ["--views", "'0-'"]),
        ({"views": ""}, ["--views", "''"]),
        ({"views": "0-7" + ",0-7" * 30}, ["at most 400 views", "found 496 (248 of 2 images)"]),
        ({"out": "sheet.jpg"}, ["--out: expected a name that ends in .png", "sheet.jpg"]),
        ({"rest": ("--size", "0")}, ["--size: expected at least 1 pixel, found 0"]),
        ({"rest": ("--size", "100000")}, ["at most 0 views", "100000 x 100000"]),
        ({"rest": ("--sise", "3")}, ["--sise: unknown key"]),
        ({"rest": ("--beton", "none.beton")}, ["none.beton: expected a packed image file"]),
    ],
)
def test_errors(config: Path, tmp_path: Path, capsys, options: dict, expected: list[str]) -> None:
    given = {"keys": "temple/8x8.jpg,flower/8x8.jpg", "views": "0-2", "out": "sheet.png", "rest": ()} | options
    out = tmp_path / "out" / given["out"]
    assert render(config, out, given["keys"], given["views"], *given["rest"]) == 2
    error = capsys.readouterr().err
    assert all(line.startswith("error: ") for line in error.splitlines())
    assert all(part in error for part in expected), error
    assert not out.parent.exists()


def test_nothing_is_left_of_a_sheet_that_fails(photos: Beton, config: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "copy.beton"
    data = bytearray(photos.path.read_bytes())
    row = find_rows(photos, ["temple/200x300.jpg"])[0]
    data[photos.offsets[row] + 700] ^= 1
    copy.write_bytes(data)
    copy.with_suffix(".manifest.json").write_bytes(photos.path.with_suffix(".manifest.json").read_bytes())
    assert render(config, tmp_path / "sheet.png", "flower/8x8.jpg,temple/200x300.jpg", "0", "--beton", str(copy)) == 2
    assert "temple/200x300.jpg" in capsys.readouterr().err
    assert not list(tmp_path.glob("*sheet*"))
