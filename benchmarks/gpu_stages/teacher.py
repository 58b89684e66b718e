"""How fast does a teacher label, and what would ImageNet take?

Through the product's own teacher, ensemble and codes, with random weights: the time does not depend on them. Figures
are costs by batch, the best rate, and the hours and bytes of ImageNet at that rate. Bytes are those of the codes before
they are compressed; how far that goes depends on what a trained teacher says.
"""

import time
import traceback
from collections.abc import Callable
from typing import Any

import timm
import timm.data
import torch
from torch import Tensor

from gpu_stages.stage import COMPILER, Check, Outcome, Setting
from gpu_stages.timing import OUT_OF_MEMORY, cost, give_back, is_out_of_memory, random_images, synchronize
from softshard.pipeline.store.topk import Encoded, encode_on_device, to_codes
from softshard.teachers import Ensemble, Teacher
from softshard.teachers.teacher import Preprocessing

MODELS = ("beitv2_base_patch16_224", "deit_base_patch16_224", "resnet101")
BATCHES, COMPILED_BATCHES = (64, 256, 1024), (256, 1024, 64)  # the latter in the order of their worth
TINY_MODEL, TINY_BATCHES, TINY_PIXELS = "test_vit", (2, 3), 160
IMAGES, VIEWS = 1_281_167, (50, 300)  # of ImageNet-1k's training set
CLASSES, K = 1000, 10
MOST_DIFFERENCE = 0.05  # of logits from compiled and from eager operations, relative to the largest logit
Figures = dict[str, Any]
Label = Callable[[Tensor], Tensor]  # uint8 [B, 3, S, S] -> logits float32 [B, C]


def checks(setting: Setting) -> list[Check]:
    """Compiled, each batch has a check of its own: it is compiled for that one alone."""
    on_gpu = setting.device == "cuda"
    models = (TINY_MODEL,) if setting.tiny else MODELS
    together, single = (TINY_BATCHES, TINY_BATCHES[:1]) if setting.tiny else (BATCHES, COMPILED_BATCHES)
    found = [Check(f"{model} eager", lambda setting, model=model: eager(model, together, setting)) for model in models]
    for images in single:
        for model in models:

            def run(setting: Setting, model=model, images=images) -> Outcome:
                return compiled(model, images, setting)

            found.append(Check(f"{model} compiled {images}", run, ("triton", COMPILER) if on_gpu else (), 300.0))
    return found


def eager(model: str, batches: tuple[int, ...], setting: Setting) -> Outcome:
    outcome = Outcome({"model": model, "mode": "eager"})
    ensemble = make_ensemble(model, setting)
    label = labeling(ensemble, setting)
    _measure(outcome, label, ensemble.sizes[0], batches, setting)
    return outcome


def compiled(model: str, images: int, setting: Setting) -> Outcome:
    """Compiled as pipeline/labels/labeler.py does it, and compared with what is not; on a CPU without inductor, which
    takes minutes there."""
    outcome = Outcome({"model": model, "mode": "compiled"})
    ensemble = make_ensemble(model, setting)
    pixels = random_images(images, ensemble.sizes[0], setting.device)
    expected = labeling(ensemble, setting)(pixels)
    label = labeling(torch.compile(ensemble, backend="inductor" if setting.device == "cuda" else "eager"), setting)
    started = time.perf_counter()
    found = label(pixels)
    synchronize(setting.device)
    outcome.figures["first_batch_s"] = round(time.perf_counter() - started, 3)
    difference = float((found - expected).abs().max() / expected.abs().max())
    outcome.figures["difference"] = difference
    outcome.expect(difference <= MOST_DIFFERENCE, f"compiled logits differ by {difference:.3g} of the largest")
    _measure(outcome, label, ensemble.sizes[0], (images,), setting)
    return outcome


def make_ensemble(model: str, setting: Setting) -> Ensemble:
    """One teacher, as pipeline/labels/labeler.py has it."""
    torch.manual_seed(0)
    network = timm.create_model(model, pretrained=False, num_classes=CLASSES)
    settings = timm.data.resolve_model_data_config(network)
    wanted = Preprocessing(settings["input_size"][-1], settings["mean"], settings["std"], settings["interpolation"])
    ensemble = Ensemble([Teacher(model, "timm", network, CLASSES, wanted)], [1.0], "probabilities", flip=False)
    return ensemble.to(setting.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def labeling(ensemble: Callable[..., Tensor], setting: Setting) -> Label:
    """Logits in bf16, as pipeline/labels/labeler.py gets them."""

    @torch.inference_mode()
    def label(images: Tensor) -> Tensor:
        with torch.autocast(setting.device, torch.bfloat16):
            return ensemble({images.shape[-1]: images}).float()

    return label


def _measure(outcome: Outcome, label: Label, pixels: int, batches: tuple[int, ...], setting: Setting) -> None:
    """Add costs by batch, and what ImageNet takes at the best rate."""
    costs: dict[str, Figures] = {}
    outcome.figures |= {"pixels": pixels, "batches": costs}
    for images in batches:
        try:
            costs[str(images)] = _cost(outcome, label, random_images(images, pixels, setting.device), setting)
        except Exception as error:
            if is_out_of_memory(error):
                costs[str(images)] = dict(OUT_OF_MEMORY)
            else:
                traceback.print_exc()
                outcome.problems.append(f"batch {images}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        give_back(setting.device)
    fastest = max(costs.values(), key=lambda found: found.get("images_per_s", 0.0))
    if "images_per_s" in fastest:
        outcome.figures |= {"images_per_s": fastest["images_per_s"], "imagenet": _imagenet(**fastest)}


def _cost(outcome: Outcome, label: Label, images: Tensor, setting: Setting) -> Figures:
    def step() -> Encoded:
        return encode_on_device(label(images), K)

    found = cost(step, setting.device, rounds=1 if setting.tiny else 20)
    finite = bool(label(images).isfinite().all())
    outcome.expect(finite, f"batch {len(images)}: expected finite logits, found others")
    codes = to_codes(step(), CLASSES)
    size = sum(array.nbytes for array in (codes.index, codes.gap, codes.tail)) / len(codes)
    return found._asdict() | {"images_per_s": 1000 * len(images) / found.ms, "bytes_of_a_view": size}


def _imagenet(images_per_s: float, bytes_of_a_view: float, **_: Any) -> dict[str, Figures]:
    """For each number of views: hours, and bytes of the codes as they are in memory."""
    return {
        str(views): {"hours": IMAGES * views / images_per_s / 3600, "bytes": round(IMAGES * views * bytes_of_a_view)}
        for views in VIEWS
    }
