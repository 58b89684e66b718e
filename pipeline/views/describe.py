"""What a view is made of, in numbers and in words, from the functions that rendering itself decides with."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from softshard.pipeline.images.beton import Beton
from softshard.pipeline.views import mixing, policies
from softshard.pipeline.views.geometry import view_geometry
from softshard.pipeline.views.kernels.jit import kept, sources_digest
from softshard.pipeline.views.kernels.rng import ONE, stream
from softshard.pipeline.views.kernels.spatial import DEGREE, RADIUS_BITS
from softshard.pipeline.views.parameters import ViewParameters
from softshard.pipeline.views.render import denominator, find_partners


class Box(NamedTuple):
    top: int
    left: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height} at {self.left},{self.top}"


class ViewDescription(NamedTuple):
    """All that decides the pixels of a view. `crop` is in pixels of the image, `erased` (filled with noise or with the
    mean color) and `cut` in pixels of the view; operations have the arguments that their kernels take. `kind`, `cut`
    and `partner`, a row or -1, belong to mixing."""

    crop: Box
    flip: bool
    denominator: int
    operations: tuple[tuple[int, int], ...]
    erased: tuple[Box, ...]
    noise: bool
    kind: int
    cut: Box
    partner: int


def describe_view(beton: Beton, p: ViewParameters, row: int, view: int, size: int) -> ViewDescription:
    key, height, width = beton.keys[row], beton.heights[row], beton.widths[row]
    plan, erased = np.zeros((policies.PLAN_LENGTH, 2), np.int64), np.zeros((int(p.erase_count), 4), np.int64)
    geometry, scale, operations, boxes, kind, cut = _decide(
        p, key, np.int64(view), height, width, np.int64(size), plan, erased
    )
    partners = find_partners(p, beton.keys[row : row + 1], beton.key_order, np.array([[view]], np.int64))
    return ViewDescription(
        crop=Box(*(int(number) for number in geometry[:4])),
        flip=bool(geometry[4]),
        denominator=int(scale),
        operations=tuple((operation, argument) for operation, argument in plan[:operations].tolist()),
        erased=tuple(Box(*box) for box in erased[:boxes].tolist() if box[2] * box[3]),
        noise=bool(p.erase_noise),
        kind=int(kind),
        cut=Box(*(int(number) for number in cut)),
        partner=int(partners[0, 0]),
    )


def _keyed(sources: str):
    @kept
    def decide(p, key, view, height, width, size, plan, erased):
        """The decisions about a view; `plan` and `erased` receive its operations and the boxes to erase."""
        _ = sources  # part of the key under which numba keeps a function
        state = stream(p.seed, key, view)
        geometry = view_geometry(p, key, view, height, width)
        operations, boxes = policies.plan_operations(p, state, plan), mixing.erasures(p, state)
        for number in range(boxes):
            erased[number] = mixing.erase_box(p, state, number, size)
        kind = mixing.mix_kind(p, state)
        cut = mixing.cut_box(state, mixing.mix_lam(p, state, kind), size)
        return geometry, denominator(p, geometry[2], geometry[3], size), operations, boxes, kind, cut

    return decide


_decide = _keyed(sources_digest())


def in_words(explanation: ViewDescription, beton: Beton, row: int, lam: float) -> list[str]:
    """A line for each thing that was done to a view, in the order of the work. `lam` is what is left of the image
    itself where another is mixed in."""
    crop, image = explanation.crop, int(beton.heights[row] * beton.widths[row])
    lines = [f"crop {crop} ({crop.height * crop.width / image:.0%})"]
    if explanation.denominator > 1:
        lines.append(f"decoded at 1/{explanation.denominator}")
    if explanation.flip:
        lines.append("flipped")
    lines += [operation_in_words(*operation) for operation in explanation.operations]
    filling = "noise" if explanation.noise else "mean color"
    lines += [f"erased {box}, {filling}" for box in explanation.erased]
    if explanation.partner >= 0:
        lines.append(_mixing_in_words(explanation, beton, row, lam))
    return lines


def _mixing_in_words(explanation: ViewDescription, beton: Beton, row: int, lam: float) -> str:
    kind = "mixup" if explanation.kind == mixing.MIXUP else "cutmix"
    if explanation.partner == row:
        return f"{kind} with itself"
    part = f"{1 - lam:.0%}" if explanation.kind == mixing.MIXUP else str(explanation.cut)
    return f"{kind}: {lam:.0%} of itself, {part} of {beton.manifest.keys[explanation.partner]}"


def operation_in_words(operation: int, argument: int) -> str:
    """'rotate 12.5° clockwise'"""
    write = ARGUMENTS.get(operation)
    return policies.OPERATION_NAMES[operation] + (f" {write(argument)}" if write else "")


def _factor(argument: int) -> str:
    return f"x {argument / policies.FACTOR:.2f}"


def _shear(argument: int) -> str:
    return f"by {argument / ONE:+.2f}"


def _moved(argument: int, positive: str, negative: str) -> str:
    return f"{abs(argument) / ONE:.1%} of the side {positive if argument > 0 else negative}"


ARGUMENTS: dict[int, Callable[[int], str]] = {
    policies.ROTATE: lambda a: f"{abs(a) / DEGREE:.1f}° {'counter-clockwise' if a > 0 else 'clockwise'}",
    policies.POSTERIZE: lambda a: f"to {a} bit{'s' if a != 1 else ''}",
    policies.SOLARIZE: lambda a: f"from {a} up",
    policies.SOLARIZE_ADD: lambda a: f"{a} below 128",
    policies.SATURATION: _factor,
    policies.CONTRAST: _factor,
    policies.BRIGHTNESS: _factor,
    policies.SHARPNESS: _factor,
    policies.SHEAR_X: _shear,
    policies.SHEAR_Y: _shear,
    policies.TRANSLATE_X: lambda a: _moved(a, "to the left", "to the right"),
    policies.TRANSLATE_Y: lambda a: _moved(a, "up", "down"),
    policies.BLUR: lambda a: f"of radius {a / (policies.BLUR_UNIT << RADIUS_BITS):.2%} of the side",
    policies.HUE: lambda a: f"by {((a + 128) % 256 - 128) * 360 / 256:+.0f}°",
}
