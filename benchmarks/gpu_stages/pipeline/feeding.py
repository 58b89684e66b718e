"""Does the loader keep up with a student on the device, and are its pixels there those of the CPU?"""

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from gpu_stages.pipeline.commands import ROOT, cores, digits
from gpu_stages.stage import Outcome, Setting, first_missing
from gpu_stages.timing import cost_or_why, synchronize

CLASSES = 1000  # of the students here
ROOMY_BYTES = 40e9  # a device with more memory takes the larger batch
PACKED = ROOT / "data/demo/photographs.beton"
Step = Callable[[Any], None]  # trains on a Batch


class Scale(NamedTuple):
    """`warm` of the batches do not count; `checked` of them are compared pixel by pixel; `students`: their branches."""

    size: int
    batch: int
    batches: int
    warm: int
    checked: int
    photographs: int
    students: dict[str, int]


def scale_of(setting: Setting) -> Scale:
    if setting.tiny:
        return Scale(32, 8, 6, 2, 3, 8, {"test_efficientnet": 0, "mobilenetv2_050": 2})
    students = {"mobilenetv2_100": 0, "ghostnetv3_100": 3}
    if setting.device == "cpu":
        return Scale(224, 16, 8, 3, 8, 256, students)
    roomy = torch.cuda.get_device_properties(0).total_memory > ROOMY_BYTES
    return Scale(224, 256 if roomy else 128, 72, 8, 24, 256, students)


class Feed:
    """A loader with the rows that it goes through, batch by batch."""

    def __init__(self, beton: Any, scale: Scale, device: str, augmented: bool = True) -> None:
        from softshard.pipeline.recipes.recipe import RandAugmentRecipe, RandomErasingRecipe, ViewRecipe
        from softshard.pipeline.views.loader import ViewLoader

        more = {"rand_augment": RandAugmentRecipe(), "random_erasing": RandomErasingRecipe()} if augmented else {}
        self.loader = ViewLoader(
            beton, ViewRecipe(seed=0, count=1, **more), scale.size, scale.batch, cores(), torch.device(device)
        )
        self._rows = np.arange(scale.batches * scale.batch) % len(beton)

    def batches(self, most: int | None = None) -> Iterator[Any]:
        return self.loader.render(self._rows[: None if most is None else most * self.loader.batch_size], 0)


def feeding(setting: Setting) -> Outcome:
    """Images a second: rendered alone, trained alone on a batch that is there already, and both together."""
    scale, (beton, what) = scale_of(setting), packed_images(setting)
    outcome = Outcome({"images": what, "size": scale.size, "batch": scale.batch, "workers": cores()})
    outcome.figures |= {"rendered_alone": {}, "students": {}}
    for name, augmented in (("crop, flip", False), ("crop, flip, RandAugment, erasing", True)):
        alone, _ = rate(setting, scale, Feed(beton, scale, setting.device, augmented), lambda batch: None)
        outcome.figures["rendered_alone"][name] = alone
    for name, branches in scale.students.items():
        step, feed = make_step(setting, name, branches, scale.size), Feed(beton, scale, setting.device)
        found = _student(setting, scale, feed, Feed(beton, scale, "cpu"), step)
        outcome.figures["students"][name] = {"branches": branches} | found
        wrong = found.get("wrong_batches", 0)
        outcome.expect(not wrong, f"{name}: {wrong} of {scale.checked} batches differ from those rendered for the CPU")
    return outcome


def _student(setting: Setting, scale: Scale, feed: Feed, reference: Feed, step: Step) -> dict[str, Any]:
    """Figures of one student; data_wait is the part of the time in which it waits for images."""
    batch = next(iter(feed.batches(1)))
    batch = batch._replace(images=batch.images.clone())
    alone = cost_or_why(lambda: lambda: step(batch), setting.device, max(3, scale.batches // 3))
    if "why" in alone:
        return alone
    together, waited = rate(setting, scale, feed, step)
    trained = 1000 * scale.batch / alone["ms"]
    found = {"step": alone, "trained_alone": round(trained, 1), "together": together, "data_wait": waited}
    return found | {"wrong_batches": _wrong_batches(feed, reference, scale.checked, step)}


def rate(setting: Setting, scale: Scale, feed: Feed, step: Step) -> tuple[float, float]:
    """Images a second, and the part of the time spent in waiting for them, once the first batches are through."""
    started = waited = 0.0
    for number, batch in enumerate(feed.batches()):
        if number == scale.warm:
            synchronize(setting.device)
            started, waited = perf_counter(), feed.loader.waited
        step(batch)
    synchronize(setting.device)
    seconds = perf_counter() - started
    images = (scale.batches - scale.warm) * scale.batch
    return round(images / seconds, 1), round((feed.loader.waited - waited) / seconds, 4)


def _wrong_batches(feed: Feed, reference: Feed, count: int, step: Step) -> int:
    """Batches that are not those of the CPU: the decoder would have written to memory that was still being copied."""
    kept = []
    for batch in feed.batches(count):
        step(batch)
        kept.append(batch.images.clone())
    expected = reference.batches(count)
    return sum(not torch.equal(there.cpu(), batch.images) for there, batch in zip(kept, expected, strict=True))


def packed_images(setting: Setting) -> tuple[Any, str]:
    """What is rendered, and what it is: photographs, whose JPEGs take their time, where there are any."""
    from softshard.pipeline.images.beton import open_beton

    if PACKED.exists():
        return open_beton(PACKED), "photographs"
    if first_missing(("sklearn", "torchvision", "pyarrow", "psutil")):
        return open_beton(digits(setting)[0]), "digits of 28 x 28 pixels"
    path = setting.folder / "photographs.beton"
    if not path.exists():
        _pack_photographs(setting)
    return open_beton(path), "photographs of about 500 x 375 pixels"


def _pack_photographs(setting: Setting) -> None:
    from loader import write_photographs  # benchmarks/loader.py

    from softshard.pipeline.images.pack import pack
    from softshard.pipeline.recipes.recipe import PackRecipe, SourceRecipe

    folder = setting.folder / "photographs"
    write_photographs(folder, scale_of(setting).photographs)
    source = SourceRecipe(kind="imagefolder", path=str(folder))
    pack(PackRecipe(source=source, output=str(setting.folder / "photographs.beton")))


def make_step(setting: Setting, name: str, branches: int, size: int) -> Step:
    """A training step of a student on hard labels, as the student's stage has it; without `branches` a plain one."""
    from gpu_stages.student.sides import TrainableStudent, make_student

    device = torch.device(setting.device)
    student = make_student(name, "auto" if branches else None, CLASSES, size, device, branches=branches)
    training = TrainableStudent(student, device)

    def step(batch: Any) -> None:
        training.hard_passes(batch.images, batch.labels)
        training.update()
        training.optimizer.zero_grad()

    return step
