"""The trainer on the device: a run that goes on from a checkpoint equals one that did not stop; half precision learns.

Images are small and say their class, soft labels come from made-up logits; no packed file, no store, no teacher.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpu_stages.numerics.layers import float32_by, interpreted
from gpu_stages.stage import COMPILER, Check, Outcome, Setting
from softshard.pipeline.store.topk import decode_on, encode

if TYPE_CHECKING:
    from softshard.trainer.loop.train_state import TrainState

NEEDS = ("accelerate", "pydantic", "ruamel.yaml", "safetensors")
CLASSES, SIZE = 10, 32
SMALL_SCALE = 2.0**8  # from torch's own the first updates in fp16 overflow, and are left out
# Of states in float32, where convolutions may choose another algorithm, whose sums differ in their last bits. On a CPU
# weights that are 3e-7 off lead to 3e-5 in student and average and 1e-3 in the optimizer; moments that a checkpoint had
# forgotten, to 2e-3 and 3e-2. (In bf16 both lead to 3e-3 and 3e-2: that shows nothing.)
RESUMED = {"student": 3e-4, "ema": 3e-4, "optimizer": 5e-3, "scaler": 0.0}
RECIPE: dict[str, Any] = {
    "data": {"train": "none", "validation": "none", "labels": "none", "size": SIZE},
    "loss": {"alpha": 0.9, "temperature": 2.0},
    "optimizer": {"name": "lamb", "lr": 1e-3, "clip_grad": 1.0},
    "schedule": {"name": "constant", "epochs": 1},
    "ema": {"decay": 0.9, "warmup": True},
    "output": "none",
}


def resume_checks(setting: Setting) -> list[Check]:
    return _checks(setting, "resume", check_resume, without_triton=setting.tiny)


def learning_checks(setting: Setting) -> list[Check]:
    return _checks(setting, "learn", check_learning, without_triton=False)


def _checks(
    setting: Setting, name: str, run: Callable[[Setting, str, str], Outcome], without_triton: bool
) -> list[Check]:
    """One for each precision, and each form of branches. Triton's interpreter takes seconds for a step."""
    needs = {"auto": NEEDS, "triton": (*NEEDS, "triton") if setting.device == "cpu" else (*NEEDS, "triton", COMPILER)}
    found = []
    for precision in ("float32", "bf16") if setting.device == "cpu" else ("float32", "bf16", "fp16"):
        for form in ("auto",) if without_triton or (setting.tiny and precision == "bf16") else ("auto", "triton"):
            told = partial(_told, run, precision, form)
            found.append(Check(f"{name}: {precision}, {form}", told, needs[form]))
    return found


def _told(run: Callable[[Setting, str, str], Outcome], precision: str, form: str, setting: Setting) -> Outcome:
    return run(setting, precision, form)


def check_resume(setting: Setting, precision: str, form: str) -> Outcome:
    """Four updates, against two, a checkpoint, and two more of another state: weights, average, optimizer and loss
    scale; under deterministic algorithms bit for bit, in float32 also under those that `train` takes, nearly."""
    outcome = Outcome()
    for deterministic in (True, False) if precision == "float32" else (True,):
        on_gpu = interpreted(setting.device if form == "triton" else "")
        with algorithms(deterministic), float32_by("ieee"), on_gpu:  # TF32 would amplify last bits
            whole, resumed = _whole_and_resumed(setting, precision, form)
        name = "deterministic" if deterministic else "cudnn.benchmark"
        outcome.expect(bool(whole["optimizer"]["state"]), f"{name}: every update was left out")
        found = outcome.figures[name] = {part: _difference(resumed[part], whole[part]) for part in whole}
        for part, difference in found.items():
            limit = 0.0 if deterministic or setting.device == "cpu" else RESUMED[part]
            outcome.expect(difference <= limit, f"{name}: {part} differs by {difference:.1e} (at most {limit:g})")
    return outcome


def _whole_and_resumed(setting: Setting, precision: str, form: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from softshard.trainer.loop.run_folder import load_checkpoint, save_checkpoint

    whole = make(setting, precision, form, SMALL_SCALE)
    train(whole, range(2))
    folder = Path(setting.folder) / f"resume {precision} {form}"
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder, whole.state_dict())
    train(whole, range(2, 4))
    resumed, state = make(setting, precision, form, SMALL_SCALE), load_checkpoint(folder)
    assert state is not None
    resumed.load_state_dict(state)
    train(resumed, range(2, 4))
    return whole.state_dict(), resumed.state_dict()


