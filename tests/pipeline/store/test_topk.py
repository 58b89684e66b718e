"""The codec: what is stored is within its stated error, decoding is the dense distribution it stands for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.store.topk import Codes, SoftLabels, decode, encode, encode_template, index_dtype

SETTINGS = settings(derandomize=True, deadline=None, max_examples=150)
HALF_STEP = 1 / 32 + 1e-9


@st.composite
def logits_and_k(draw: st.DrawFn, max_classes: int = 12) -> tuple[Tensor, int]:
    classes = draw(st.integers(2, max_classes))
    scale = draw(st.sampled_from([0.5, 5.0, 40.0]))
    shape = (draw(st.integers(1, 4)), classes)
    # hypothesis likes to repeat values, which makes the ties
    logits = draw(arrays(np.float64, shape, elements=st.floats(-scale, scale)))
    return torch.from_numpy(logits), draw(st.integers(1, classes))


@st.composite
def random_codes(draw: st.DrawFn) -> tuple[Codes, int]:
    classes = draw(st.integers(2, 12))
    k, rows = draw(st.integers(1, classes)), draw(st.integers(1, 4))
    index = np.stack([draw(st.permutations(range(classes)))[:k] for _ in range(rows)]).astype(np.uint16)
    gap = draw(arrays(np.uint8, (rows, k - 1)))
    tail = draw(arrays(np.uint8, (rows,)))
    return Codes(index, gap, tail), classes


def decoded(codes: Codes, classes: int, temperature: float) -> SoftLabels:
    index, gap, tail = (torch.from_numpy(array) for array in (codes.index, codes.gap, codes.tail))
    return decode(index, gap, tail, classes, temperature)


def dense(codes: Codes, classes: int, temperature: float) -> Tensor:
    """The distribution that codes stand for, float64 [B, C], written class by class."""
    rows, k = codes.index.shape
    logits = torch.empty(rows, classes, dtype=torch.float64)
    for row in range(rows):
        if k < classes:
            logits[row, :] = (int(codes.tail[row]) - 176) / 16 - np.log(classes - k)
        for rank in range(k):
            logits[row, int(codes.index[row, rank])] = -sum(int(step) for step in codes.gap[row, :rank]) / 16
    return torch.softmax(logits / temperature, dim=1)


def log_ratios(logits: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """log(p_k / p_1) of the top k, and log(tail mass / p_1), from an independent numpy computation."""
    ranked = -np.sort(-logits.double().numpy(), axis=1)
    ranked = ranked - ranked[:, :1]
    with np.errstate(divide="ignore"):
        return ranked[:, :k], np.log(np.exp(ranked[:, k:]).sum(axis=1))


@given(logits_and_k())
@SETTINGS
def test_index_ranks_classes_and_breaks_ties_by_class(case: tuple[Tensor, int]) -> None:
    logits, k = case
    expected = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(encode(logits, k).index, expected)


@given(logits_and_k())
@SETTINGS
def test_stored_ratios_are_within_half_a_step_and_errors_do_not_add_up(case: tuple[Tensor, int]) -> None:
    logits, k = case
    codes = encode(logits, k)
    exact, _ = log_ratios(logits, k)
    stored = -np.cumsum(codes.gap, axis=1, dtype=np.int64) / 16
    unsaturated = np.cumsum(codes.gap == 255, axis=1) == 0
    assert np.all(np.abs(stored - exact[:, 1:])[unsaturated] <= HALF_STEP)


@given(logits_and_k())
@SETTINGS
def test_tail_is_within_half_a_step_or_saturated(case: tuple[Tensor, int]) -> None:
    logits, k = case
    tail = encode(logits, k).tail.astype(np.int64)
    _, exact = log_ratios(logits, k)
    if k == logits.shape[1]:
        assert np.all(tail == 0)
        return
    stored = (tail - 176) / 16
    inside = (tail > 0) & (tail < 255)
    assert np.all(np.abs(stored - exact)[inside] <= HALF_STEP)
    assert np.all(exact[tail == 0] <= -11 + HALF_STEP)
    assert np.all(exact[tail == 255] >= 79 / 16 - HALF_STEP)


@given(random_codes(), st.sampled_from([0.5, 1.0, 2.0, 4.0, 20.0]))
@SETTINGS
def test_decode_is_the_dense_distribution(case: tuple[Codes, int], temperature: float) -> None:
    codes, classes = case
    soft = decoded(codes, classes, temperature)
    expected = dense(codes, classes, temperature)
    top = expected.gather(1, soft.index)
    torch.testing.assert_close(soft.probability.double(), top, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(soft.tail.double(), 1 - top.sum(dim=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(soft.probability.sum(dim=1) + soft.tail, torch.ones(len(codes)))
    if codes.index.shape[1] == classes:
        assert torch.all(soft.tail == 0)
    assert (soft.index.dtype, soft.probability.dtype, soft.tail.dtype) == (torch.int64, torch.float32, torch.float32)


@given(logits_and_k(), st.sampled_from([1.0, 2.0, 4.0]))
@SETTINGS
def test_all_classes_decode_to_the_teacher_at_any_temperature(case: tuple[Tensor, int], temperature: float) -> None:
    logits, _ = case
    classes = logits.shape[1]
    codes = encode(logits, classes)
    if np.any(codes.gap == 255):
        return
    soft = decoded(codes, classes, temperature)
    exact = torch.log_softmax(logits / temperature, dim=1).gather(1, soft.index)
    # a log-probability is off by its own half step and by the average of the others'
    assert torch.all((soft.probability.double().log() - exact).abs() <= 2 / 32 / temperature + 1e-5)


@given(logits_and_k())
@SETTINGS
def test_half_precision_logits_are_computed_in_single(case: tuple[Tensor, int]) -> None:
    logits, k = case
    for dtype in (torch.float16, torch.bfloat16):
        low = logits.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found = encode(low, k)
        expected = encode(low.float(), k)
        for name in ("index", "gap", "tail"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_double_logits_stay_double() -> None:
    logits = torch.tensor([[1.0, 1.0 + 1e-12, 0.0]], dtype=torch.float64)
    assert encode(logits, 2).index.tolist() == [[1, 0]]
    assert encode(logits.float(), 2).index.tolist() == [[0, 1]]


def test_gaps_saturate_and_impossible_classes_are_kept_last() -> None:
    codes = encode(torch.tensor([[0.0, -100.0, -101.0, -torch.inf, -torch.inf]]), 5)
    assert codes.index.tolist() == [[0, 1, 2, 3, 4]]
    assert codes.gap.tolist() == [[255, 16, 255, 0]]
    assert encode(torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]]), 2).tail.tolist() == [0]


def test_equal_logits_are_ranked_by_class_among_many() -> None:
    codes = encode(torch.zeros(3, 5000), 40)
    assert codes.index.tolist() == [list(range(40))] * 3
    assert not codes.gap.any()


def test_a_confident_teachers_tail_is_not_lost() -> None:
    """Its mass is 2e-5: 1 - sum in half a float's precision would be off or zero."""
    logits = torch.full((1, 1000), -17.0)
    logits[0, 7] = 0.0
    expected = round(16 * (np.log(995) - 17)) + 176
    assert encode(logits, 5).tail.tolist() == [expected]
    assert expected > 0


