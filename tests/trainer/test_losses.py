"""The losses: each tail policy is the dense loss it stands for, in value and gradient, and never NaN."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from softshard.pipeline.store.topk import SoftLabels
from softshard.trainer.losses import TailPolicy, distillation_loss, mixed_labels, topk_kl

SETTINGS = settings(derandomize=True, deadline=None, max_examples=80)
POLICIES: tuple[TailPolicy, ...] = get_args(TailPolicy)
TEMPERATURES = st.sampled_from([0.7, 1.0, 2.0, 4.0])


def random_case(seed: int, classes: int, k: int, rows: int = 5, scale: float = 3.0) -> tuple[Tensor, SoftLabels]:
    """A student's logits and soft labels that were never quantized, float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    teacher = scale * torch.randn(rows, k + (k < classes), generator=generator, dtype=torch.float64)
    masses = torch.softmax(teacher, dim=1)
    index = torch.stack([torch.randperm(classes, generator=generator)[:k] for _ in range(rows)])
    tail = masses[:, k] if k < classes else torch.zeros(rows, dtype=torch.float64)
    return logits, SoftLabels(index, masses[:, :k], tail)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, SoftLabels]:
    classes = draw(st.integers(2, 15))
    return random_case(draw(st.integers(0, 10**6)), classes, draw(st.integers(1, classes)))


