"""Soft labels and losses on the device against the CPU."""

import itertools
from typing import Any, get_args

import torch
from torch import Tensor

from gpu_stages.stage import Check, Outcome, Setting
from softshard.pipeline.store.topk import (
    Codes,
    SoftLabels,
    decode,
    decode_on,
    encode,
    encode_on_device,
    encode_template,
    to_codes,
)
from softshard.trainer.losses import TailPolicy, distillation_loss, mixed_labels

TEMPERATURES = (1.0, 2.0, 4.0)
# Decoding: the largest difference of a probability. Both sides are float32, whose exp and log differ in the last bits.
DECODED = 1e-5
# Encoding: for the same reason a rare value lies on the other side of a rounding border, one of some ten thousand.
CODES_OFF, ALWAYS_ALLOWED = 1e-3, 2
# Losses against float64: relative to the largest entry; gradients of half logits are in half precision themselves.
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def checks(setting: Setting) -> list[Check]:
    return [
        Check("soft labels: decoding", check_decoding),
        Check("soft labels: encoding", check_encoding),
        Check("losses", check_losses),
    ]


def logits_of(rows: int, classes: int, seed: int = 0) -> Tensor:
    """Some classes stand out, as in a teacher's logits; float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator) * 2 + 8 * torch.rand(rows, 1, generator=generator).pow(8) * (
        torch.rand(rows, classes, generator=generator) > 0.99
    )


def shapes(setting: Setting) -> list[tuple[int, int, int]]:
    """Rows, classes, k: also one class, all classes, and more classes than 16 bits count."""
    rows = 8 if setting.tiny else 1024
    found = [(rows, 1000, 10), (rows, 1000, 1), (rows, 10, 10), (rows, 10, 5)]
    return found if setting.tiny else [*found, (64, 70000, 10)]


def check_decoding(setting: Setting) -> Outcome:
    """Copied and decoded on the device, as training does it, against decoded on the CPU."""
    outcome, worst = Outcome(), 0.0
    for (rows, classes, k), temperature in itertools.product(shapes(setting), TEMPERATURES):
        logits = logits_of(rows, classes)
        codes, template = encode(logits, k), encode_template(logits[:, None]).numpy()
        for shape in (None, template):
            found = decode_on(torch.device(setting.device), codes, classes, temperature, shape)
            expected = decode_on(torch.device("cpu"), codes, classes, temperature, shape)
            difference = _difference(found, expected)
            worst = max(worst, difference)
            what = f"{classes} classes, k = {k}, T = {temperature:g}, {'template' if shape is not None else 'uniform'}"
            outcome.expect(difference <= DECODED, f"{what}: probabilities differ by {difference:.1e}")
    outcome.figures = {"largest difference": worst}
    return outcome


def _difference(found: SoftLabels, expected: SoftLabels) -> float:
    """The largest difference of probabilities; infinite where other classes are named."""
    if not torch.equal(found.index.cpu(), expected.index):
        return float("inf")
    pairs = zip(found[1:], expected[1:], strict=True)
    return max(float((a.cpu() - b).abs().max()) for a, b in pairs if a is not None and b is not None)


def check_encoding(setting: Setting) -> Outcome:
    """The same classes in the same order; gaps, tails and templates that differ rarely, and then by one step."""
    outcome, worst = Outcome(), dict[str, float]()
    for rows, classes, k in shapes(setting):
        logits = logits_of(rows, classes)
        logits[0, : classes // 2] = logits[0, 0]  # equal logits are ranked by class
        expected, template = encode(logits, k), encode_template(logits[:, None])
        encoded = encode_on_device(logits.to(setting.device), k)
        found = to_codes(encoded, classes)
        what = f"{classes} classes, k = {k}"
        outcome.expect(bool(encoded.valid.all()), f"{what}: rows that are taken for no distribution")
        outcome.expect((found.index == expected.index).all(), f"{what}: other classes, or in another order")
        shape = encode_template(logits.to(setting.device)[:, None]).cpu()
        there, here = _arrays(found, shape), _arrays(expected, template)
        for name, value in there.items():
            off = (value - here[name]).abs()
            count, number = int((off > 0).sum()), max(1, off.numel())
            worst[name] = max(count / number, worst.get(name, 0.0))
            allowed = max(ALWAYS_ALLOWED, CODES_OFF * number)
            outcome.expect(count <= allowed, f"{what}: {count} of {number} {name} differ")
            outcome.expect(count == 0 or int(off.max()) <= 1, f"{what}: {name} differ by more than a step")
    outcome.figures = {"part that differs": worst}
    return outcome


def _arrays(codes: Codes, template: Tensor) -> dict[str, Tensor]:
    """Gaps as what they add up to: one rounding more changes two of them."""
    gaps = torch.from_numpy(codes.gap.astype("int64")).cumsum(1)
    return {"gaps": gaps.flatten(), "tails": torch.from_numpy(codes.tail.astype("int64")), "templates": template.long()}


def check_losses(setting: Setting) -> Outcome:
    """Every tail policy, with and without a template, hard and mixed labels, logits of every dtype."""
    outcome, worst = Outcome(), dict[str, float]()
    kinds = list(itertools.product(get_args(TailPolicy), (False, True), (False, True), TOLERANCES))
    for tail, with_template, mixed, dtype in kinds:
        loss, gradient = _loss(setting.device, dtype, tail, with_template, mixed)
        expected = _loss("cpu", torch.float64, tail, with_template, mixed, rounded=dtype)
        error = max(_error(loss, expected[0]), _error(gradient, expected[1]))
        name = str(dtype).removeprefix("torch.")
        worst[name] = max(error, worst.get(name, 0.0))
        what = f"{tail}, {'template' if with_template else 'uniform'}, {'mixed' if mixed else 'hard'}, {name}"
        outcome.expect(error <= TOLERANCES[dtype], f"{what}: error {error:.1e}")
    outcome.figures = {"worst errors": worst}
    return outcome


def _loss(
    device: str, dtype: torch.dtype, tail: Any, with_template: bool, mixed: bool, rounded: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient; `rounded`: logits are rounded to this dtype first."""
    rows, classes, k = 64, 100, 5
    teacher = logits_of(rows, classes)
    codes, template = encode(teacher, k), encode_template(teacher[:, None])
    index, gap, mass = (part.to(device) for part in codes.tensors())
    soft = decode(index, gap, mass, classes, 2.0, template.to(device) if with_template else None)
    hard, other = torch.arange(rows, device=device) % classes, torch.arange(rows, device=device) * 7 % classes
    if mixed:
        hard = mixed_labels(hard, other, torch.linspace(0, 1, rows, device=device), classes)
    logits = logits_of(rows, classes, seed=1).to(rounded or dtype).to(device, dtype).requires_grad_()
    settings: Any = {"alpha": 0.9, "temperature": 2.0, "tail": tail, "label_smoothing": 0.1}
    loss = distillation_loss(logits, hard, [(1.0, soft)], **settings).total
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max())