def test_k_of_one_has_no_gaps() -> None:
    codes = encode(torch.tensor([[0.0, 2.0, 1.0]]), 1)
    assert codes.index.tolist() == [[1]]
    assert codes.gap.shape == (1, 0)
    soft = decoded(codes, 3, 1.0)
    assert soft.probability.item() == pytest.approx(1 / (1 + np.exp(-1) + np.exp(-2)), rel=0.02)


@pytest.mark.parametrize(("classes", "dtype"), [(65534, np.uint16), (65535, np.uint32), (70001, np.uint32)])
def test_indices_above_16_bits(classes: int, dtype: type) -> None:
    assert index_dtype(classes) == dtype
    assert np.iinfo(index_dtype(classes)).max > classes
    logits = torch.zeros(2, classes)
    logits[:, -1] = 3.0
    codes = encode(logits, 2)
    assert codes.index.dtype == dtype
    assert codes.index.tolist() == [[classes - 1, 0]] * 2
    assert decoded(codes, classes, 1.0).index.tolist() == [[classes - 1, 0]] * 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_no_distribution_are_an_error(bad: float) -> None:
    logits = torch.zeros(4, 5)
    logits[1, 2] = logits[3, 0] = bad
    with pytest.raises(DataError, match="2 of 4 rows"):
        encode(logits, 3)
    with pytest.raises(DataError, match="1 of 1 rows"):
        encode(torch.full((1, 3), -torch.inf), 2)


def test_rows_are_gathered_and_concatenated() -> None:
    codes = encode(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), 4)
    again = Codes.concatenate([codes[:2], codes[np.array([3, 2])], codes[4:]])
    order = np.array([0, 1, 3, 2, 4, 5])
    assert len(again) == 6
    for name in ("index", "gap", "tail"):
        np.testing.assert_array_equal(getattr(again, name), getattr(codes, name)[order])


