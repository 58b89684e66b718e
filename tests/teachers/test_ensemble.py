"""Ensembles: the naive mean, one teacher exactly, nothing that is not finite unseen."""

import math
from itertools import permutations
from typing import Literal

import pytest
import torch
from helpers.small_teachers import IMAGENET, Outputs, pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from softshard.teachers import Ensemble, Teacher, TeacherError

Mean = Literal["probabilities", "logits"]
MEANS: tuple[Mean, ...] = ("probabilities", "logits")


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.sampled_from([4, 8]), min_size=1, max_size=4),
    mean=st.sampled_from(MEANS),
    flip=st.booleans(),
    data=st.data(),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_an_ensemble_is_the_naive_mean(
    seed: int, sizes: list[int], mean: Mean, flip: bool, data: st.DataObject
) -> None:
    weight = st.floats(0.01, 100)
    weights = data.draw(st.lists(weight, min_size=len(sizes), max_size=len(sizes)))
    teachers, images = toys(sizes, seed), views(seed)
    expected = naive(teachers, weights, mean, flip, images)
    if len(teachers) == 1 and not flip and mean == "probabilities":
        expected = teachers[0](images[sizes[0]]).double()
    found = Ensemble(teachers, weights, mean, flip)(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("flip", [False, True])
def test_neither_order_nor_scale_of_the_weights_matters(mean: Mean, flip: bool) -> None:
    teachers, images = toys([4, 8, 8], 1), views(1)
    weights = [0.5, 3.0, 1.25]
    expected = Ensemble(teachers, weights, mean, flip)(images)
    for order in permutations(range(3)):
        found = Ensemble([teachers[index] for index in order], [weights[index] for index in order], mean, flip)(images)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for scale in (1e-30, 0.1, 7, 1e30):
        found = Ensemble(teachers, [weight * scale for weight in weights], mean, flip)(images)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", MEANS)
def test_one_teacher_alone_gives_its_logits_bit_for_bit(mean: Mean) -> None:
    [teacher], images = toys([8], 2), views(2)
    assert torch.equal(Ensemble([teacher], [0.3], mean, flip=False)(images), teacher(images[8]))


@pytest.mark.parametrize("mean", MEANS)
def test_flip_is_the_mean_of_a_view_and_its_mirror_image(mean: Mean) -> None:
    [teacher], images = toys([8], 3), views(3)
    ensemble = Ensemble([teacher], [2.0], mean, flip=True)
    both = torch.stack([teacher(images[8]), teacher(images[8].flip(-1))]).double()
    expected = both.mean(0) if mean == "logits" else both.softmax(-1).mean(0).log()
    torch.testing.assert_close(ensemble(images).double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both[0], both[1])


@pytest.mark.parametrize("mean", MEANS)
def test_with_flip_mirrored_views_have_the_same_label(mean: Mean) -> None:
    images = views(4)
    ensemble = Ensemble(toys([4, 8], 4), [1.0, 2.0], mean, flip=True)
    mirrored = {size: batch.flip(-1) for size, batch in images.items()}
    torch.testing.assert_close(ensemble(mirrored), ensemble(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(mean: Mean, flip: bool, value: float) -> None:
    teachers, images = toys([8, 8], 5), views(5)
    finite = Ensemble(teachers, [1.0, 1e-6], mean, flip)(images)
    teachers[1].model = _Spoilt(teachers[1].model, value)
    found = Ensemble(teachers, [1.0, 1e-6], mean, flip)(images)
    assert finite.isfinite().all()
    assert not found[1, 3].isfinite()
    torch.testing.assert_close(found[0], finite[0])


def test_confident_teachers_do_not_underflow() -> None:
    logits = [torch.tensor([[0.0, -400.0, -300.0]]), torch.tensor([[0.0, -300.0, -400.0]])]
    teachers = [Teacher("toy", "timm", Outputs(lambda _, row=row: row), 3, IMAGENET) for row in logits]
    found = Ensemble(teachers, [1, 1], "probabilities", flip=False)({8: pixels(8, 1)})
    torch.testing.assert_close(found, torch.tensor([[0.0, -300 - math.log(2), -300 - math.log(2)]]))


def test_members_stay_frozen_and_in_eval_mode() -> None:
    ensemble = Ensemble(toys([8, 4, 8], 6), [1, 1, 1], "logits", flip=False).train()
    assert ensemble.sizes == (4, 8)
    assert not any(module.training for teacher in ensemble.teachers for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())


def test_autocast_leaves_the_mean_in_single_precision() -> None:
    teachers, images = toys([8, 8], 7), views(7)
    ensemble = Ensemble(teachers, [1, 2], "logits", flip=False)
    with torch.autocast("cpu", torch.bfloat16):
        found, parts = ensemble(images), [teacher(images[8]) for teacher in teachers]
    torch.testing.assert_close(found, (parts[0] + 2 * parts[1]) / 3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]])
def test_weights_must_be_positive_and_finite(weights: list[float]) -> None:
    with pytest.raises(TeacherError, match=r"ensemble: expected 2 finite weights above 0, found \["):
        Ensemble(toys([8, 8], 8), weights, "logits", flip=False)


def test_teachers_of_other_classes_are_refused() -> None:
    with pytest.raises(TeacherError, match="ensemble: expected at least one teacher, found none"):
        Ensemble([], [], "logits", flip=False)
    [one], [other] = toys([8], 9), toys([8], 9, classes=4)
    with pytest.raises(TeacherError, match="ensemble: expected one class count, found toy 5, toy 4"):
        Ensemble([one, other], [1, 1], "logits", flip=False)


def toys(sizes: list[int], seed: int, classes: int = 5) -> list[Teacher]:
    """Linear teachers with dropout, whose logits spread over tens of nats."""
    generator = torch.Generator().manual_seed(seed)
    teachers = []
    for size in sizes:
        layer = nn.Linear(3 * size * size, classes)
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), layer)
        teachers.append(Teacher("toy", "timm", model, classes, IMAGENET._replace(size=size)))
    return teachers


def views(seed: int) -> dict[int, Tensor]:
    return {size: pixels(size, seed=seed) for size in (4, 8)}


def naive(teachers: list[Teacher], weights: list[float], mean: Mean, flip: bool, images: dict[int, Tensor]) -> Tensor:
    total = torch.zeros(2, 5, dtype=torch.float64)
    for teacher, weight in zip(teachers, weights, strict=True):
        batch = images[teacher.size]
        for view in [batch, batch.flip(-1)] if flip else [batch]:
            logits = teacher(view).double()
            part = logits if mean == "logits" else logits.softmax(-1)
            total += weight / sum(weights) / (2 if flip else 1) * part
    return total if mean == "logits" else total.log()


class _Spoilt(nn.Module):
    """The model, but for one logit of the second image."""

    def __init__(self, model: nn.Module, value: float) -> None:
        super().__init__()
        self.model, self.value = model, value

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        logits[1, 3] = self.value
        return logits