def with_tail_distribution(soft: SoftLabels, classes: int, seed: int) -> SoftLabels:
    """The same soft labels, their tail spread unevenly."""
    shape = torch.randn(len(soft.tail), classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return soft._replace(tail_distribution=torch.softmax(3 * shape.scatter(1, soft.index, -torch.inf), dim=1))


def dense_teacher(soft: SoftLabels, classes: int) -> Tensor:
    others = max(classes - soft.index.shape[1], 1)
    spread = (soft.tail / others)[:, None].repeat(1, classes)
    if soft.tail_distribution is not None:
        spread = soft.tail[:, None] * soft.tail_distribution
    return spread.scatter(1, soft.index, soft.probability)


def drop_reference(logits: Tensor, soft: SoftLabels, temperature: float) -> Tensor:
    teacher = torch.zeros_like(logits).scatter(1, soft.index, soft.probability)
    teacher = teacher / teacher.sum(dim=1, keepdim=True)
    return functional.kl_div(torch.log_softmax(logits / temperature, 1), teacher, reduction="batchmean")


def spread_reference(logits: Tensor, soft: SoftLabels, temperature: float) -> Tensor:
    teacher = dense_teacher(soft, logits.shape[1])
    return functional.kl_div(torch.log_softmax(logits / temperature, 1), teacher, reduction="batchmean")


def lump_reference(logits: Tensor, soft: SoftLabels, temperature: float) -> Tensor:
    student = torch.softmax(logits / temperature, 1)
    in_top = torch.zeros_like(student, dtype=torch.bool).scatter(1, soft.index, True)
    total = torch.zeros((), dtype=logits.dtype)
    for row in range(len(logits)):
        p, q = list(soft.probability[row]), list(student[row, soft.index[row]])
        if not in_top[row].all():
            p.append(soft.tail[row])
            q.append(student[row][~in_top[row]].sum())
        total = total + torch.stack([a * (a.log() - b.log()) for a, b in zip(p, q, strict=True)]).sum()
    return total / len(logits)


REFERENCES = {"drop": drop_reference, "lump": lump_reference, "spread": spread_reference}


def value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


@pytest.mark.parametrize("policy", POLICIES)
@given(case=cases(), temperature=TEMPERATURES)
@SETTINGS
def test_each_policy_is_its_dense_form(policy: TailPolicy, case: tuple[Tensor, SoftLabels], temperature: float) -> None:
    logits, soft = case
    found = value_and_gradient(lambda x: topk_kl(x, soft, temperature, policy), logits)
    expected = value_and_gradient(lambda x: REFERENCES[policy](x, soft, temperature), logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("policy", POLICIES)
@given(case=cases(), temperature=TEMPERATURES, seed=st.integers(0, 10**6))
@SETTINGS
def test_each_policy_is_its_dense_form_along_a_template(
    policy: TailPolicy, case: tuple[Tensor, SoftLabels], temperature: float, seed: int
) -> None:
    logits, soft = case
    if soft.index.shape[1] == logits.shape[1]:
        return
    soft = with_tail_distribution(soft, logits.shape[1], seed)
    found = value_and_gradient(lambda x: topk_kl(x, soft, temperature, policy), logits)
    expected = value_and_gradient(lambda x: REFERENCES[policy](x, soft, temperature), logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("policy", POLICIES)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 20), temperature=TEMPERATURES)
@SETTINGS
def test_with_all_classes_each_policy_is_the_dense_divergence(
    policy: TailPolicy, seed: int, classes: int, temperature: float
) -> None:
    logits, soft = random_case(seed, classes, classes)
    teacher = torch.zeros_like(logits).scatter(1, soft.index, soft.probability)

    def dense(x: Tensor) -> Tensor:
        return functional.kl_div(torch.log_softmax(x / temperature, 1), teacher, reduction="batchmean")

    found = value_and_gradient(lambda x: topk_kl(x, soft, temperature, policy), logits)
    torch.testing.assert_close(found, value_and_gradient(dense, logits), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("policy", POLICIES)
@given(case=cases())
@SETTINGS
def test_divergence_is_never_negative(policy: TailPolicy, case: tuple[Tensor, SoftLabels]) -> None:
    assert topk_kl(*case, 1.0, policy) >= -1e-12


@pytest.mark.parametrize("policy", ["lump", "spread"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_and_gradient_are_zero_at_agreement(policy: TailPolicy, temperature: float) -> None:
    _, soft = random_case(1, 12, 4)
    agreeing = temperature * dense_teacher(soft, 12).log()
    value, gradient = value_and_gradient(lambda x: topk_kl(x, soft, temperature, policy), agreeing)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("k", [1, 3, 6])
def test_zero_probabilities_and_extreme_logits_stay_finite(policy: TailPolicy, k: int) -> None:
    probability = torch.zeros(2, k)
    probability[:, 0] = 1.0
    soft = SoftLabels(torch.arange(k).repeat(2, 1), probability, torch.zeros(2))
    logits = torch.tensor([[1e4, -1e4, 0.0, 0.0, 5.0, 1.0], [-1e4, 1e4, 3e4, 0.0, 0.0, -3e4]])
    value, gradient = value_and_gradient(lambda x: topk_kl(x, soft, 1.0, policy), logits)
    expected, dense_gradient = value_and_gradient(lambda x: functional.cross_entropy(x, torch.zeros(2).long()), logits)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, dense_gradient)


def test_lump_keeps_a_students_tail_that_one_minus_the_sum_would_lose() -> None:
    logits = torch.tensor([[60.0, 30.0, 0.0, 0.0, 0.0]])
    soft = SoftLabels(torch.tensor([[0, 1]]), torch.tensor([[0.7, 0.2]]), torch.tensor([0.1]))
    found = value_and_gradient(lambda x: topk_kl(x, soft, 1.0, "lump"), logits)
    double = SoftLabels(soft.index, soft.probability.double(), soft.tail.double())
    value, gradient = value_and_gradient(lambda x: lump_reference(x, double, 1.0), logits.double())
    torch.testing.assert_close(found, (value.float(), gradient.float()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_computed_in_single(policy: TailPolicy, dtype: torch.dtype) -> None:
    logits, double = random_case(2, 12, 4)
    soft = SoftLabels(double.index, double.probability.float(), double.tail.float())
    hard, low = torch.arange(5), logits.to(dtype)

    def loss(x: Tensor) -> Tensor:
        both = [(1.0, soft)]
        return distillation_loss(x, hard, both, alpha=0.5, temperature=2.0, tail=policy, label_smoothing=0.1).total

    value, gradient = value_and_gradient(loss, low)
    expected, expected_gradient = value_and_gradient(loss, low.float())
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(low)
    assert value.dtype == inside.dtype == torch.float32
    torch.testing.assert_close((value, inside), (expected, expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize("policy", POLICIES)
def test_distillation_loss_weighs_hard_and_soft_labels(policy: TailPolicy) -> None:
    logits, soft = random_case(3, 12, 4)
    hard = torch.tensor([0, 3, 3, 11, 7])
    found = distillation_loss(logits, hard, [(1.0, soft)], alpha=0.9, temperature=3.0, tail=policy, label_smoothing=0.1)
    cross_entropy = functional.cross_entropy(logits, hard, label_smoothing=0.1)
    expected = 0.1 * cross_entropy + 0.9 * 9.0 * REFERENCES[policy](logits, soft, 3.0)
    torch.testing.assert_close(found, (expected, cross_entropy, 9.0 * REFERENCES[policy](logits, soft, 3.0)))


def test_without_soft_labels_only_the_hard_ones_count() -> None:
    logits, _ = random_case(4, 6, 2)
    hard = torch.tensor([0, 3, 3, 5, 2])
    found = distillation_loss(logits, hard, [], alpha=0.9, temperature=3.0, tail="drop", label_smoothing=0.1)
    assert found.soft == 0
    torch.testing.assert_close(found.total, functional.cross_entropy(logits, hard, label_smoothing=0.1))


def test_alpha_one_does_not_look_at_hard_labels() -> None:
    logits, soft = random_case(5, 6, 2)
    out_of_range = torch.full((5,), 99)
    for hard in (None, out_of_range):
        found = distillation_loss(
            logits, hard, [(1.0, soft)], alpha=1.0, temperature=2.0, tail="lump", label_smoothing=0.0
        )
        torch.testing.assert_close(found.total, 4 * topk_kl(logits, soft, 2.0, "lump"))
    with pytest.raises(AssertionError, match="hard labels"):
        distillation_loss(logits, None, [(1.0, soft)], alpha=0.5, temperature=2.0, tail="lump", label_smoothing=0.0)


def test_temperature_squared_keeps_the_gradients_size() -> None:
    """Without the factor the gradient shrinks with T^2 (Hinton et al.); with it, it tends to a constant."""
    logits, soft = random_case(6, 10, 10)
    flat = SoftLabels(soft.index, torch.softmax(soft.probability.log() / 50, 1), soft.tail)
    flatter = SoftLabels(soft.index, torch.softmax(soft.probability.log() / 100, 1), soft.tail)
    norms = [
        value_and_gradient(
            lambda x, s=s, t=t: (
                distillation_loss(
                    x, None, [(1.0, s)], alpha=1.0, temperature=t, tail="spread", label_smoothing=0.0
                ).total
            ),
            logits,
        )[1].norm()
        for s, t in ((flat, 50.0), (flatter, 100.0))
    ]
    torch.testing.assert_close(norms[0], norms[1], rtol=0.05, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_mixed_labels_is_the_mixed_loss(smoothing: float) -> None:
    """Also where the two labels are the same, and where nothing is mixed in."""
    logits, _ = random_case(3, 7, 2, rows=4)
    labels, others = torch.tensor([0, 6, 2, 3]), torch.tensor([5, 0, 2, 1])
    weights = torch.tensor([0.25, 0.5, 0.75, 1.0])
    mixed = mixed_labels(labels, others, weights, 7)

    def loss(hard: Tensor, row: slice | int = slice(None)) -> Tensor:
        rows = logits[row].reshape(-1, 7)
        options = {"alpha": 0.0, "temperature": 1.0, "tail": "drop", "label_smoothing": smoothing}
        return distillation_loss(rows, hard, [], **options).total  # pyright: ignore[reportArgumentType]

    expected = [
        weights[row] * loss(labels[row : row + 1], row) + (1 - weights[row]) * loss(others[row : row + 1], row)
        for row in range(4)
    ]
    assert mixed.sum(dim=1).tolist() == [1.0] * 4
    torch.testing.assert_close(loss(mixed), torch.stack(expected).mean())


def dense_loss(
    logits: Tensor, hard: Tensor, soft: list[tuple[float, SoftLabels]], alpha: float, temperature: float, policy: str
) -> Tensor:
    divergences = [weight * REFERENCES[policy](logits, labels, temperature) for weight, labels in soft]
    divergence = torch.stack(divergences).sum() / sum(weight for weight, _ in soft)
    smoothed = functional.cross_entropy(logits, hard, label_smoothing=0.1)
    return (1 - alpha) * smoothed + alpha * temperature**2 * divergence


@pytest.mark.parametrize("policy", POLICIES)
@given(case=cases(), seed=st.integers(0, 10**6), temperature=TEMPERATURES, alpha=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
@SETTINGS
def test_the_gradient_of_the_whole_loss_is_that_of_the_dense_form(
    policy: TailPolicy, case: tuple[Tensor, SoftLabels], seed: int, temperature: float, alpha: float
) -> None:
    """Two teachers of different k, one of them with a template; hard labels with smoothing."""
    logits, soft = case
    classes = logits.shape[1]
    generator = torch.Generator().manual_seed(seed)
    other = random_case(seed, classes, int(torch.randint(1, classes + 1, (), generator=generator)))[1]
    if other.index.shape[1] < classes:
        other = with_tail_distribution(other, classes, seed)
    both = [(1.0, soft), (0.5, other)]
    hard = torch.randint(0, classes, (len(logits),), generator=generator)
    options = {"alpha": alpha, "temperature": temperature, "tail": policy, "label_smoothing": 0.1}
    found = value_and_gradient(lambda x: distillation_loss(x, hard, both, **options).total, logits)
    expected = value_and_gradient(lambda x: dense_loss(x, hard, both, alpha, temperature, policy), logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("policy", ["drop", "spread"])
def test_several_teachers_pull_towards_the_mean_of_their_distributions(policy: TailPolicy) -> None:
    logits, one = random_case(7, 12, 12)
    _, two = random_case(8, 12, 12)
    options = {"alpha": 1.0, "temperature": 1.0, "tail": policy, "label_smoothing": 0.0}
    _, found = value_and_gradient(
        lambda x: distillation_loss(x, None, [(3.0, one), (1.0, two)], **options).total, logits
    )
    mean = 0.75 * dense_teacher(one, 12) + 0.25 * dense_teacher(two, 12)
    torch.testing.assert_close(found, (torch.softmax(logits, 1) - mean) / len(logits), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("policy", "with_template", "most"),
    [("drop", False, 2), ("lump", False, 3), ("spread", False, 2), ("spread", True, 3)],
)
def test_few_tensors_as_large_as_the_logits_are_kept(policy: TailPolicy, with_template: bool, most: int) -> None:
    """The student's log-probabilities for the hard and for the soft labels, those of the tail with lump, and the
    labels' own tail distribution: no dense distribution of a teacher is made for the backward pass."""
    logits, soft = random_case(9, 1000, 5)
    if with_template:
        soft = with_tail_distribution(soft, 1000, 9)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        distillation_loss(
            logits.requires_grad_(),
            torch.arange(5),
            [(1.0, soft)],
            alpha=0.9,
            temperature=2.0,
            tail=policy,
            label_smoothing=0.1,
        )
    assert len({tensor.data_ptr() for tensor in kept if tensor.shape == (5, 1000)}) <= most


@pytest.mark.parametrize("k", [3, 6])
def test_an_unknown_tail_policy_is_refused(k: int) -> None:
    """Also where there is no tail."""
    logits, soft = random_case(10, 6, k)
    with pytest.raises(ValueError, match=r"tail: expected one of drop, lump, spread, found 'spred'"):
        topk_kl(logits, soft, 1.0, "spred")  # pyright: ignore[reportArgumentType]
