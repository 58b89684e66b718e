"""Contact sheets: views as the teacher sees them, pixel for pixel, each above its parameters in words."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from softshard.pipeline.images.beton import Beton, open_beton
from softshard.pipeline.recipes.recipe import LabelRecipe, ViewRecipe
from softshard.pipeline.runtime.errors import DataError, RecipeError
from softshard.pipeline.runtime.files import atomic_path
from softshard.pipeline.views.describe import ViewDescription, describe_view, in_words
from softshard.pipeline.views.loader import ViewLoader
from softshard.pipeline.views.parameters import view_parameters

MOST_VIEWS, MOST_PIXELS = 400, 1 << 25  # on a sheet
CLOSE, COMPARED = 3, 20_000  # how many keys are named when one is unknown, and compared to find them
COLUMN = 176  # pixels that words need, where views are narrower
MARGIN, GAP, INDENT = 16, 14, 8
TEXT, TITLE = 12, 15  # sizes of type
INK, FAINT, RULE, PAPER = (25, 25, 25), (100, 100, 100), (210, 210, 210), (250, 250, 250)

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


class Tile(NamedTuple):
    """A view: number, pixels (uint8 [S, S, 3]), what it is made of, the lam of the image itself, and words for it."""

    view: int
    pixels: NDArray[np.uint8]
    explanation: ViewDescription
    lam: float
    words: list[str]


class Line(NamedTuple):
    text: str
    font: Font
    color: tuple[int, int, int]
    indent: int = 0


def make_sheet(recipe: LabelRecipe, keys: Sequence[str], views: str, out: Path, size: int | None = None) -> str:
    """Write a sheet with a row for each key and a column for each view, at the teacher's size or another; returns what
    it is, for people. Raises RecipeError and DataError when something of the command line does not fit.
    """
    if out.suffix.lower() != ".png":
        raise RecipeError(f"--out: expected a name that ends in .png, found {str(out)!r}")
    size = recipe.teachers[0].size if size is None else size
    if size is None:
        raise RecipeError("--size: expected pixels, since teachers.0.size is null, found none; give it")
    if size < 1:
        raise RecipeError(f"--size: expected at least 1 pixel, found {size}")
    ranges = view_ranges(views, recipe.views.count)
    beton = open_beton(recipe.beton)
    rows = find_rows(beton, keys)
    _check_extent(len(rows), sum(len(numbers) for numbers in ranges), size)
    numbers = np.array([number for numbers in ranges for number in numbers])
    tiles = render_tiles(beton, recipe.views, rows, numbers, size, recipe.workers)
    sheet = draw_sheet([_title(beton, row) for row in rows], tiles)
    with atomic_path(out) as partial:
        sheet.save(partial, "PNG")
    return f"{out}: {len(numbers)} views of {len(rows)} images, {size} x {size} pixels each"


def view_ranges(text: str, count: int) -> list[range]:
    """'0,3,5-6' -> [range(0, 1), range(3, 4), range(5, 7)]. Raises RecipeError."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part, re.ASCII)
        if not match:
            raise RecipeError(f"--views: expected numbers and ranges such as 0,3,5-6, found {part!r} in {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise RecipeError(f"--views: expected ranges that go up, found {part.strip()}; write {last}-{first}")
        if last >= count:
            raise RecipeError(f"--views: expected numbers from 0 to {count - 1}, as views.count says, found {last}")
        ranges.append(range(first, last + 1))
    return ranges


def find_rows(beton: Beton, keys: Sequence[str]) -> list[int]:
    """The rows of keys; each text is a key, or several with commas between them. Raises DataError with a line for each
    key that is unknown."""
    row_of = {key: row for row, key in enumerate(beton.manifest.keys)}
    wanted = [key for text in keys for key in ([text] if text in row_of else text.split(","))]
    unknown = dict.fromkeys(key for key in wanted if key not in row_of)
    if unknown:
        lines = (
            f"--keys: expected keys of {beton.path}, found {key!r}; did you mean {_close(key, beton.manifest.keys)}?"
            for key in unknown
        )
        raise DataError("\n".join(lines))
    return [row_of[key] for key in wanted]


def _close(wanted: str, keys: Sequence[str]) -> str:
    """Keys like one that is unknown: of the same name, or in folders with names like its folder's."""
    folder, _, name = wanted.rpartition("/")
    folders = get_close_matches(folder, {key.rpartition("/")[0] for key in keys}, CLOSE, cutoff=0)
    candidates = [key for key in keys if key.rpartition("/")[0] in folders or key.endswith(f"/{name}")]
    return " or ".join(get_close_matches(wanted, candidates[:: -(-len(candidates) // COMPARED)], CLOSE, cutoff=0))


def _check_extent(rows: int, columns: int, size: int) -> None:
    most = min(MOST_VIEWS, MOST_PIXELS // (max(size, COLUMN) * size))
    if rows * columns > most:
        raise RecipeError(
            f"--keys, --views: expected at most {most} views on a sheet of {size} x {size} pixels each, found "
            f"{rows * columns} ({columns} of {rows} images); make several sheets"
        )


def render_tiles(
    beton: Beton, views: ViewRecipe, rows: Sequence[int], numbers: NDArray[np.int64], size: int, workers: int
) -> list[list[Tile]]:
    """These views of each of these rows."""
    loader = ViewLoader(beton, views, size, 1, workers, torch.device("cpu"), batches_ahead=1)
    parameters = view_parameters(views)
    tiles = []
    for batch in loader.render(np.array(rows), np.tile(numbers, (len(rows), 1))):
        [row], [pictures] = batch.rows.tolist(), batch.images.permute(0, 1, 3, 4, 2).numpy().copy()
        lams = batch.mixed.lam[0].tolist() if batch.mixed else [1.0] * len(numbers)
        tiles.append([])
        for view, pixels, lam in zip(numbers.tolist(), pictures, lams, strict=True):
            explanation = describe_view(beton, parameters, row, view, size)
            tiles[-1].append(Tile(view, pixels, explanation, lam, in_words(explanation, beton, row, lam)))
    return tiles


def _title(beton: Beton, row: int) -> tuple[str, str]:
    width, height, label = beton.widths[row], beton.heights[row], beton.labels[row]
    return beton.manifest.keys[row], f"{width} x {height} pixels, class {beton.manifest.classes[label]}"


def draw_sheet(titles: Sequence[tuple[str, str]], tiles: Sequence[Sequence[Tile]]) -> Image.Image:
    """All text is laid out first: each row of the sheet is as high as its longest column needs."""
    size, count = len(tiles[0][0].pixels), len(tiles[0])
    column = max(size, COLUMN)
    inner = count * column + (count - 1) * GAP
    heads = [_title_lines(*title, inner) for title in titles]
    texts = [[_tile_lines(tile, column) for tile in row] for row in tiles]
    heights = [
        _height(head) + size + max(_height(text) for text in row) + 3 * GAP
        for head, row in zip(heads, texts, strict=True)
    ]
    sheet = Image.new("RGB", (inner + 2 * MARGIN, sum(heights) + 2 * MARGIN - GAP), PAPER)
    canvas, y = ImageDraw.Draw(sheet), MARGIN
    for head, row, words, height in zip(heads, tiles, texts, heights, strict=True):
        if y > MARGIN:
            canvas.line((MARGIN, y - GAP, sheet.width - MARGIN, y - GAP), RULE)
        _write(canvas, head, MARGIN, y)
        top = y + _height(head) + GAP // 2
        for x, tile, lines in zip(range(MARGIN, sheet.width, column + GAP), row, words, strict=False):
            sheet.paste(Image.fromarray(tile.pixels), (x, top))
            _write(canvas, lines, x, top + size + GAP // 2)
        y += height
    return sheet


def _title_lines(key: str, details: str, width: int) -> list[Line]:
    lines = [Line(text, _font(TITLE), INK) for text in wrap(key, _font(TITLE), width)]
    return lines + [Line(text, _font(TEXT), FAINT) for text in wrap(details, _font(TEXT), width)]


def _tile_lines(tile: Tile, width: int) -> list[Line]:
    font = _font(TEXT)
    lines = [Line(text, font, INK) for text in wrap(f"view {tile.view}", font, width)]
    for words in tile.words:
        first, *rest = wrap(words, font, width - INDENT)
        lines += [Line(first, font, FAINT), *(Line(text, font, FAINT, INDENT) for text in rest)]
    return lines


@cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def wrap(text: str, font: Font, width: float) -> list[str]:
    """Break a text into lines, after spaces and slashes where that is possible. What the font lacks is escaped."""
    lines, line = [], ""
    text = text.encode("ascii", "backslashreplace").decode().replace("\\xb0", "°")
    for piece in re.findall(r"[^ /]*[ /]|[^ /]+", text):
        while font.getlength((line + piece).rstrip()) > width:
            lengths = range(1, len(piece))
            fits = 0 if line else max(1, bisect_right(lengths, width, key=lambda n: font.getlength(piece[:n])))
            lines.append((line + piece[:fits]).rstrip())
            line, piece = "", piece[fits:]
        line += piece
    return [*lines, line.rstrip()]


def _height(lines: Sequence[Line]) -> int:
    return sum(_line_height(line.font) for line in lines)


def _line_height(font: Font) -> int:
    return int(font.getbbox("Ag")[3]) + 3


def _write(canvas: ImageDraw.ImageDraw, lines: Sequence[Line], x: int, y: int) -> None:
    for line in lines:
        canvas.text((x + line.indent, y), line.text, line.color, line.font)
        y += _line_height(line.font)
