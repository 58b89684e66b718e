"""Students for tests: stock models at small sizes, one in ordinary modules, and what training might leave of them."""

import functools
from typing import Literal, get_args

import pytest
import torch
from helpers.small_weights import calibrate, randomise
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from softshard.trainer.students import build_student, expand, fold
from softshard.trainer.students.trace import Kind

# Odd sizes make stride 2 and "same" padding fall differently on the two sides.
MODELS: dict[str, tuple[Literal["timm", "torchvision"], int, dict[str, int]]] = {
    "mobilenetv2_100": ("timm", 64, {"depthwise": 17, "pointwise": 34, "dense": 1}),
    "mobilenetv3_large_100": ("timm", 65, {"depthwise": 15, "pointwise": 30, "dense": 1}),
    "ghostnetv2_100": ("timm", 64, {"depthwise": 69, "pointwise": 52, "dense": 1}),
    "tf_efficientnet_lite0": ("timm", 65, {"depthwise": 16, "pointwise": 32, "dense": 1}),
    "mobilenetv4_conv_small": ("timm", 65, {"depthwise": 15, "pointwise": 28, "dense": 3}),
    "efficientnet_lite0": ("timm", 65, {"depthwise": 16, "pointwise": 32, "dense": 1}),
    "resnet18": ("timm", 65, {"pointwise": 3, "dense": 17}),
    "regnety_002": ("timm", 64, {"pointwise": 30, "grouped": 13, "dense": 1}),
    "fastvit_t8": ("timm", 64, {"depthwise": 10}),
    "mobilenet_v2": ("torchvision", 65, {"depthwise": 17, "pointwise": 34, "dense": 1}),
    "shufflenet_v2_x1_0": ("torchvision", 64, {"depthwise": 19, "pointwise": 36, "dense": 1}),
}
ALL_KINDS = get_args(Kind)
each_model = pytest.mark.parametrize("name", MODELS)


def stock(name):
    return build_student(name, 10, library=MODELS[name][0])


def expanded(model, name, implementation="auto"):
    """With the default kinds, or with all of them where most convolutions are dense or grouped."""
    kinds = ALL_KINDS if name in ("resnet18", "regnety_002", "mobilenetv4_conv_small") else ALL_KINDS[:2]
    example = images(name, 1).to(next(model.parameters()).dtype)
    return expand(model, example, conv_types=kinds, implementation=implementation)


def images(name, count, seed=0):
    size = MODELS[name][1]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@functools.cache
def trained(name):
    """An expanded model with weights and statistics as training might leave them (float64; copy before changing)."""
    torch.manual_seed(0)
    return calibrate(randomise(expanded(stock(name), name)).double(), images(name, 8).double())


@torch.no_grad()
def difference(a, b, x):
    """Largest difference of two models' outputs, relative to the largest output."""
    a, b = a(x), b(x)
    assert a.std(0).min() > 1e-3 * a.abs().max(), "outputs that do not depend on the images prove nothing"
    return ((a - b).abs().max() / a.abs().max()).item()


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        Conv2dSame(8, 8, 5, stride=2, groups=8, bias=True),
        BatchNormAct2d(8, act_layer=nn.PReLU, eps=1e-3),
        nn.Conv2d(8, 8, 1, bias=False),
        nn.BatchNorm2d(8, momentum=0.05),
        nn.Conv2d(8, 16, 1, bias=True),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def small_images(seed=3):
    return torch.randn(16, 3, 17, 19, generator=torch.Generator().manual_seed(seed)).double()


def small_expanded(seed=0):
    return expand(small(seed).double(), small_images()[:1])


def train(model, steps):
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for seed in range(steps):
        optimizer.zero_grad()
        (model(small_images(seed)) - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


def small_trained():
    return train(randomise(small_expanded()), 3)


def assert_folds_into_a_stock_model(expanded):
    plain = small(seed=9).double().eval()
    plain.load_state_dict(fold(expanded).state_dict(), strict=True)
    assert difference(expanded, plain, small_images()) <= 1e-12