def dense_along(codes: Codes, template: Tensor, temperature: float) -> Tensor:
    """The teacher's distribution as codes and template have it, written out for each row, float64."""
    rows = []
    for index, gap, tail, shape in zip(codes.index, codes.gap, codes.tail, template.double(), strict=True):
        logits = -shape / 2
        top = torch.from_numpy(index.astype(np.int64))
        others = torch.ones(len(shape), dtype=torch.bool).scatter(0, top, False)
        mass = (int(tail) - 176) / 16
        logits[others] += mass - logits[others].logsumexp(0)
        logits[top] = torch.tensor([0, *np.cumsum(gap, dtype=np.int64)], dtype=torch.float64) / -16
        rows.append(torch.softmax(logits / temperature, 0))
    return torch.stack(rows)


@given(st.integers(0, 10**6), st.integers(2, 30), st.sampled_from([0.5, 1.0, 2.0, 20.0]), st.data())
@SETTINGS
def test_the_tail_lies_along_the_template(seed: int, classes: int, temperature: float, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = encode(3 * torch.randn(4, classes, generator=generator), data.draw(st.integers(1, classes - 1)))
    template = torch.randint(0, 256, (4, classes), generator=generator, dtype=torch.uint8)
    soft = decode(*codes.tensors(), classes, temperature, template)
    expected = dense_along(codes, template, temperature)
    assert soft.tail_distribution is not None
    found = (soft.tail[:, None] * soft.tail_distribution).scatter(1, soft.index, soft.probability)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(soft.tail_distribution.sum(dim=1), torch.ones(4))


@given(random_codes(), st.sampled_from([0.5, 1.0, 2.0, 20.0]))
@SETTINGS
def test_a_flat_template_is_no_template(case: tuple[Codes, int], temperature: float) -> None:
    codes, classes = case
    flat = torch.full((len(codes), classes), 9, dtype=torch.uint8)
    with_template, without = (decode(*codes.tensors(), classes, temperature, template) for template in (flat, None))
    torch.testing.assert_close(with_template[:3], without[:3], rtol=1e-4, atol=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 40))
@SETTINGS
def test_a_template_is_the_mean_in_half_nats(seed: int, views: int, classes: int) -> None:
    logits = 20 * torch.randn(3, views, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean = torch.log_softmax(logits, dim=2).mean(dim=1)
    below = mean.amax(dim=1, keepdim=True) - mean
    template = encode_template(logits)
    assert template.dtype == torch.uint8
    assert (template.min(dim=1).values == 0).all()
    assert ((template.double() / 2 - below).abs() <= 0.25 + 1e-9)[below < 127].all()
    assert (template[below > 127.5] == 255).all()


def test_impossible_classes_are_the_lowest_of_a_template() -> None:
    logits = torch.tensor([[[0.0, -1.0, -torch.inf], [0.0, -1.0, 0.0]]])
    assert encode_template(logits)[0, 2] == 255


@given(logits_and_k(), st.data())
@SETTINGS
def test_fewer_classes_are_what_encoding_fewer_gives(case: tuple[Tensor, int], data: st.DataObject) -> None:
    logits, k = case
    fewer = data.draw(st.integers(1, k))
    found, expected = encode(logits, k).top(fewer, logits.shape[1]), encode(logits, fewer)
    np.testing.assert_array_equal(found.index, expected.index)
    np.testing.assert_array_equal(found.gap, expected.gap)
    saturated = (encode(logits, k).gap == 255).any(axis=1) | (expected.tail == 0) | (expected.tail == 255)
    lost = encode(logits, k).tail  # a tail that saturated loses what it had beyond
    saturated |= (lost == 255) | ((lost == 0) & (k < logits.shape[1]))
    off = np.abs(found.tail.astype(int) - expected.tail.astype(int))
    assert np.all(off[~saturated] <= 1)


@given(st.integers(0, 10**6), st.sampled_from([2, 1000, 70_000]), st.data())
@settings(derandomize=True, deadline=None, max_examples=12)
def test_many_classes(seed: int, classes: int, data: st.DataObject) -> None:
    logits = 4 * torch.randn(2, classes, generator=torch.Generator().manual_seed(seed))
    k = data.draw(st.sampled_from(sorted({1, 2, min(classes, 255), classes})))
    codes = encode(logits, k)
    for temperature in (0.5, 1.0, 20.0):
        for template in (None, encode_template(logits[:, None])) if k < classes else (None,):
            soft = decode(*codes.tensors(), classes, temperature, template)
            total = soft.probability.double().sum(1) + soft.tail
            torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=0)
            assert (soft.probability >= 0).all()