def check_learning(setting: Setting, precision: str, form: str) -> Outcome:
    """200 updates on images that say their class: every loss finite, the last ones below half of the first ones."""
    state = make(setting, precision, form)
    count = 1 if setting.tiny else 200
    with interpreted(setting.device if form == "triton" else ""):
        losses = train(state, range(count))
    first, last = losses[: count // 10 + 1].mean().item(), losses[-(count // 10 + 1) :].mean().item()
    outcome = Outcome({"first losses": first, "last losses": last, "updates": count})
    outcome.expect(bool(losses.isfinite().all()), f"losses that are not finite: {int((~losses.isfinite()).sum())}")
    outcome.expect(state.is_finite(), "weights that are not finite")
    outcome.expect(setting.tiny or last < first / 2, f"loss fell from {first:.3f} to {last:.3f} only")
    if state.accelerator.scaler:
        outcome.figures["loss scale"] = state.accelerator.scaler.get_scale()
    return outcome


def make(setting: Setting, precision: str, form: str, scale: float = 65536.0) -> "TrainState":
    """A student of few layers with branches, its optimizer and its average, as `train` makes them; `scale`: of fp16's
    losses at first, torch's own unless another is given."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradScalerKwargs

    from softshard.trainer.loop.train_state import make_train_state
    from softshard.trainer.recipe import TrainRecipe

    student = {"model": "test_efficientnet" if setting.tiny else "mobilenetv2_050", "num_classes": CLASSES}
    student["expand"] = {"branches": 2, "implementation": form}
    batch = {"batch_size": 4 if setting.tiny else 64, "precision": precision}
    recipe = TrainRecipe.model_validate(RECIPE | batch | {"student": student})
    AcceleratorState._reset_state(reset_partial_state=True)  # another precision than that of the check before
    mixed = {"float32": "no"}.get(precision, precision)
    options: dict[str, Any] = {"kwargs_handlers": [GradScalerKwargs(init_scale=scale)]} if precision == "fp16" else {}
    accelerator = Accelerator(cpu=setting.device == "cpu", mixed_precision=mixed, **options)
    return make_train_state(accelerator, recipe, steps=1000)


def train(state: "TrainState", updates: range) -> torch.Tensor:
    """The losses of some updates [U], each on its own batch, on the CPU."""
    from softshard.pipeline.views.batch import Batch

    device, losses = state.accelerator.device, []
    state.model.train()
    for update in updates:
        images, labels, logits = _batch(state.recipe.batch_size, update)
        soft = decode_on(device, encode(logits, 5), CLASSES, state.temperature(update))
        images = images.to(device, memory_format=torch.channels_last)
        batch = Batch(images, np.arange(len(labels)), labels.to(device), None)
        state.begin(update)
        losses.append(state.learn(update, batch, [(1.0, soft)]).total.detach())
    return torch.stack(losses).cpu()


def _batch(count: int, update: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise, with a pattern of its class on top: uint8 [B, 3, S, S]; classes [B]; a teacher's logits [B, C]."""
    patterns = torch.randn(CLASSES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + update)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    images = (128 + 30 * (patterns[labels] + noise)).clamp(0, 255).to(torch.uint8)
    logits = 6.0 * torch.nn.functional.one_hot(labels, CLASSES) + torch.randn(count, CLASSES, generator=generator)
    return images, labels, logits


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Deterministic algorithms alone, or the fastest ones, as `train` takes them."""
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def _difference(found: Any, expected: Any) -> float:
    """The norm of the difference of two states, relative to that of the second; infinite where numbers that are no
    tensors differ. All tensors together: some gradients are nothing but rounding, and so are their averages."""
    pairs = list(_tensors(found, expected))
    if any(not isinstance(a, torch.Tensor) and a != b for a, b in pairs):
        return float("inf")
    tensors = [(a.cpu().double(), b.cpu().double()) for a, b in pairs if isinstance(a, torch.Tensor)]
    if all(torch.equal(a, b) for a, b in tensors):
        return 0.0
    squares = [((a - b).square().sum(), b.square().sum()) for a, b in tensors]
    different, whole = (float(torch.stack(part).sum()) for part in zip(*squares, strict=True))
    return (different / whole) ** 0.5


def _tensors(found: Any, expected: Any) -> Iterator[tuple[Any, Any]]:
    """The tensors and numbers of two states, pair by pair."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            yield from _tensors(found[key], value)
    elif isinstance(expected, list | tuple):
        for a, b in zip(found, expected, strict=True):
            yield from _tensors(a, b)
    else:
        yield found, expected
