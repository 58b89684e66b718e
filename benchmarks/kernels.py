"""Speed of the augmentation kernels against Pillow and torchvision: one image at a time, one thread, the same pixels.

The sides take turns, each over the same images; the table shows microseconds an image, medians of the rounds, and the
median over the rounds of each peer's time divided by the kernel's, for wall and for process CPU time. Pillow starts
from an Image and makes one, torchvision from a uint8 tensor [3, H, W], a kernel from an array (of which the kernels
that work in place keep changing the same copy). `--json PATH` writes the figures.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from timm.data import auto_augment
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tensor_or_pillow
from torchvision.transforms.v2 import functional as vision

from softshard.pipeline.views.kernels import color, spatial

Side = Callable[[int], object]  # does the operation on image number i
FACTOR, PEER_FACTOR = 20_000, 20_000 / 16_384
UNIT = 1 << spatial.COEFFICIENT_BITS
ANGLE, SHEAR, RADIUS = 17, 0.3, 1.25
FILL = (124, 116, 104)
BILINEAR, AFFINE = Image.Resampling.BILINEAR, Image.Transform.AFFINE


def photographs(size: int, count: int) -> list[np.ndarray]:
    """Squares cut at random from the two photographs that scikit-learn ships, resized."""
    rng = np.random.default_rng(0)
    result = []
    for number in range(count):
        photograph = Image.fromarray(load_sample_images().images[number % 2])
        side = int(rng.integers(250, 428))
        left, top = (int(rng.integers(0, limit - side + 1)) for limit in photograph.size)
        result.append(np.array(photograph.resize((size, size), BILINEAR, (left, top, left + side, top + side))))
    return result


def operations(images: list[np.ndarray]) -> dict[str, dict[str, Side]]:
    """{operation: {side: function}}. No peer is given where it has no such operation."""
    size = len(images[0])
    pillow = [Image.fromarray(image) for image in images]
    tensors = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]
    work = [image.copy() for image in images]
    target, scratch = np.empty((2, size, size, 3), np.uint8)
    table = np.random.default_rng(1).integers(0, 256, (3, 1024), np.uint8)
    half = size // 2
    box = (half // 2, half // 2, half, half)
    corners = (half // 2, half // 2, half // 2 + half, half // 2 + half)
    random_box = torch.empty(3, half, half)
    rotation = tuple(int(c) for c in spatial.rotation(spatial.DEGREE * ANGLE, size, size))
    shear = (UNIT, round(SHEAR * UNIT), 0, 0, UNIT, 0)
    shear_degrees = [-float(np.degrees(np.arctan(SHEAR))), 0.0]

    def kernel(function: Callable, *arguments) -> Side:
        return lambda i: function(work[i], *arguments)

    def moving(function: Callable, *arguments) -> Side:
        return lambda i: function(images[i], target, *arguments)

    def on_pillow(function: Callable) -> Side:
        return lambda i: function(pillow[i])

    def on_tensors(function: Callable) -> Side:
        return lambda i: function(tensors[i])

    def erase_tensor(image: torch.Tensor) -> torch.Tensor:
        return vision.erase(image, *box, random_box.normal_().mul_(58).add_(124).clamp_(0, 255).to(torch.uint8))

    def mix_tensors(image: torch.Tensor) -> torch.Tensor:
        return (image * 0.3 + tensors[0] * 0.7).to(torch.uint8)

    return {
        "invert": {
            "kernel": kernel(color.invert),
            "Pillow": on_pillow(ImageOps.invert),
            "torchvision": on_tensors(vision.invert),
        },
        "posterize": {
            "kernel": kernel(color.posterize, 4),
            "Pillow": on_pillow(lambda image: ImageOps.posterize(image, 4)),
            "torchvision": on_tensors(lambda image: vision.posterize(image, 4)),
        },
        "solarize": {
            "kernel": kernel(color.solarize, 100),
            "Pillow": on_pillow(lambda image: ImageOps.solarize(image, 100)),
            "torchvision": on_tensors(lambda image: vision.solarize(image, 100)),
        },
        "solarize_add": {
            "kernel": kernel(color.solarize_add, 60),
            "Pillow": on_pillow(lambda image: auto_augment.solarize_add(image, 60)),
        },
        "auto_contrast": {
            "kernel": kernel(color.auto_contrast),
            "Pillow": on_pillow(ImageOps.autocontrast),
            "torchvision": on_tensors(vision.autocontrast),
        },
        "equalize": {
            "kernel": kernel(color.equalize),
            "Pillow": on_pillow(ImageOps.equalize),
            "torchvision": on_tensors(vision.equalize),
        },
        "brightness": {
            "kernel": kernel(color.brightness, FACTOR),
            "Pillow": on_pillow(lambda image: ImageEnhance.Brightness(image).enhance(PEER_FACTOR)),
            "torchvision": on_tensors(lambda image: vision.adjust_brightness(image, PEER_FACTOR)),
        },
        "contrast": {
            "kernel": kernel(color.contrast, FACTOR),
            "Pillow": on_pillow(lambda image: ImageEnhance.Contrast(image).enhance(PEER_FACTOR)),
            "torchvision": on_tensors(lambda image: vision.adjust_contrast(image, PEER_FACTOR)),
        },
        "saturation": {
            "kernel": kernel(color.saturation, FACTOR),
            "Pillow": on_pillow(lambda image: ImageEnhance.Color(image).enhance(PEER_FACTOR)),
            "torchvision": on_tensors(lambda image: vision.adjust_saturation(image, PEER_FACTOR)),
        },
        "gray": {
            "kernel": kernel(color.gray),
            "Pillow": on_pillow(lambda image: image.convert("L").convert("RGB")),
            "torchvision": on_tensors(lambda image: vision.rgb_to_grayscale(image, 3)),
        },
        "hue": {
            "kernel": kernel(color.hue, 25),
            "Pillow": on_pillow(lambda image: tensor_or_pillow.adjust_hue(image, 0.1)),
            "torchvision": on_tensors(lambda image: vision.adjust_hue(image, 0.1)),
        },
        "fill": {
            "kernel": kernel(color.fill, *box, FILL),
            "Pillow": on_pillow(lambda image: image.paste(FILL, corners)),
        },
        "noise": {
            "kernel": kernel(color.noise, *box, np.uint64(7), table),
            "torchvision": on_tensors(erase_tensor),
        },
        "blend": {
            "kernel": kernel(color.blend, images[0], 19661),
            "Pillow": on_pillow(lambda image: Image.blend(pillow[0], image, 0.3)),
            "torchvision": on_tensors(mix_tensors),
        },
        "paste": {
            "kernel": kernel(color.paste, images[0], *box),
            "Pillow": on_pillow(lambda image: image.paste(pillow[0].crop(corners), corners)),
        },
        "rotation": {
            "kernel": moving(spatial.affine, *rotation, FILL),
            "Pillow": on_pillow(lambda image: image.rotate(ANGLE, BILINEAR, fillcolor=FILL)),
            "torchvision": on_tensors(
                lambda image: vision.rotate(image, ANGLE, InterpolationMode.BILINEAR, fill=list(FILL))
            ),
        },
        "shear": {
            "kernel": moving(spatial.affine, *shear, FILL),
            "Pillow": on_pillow(
                lambda image: image.transform(image.size, AFFINE, (1, SHEAR, 0, 0, 1, 0), BILINEAR, fillcolor=FILL)
            ),
            "torchvision": on_tensors(
                lambda image: vision.affine(
                    image, 0.0, [0, 0], 1.0, shear_degrees, InterpolationMode.BILINEAR, fill=list(FILL)
                )
            ),
        },
        "sharpness": {
            "kernel": moving(spatial.sharpness, FACTOR),
            "Pillow": on_pillow(lambda image: ImageEnhance.Sharpness(image).enhance(PEER_FACTOR)),
            "torchvision": on_tensors(lambda image: vision.adjust_sharpness(image, PEER_FACTOR)),
        },
        "gaussian_blur": {
            "kernel": moving(spatial.gaussian_blur, scratch, round(RADIUS * (1 << spatial.RADIUS_BITS))),
            "Pillow": on_pillow(lambda image: image.filter(ImageFilter.GaussianBlur(RADIUS))),
            "torchvision": on_tensors(lambda image: vision.gaussian_blur(image, [9, 9], [RADIUS, RADIUS])),
        },
    }


def measure(side: Side, count: int) -> tuple[float, float]:
    """(wall, process CPU) microseconds an image of one pass over all."""
    wall, cpu = time.perf_counter(), time.process_time()
    for i in range(count):
        side(i)
    return (time.perf_counter() - wall) / count * 1e6, (time.process_time() - cpu) / count * 1e6


def compare(sides: dict[str, Side], count: int, rounds: int) -> dict[str, float]:
    for side in sides.values():
        measure(side, 2)  # compile
    figures = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            figures[name].append(measure(side, count))
    results = {}
    for clock, column in (("wall", 0), ("cpu", 1)):
        for name, times in figures.items():
            results[f"{name}, us ({clock})"] = statistics.median(pair[column] for pair in times)
        for name in [name for name in figures if name != "kernel"]:
            ratios = [peer[column] / own[column] for peer, own in zip(figures[name], figures["kernel"], strict=True)]
            results[f"times as fast as {name} ({clock})"] = statistics.median(ratios)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    columns = [f"{name}, us (wall)" for name in ("kernel", "Pillow", "torchvision")]
    columns += [f"times as fast as {name} ({clock})" for name in ("Pillow", "torchvision") for clock in ("wall", "cpu")]
    print(f"{'':14}{'us an image':^33}{'as fast as Pillow':^22}{'as fast as torchvision':^22}")
    print(f"{'':14}{'kernel':>9}{'Pillow':>11}{'torchvision':>13}" + f"{'wall':>11}{'cpu':>11}" * 2)
    for name, sides in operations(photographs(options.size, options.images)).items():
        results[name] = compare(sides, options.images, options.rounds)
        cells = [results[name].get(column) for column in columns]
        widths = (9, 11, 13, 11, 11, 11, 11)
        texts = ("" if cell is None else f"{cell:.1f}" for cell in cells)
        print(f"{name:14}" + "".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True)))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
