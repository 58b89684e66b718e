"""Torchvision's classifiers as teachers, their weights read without running code."""

import re
import sys
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers.small_teachers import IMAGENET, Evil, pixels, save
from torch import nn
from torchvision.models import ViT_B_32_Weights

from softshard.teachers import TeacherError, load_teacher


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_a_torchvision_teacher_gives_the_models_logits(tmp_path: Path, name: str, kind: str) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    teacher = load_teacher(name, "torchvision", save(model, tmp_path / f"w.{kind}"), 64, 10)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET[1:3])
    torch.testing.assert_close(teacher(pixels(64)), model((pixels(64) / 255 - mean) / std))
    assert (teacher.library, teacher.classes, teacher.size) == ("torchvision", 10, 64)


def test_torchvisions_own_settings_are_the_default(tmp_path: Path) -> None:
    for name, size, interpolation in [("squeezenet1_1", 224, "bilinear"), ("efficientnet_b2", 288, "bicubic")]:
        file = save(torchvision.models.get_model(name, num_classes=10), tmp_path / "w.pth")
        teacher = load_teacher(name, "torchvision", file, None, 10)
        assert (teacher.size, teacher.interpolation) == (size, interpolation)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("squeezenet1_l", "near: squeezenet1_1"),
        ("fasterrcnn_resnet50_fpn", "torchvision.models.list_models"),
        ("quantized_resnet18", "near: resnet18"),
        ("ResNet18", "near: resnet18"),
    ],
)
def test_what_is_not_a_torchvision_classifier_is_refused(name: str, hint: str) -> None:
    with pytest.raises(TeacherError, match=rf"expected a torchvision classification model, found '{name}'; .*{hint}"):
        load_teacher(name, "torchvision", None, None, 1000)


@pytest.mark.parametrize("name", ["squeezenet1_1", "vit_b_32"])
def test_torchvision_weights_out_of_reach_are_named(
    monkeypatch: pytest.MonkeyPatch, tiny_vit: str, tmp_path: Path, name: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    model = tiny_vit if name.startswith("vit") else name
    url = f"https://download.pytorch.org/models/{name}"
    with pytest.raises(TeacherError, match=rf"teacher {model}: expected .* found: .*no network.*fetch {url}"):
        load_teacher(model, "torchvision", None, None, 1000)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_torchvisions_position_embeddings_are_resampled(tmp_path: Path, tiny_vit: str, size: int) -> None:
    model: Any = torchvision.models.get_model(tiny_vit, num_classes=10, image_size=64)
    nn.init.normal_(model.heads.head.weight)  # zero at first
    teacher = load_teacher(tiny_vit, "torchvision", save(model, tmp_path / "w.pth"), size, 10)
    network: Any = teacher.model
    assert teacher(pixels(size)).shape == (2, 10)
    assert network.encoder.pos_embedding.shape[1] == (size // 32) ** 2 + 1
    assert torch.equal(network.encoder.pos_embedding, model.encoder.pos_embedding) == (size == 64)
    assert torch.equal(network.heads.head.weight, model.heads.head.weight)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.parametrize("aux", [False, True])
def test_inceptions_give_logits_alone(tmp_path: Path, name: str, aux: bool) -> None:
    options = {"init_weights": False, "transform_input": True}
    model = torchvision.models.get_model(name, num_classes=10, aux_logits=aux, **options).eval()
    teacher = load_teacher(name, "torchvision", save(model, tmp_path / "w.pth"), 96, 10)
    assert torch.equal(teacher(pixels(96)), model((pixels(96) - teacher.mean) / teacher.std))
    assert not any(key.lower().startswith("aux") for key in teacher.model.state_dict())


@pytest.mark.parametrize("name", ["densenet121", "mnasnet0_5"])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_models_whose_weights_changed_are_loaded(tmp_path: Path, name: str, kind: str) -> None:
    model = torchvision.models.get_model(name, num_classes=10)
    teacher = load_teacher(name, "torchvision", save(model, tmp_path / f"w.{kind}"), 64, 10)
    old = {re.sub(r"(denselayer\d+\.(norm|conv))", r"\1.", key): value for key, value in model.state_dict().items()}
    torch.save(old, tmp_path / "old.pth")
    published = load_teacher(name, "torchvision", str(tmp_path / "old.pth"), 64, 10)
    assert ("denselayer1.norm.1." in "".join(old)) == (name == "densenet121")
    assert teacher.weights_digest() == published.weights_digest()
    assert torch.equal(teacher(pixels(64)), model.eval()((pixels(64) - teacher.mean) / teacher.std))


def test_torchvisions_hub_cache_is_used_and_not_unpickled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    model = torchvision.models.get_model("squeezenet1_1")
    torch.save(model.state_dict(), file)
    teacher = load_teacher("squeezenet1_1", "torchvision", None, None, 1000)
    assert (
        teacher.weights_digest() == load_teacher("squeezenet1_1", "torchvision", str(file), 64, 1000).weights_digest()
    )
    with pytest.raises(TeacherError, match=r"expected 10 classes, as the recipe says, found 1000"):
        load_teacher("squeezenet1_1", "torchvision", None, None, 10)
    torch.save({"run": Evil(tmp_path / "ran")}, file)
    with pytest.raises(TeacherError, match=r"teacher squeezenet1_1: expected .* that torchvision can load"):
        load_teacher("squeezenet1_1", "torchvision", None, None, 1000)
    assert not (tmp_path / "ran").exists()


def test_torchvision_weights_of_another_model_are_refused(tmp_path: Path, tiny_vit: str) -> None:
    odd = {"encoder.pos_embedding": torch.zeros(1, 4, 8)}
    file = save(torchvision.models.get_model("squeezenet1_1", num_classes=7), tmp_path / "w.pth")
    torch.save(odd, tmp_path / "odd.pth")
    for model, path in [("squeezenet1_1", file), ("mobilenet_v3_small", file), (tiny_vit, str(tmp_path / "odd.pth"))]:
        with pytest.raises(TeacherError, match=r"\.pth: expected the weights of this model, found others"):
            load_teacher(model, "torchvision", path, None, 10)


def test_an_input_size_that_a_torchvision_model_cannot_have_is_named(tmp_path: Path, tiny_vit: str) -> None:
    with pytest.raises(TeacherError, match=rf"teacher {tiny_vit}: expected .* indivisible .* correct `size`"):
        load_teacher(tiny_vit, "torchvision", str(tmp_path / "w.pth"), 50, 10)


@pytest.fixture
def tiny_vit(monkeypatch: pytest.MonkeyPatch) -> str:
    """One layer under the weights of vit_b_32, which would be 350 MB."""

    def vit_tiny_32(*, weights: ViT_B_32_Weights | None = None, image_size: int = 224, num_classes: int = 1000):
        assert weights is None
        return torchvision.models.VisionTransformer(image_size, 32, 1, 2, 8, 16, num_classes=num_classes)

    vit_tiny_32.__module__ = "torchvision.models.vision_transformer"
    builders = sys.modules["torchvision.models._api"].BUILTIN_MODELS
    monkeypatch.setitem(builders, "vit_tiny_32", vit_tiny_32)
    return "vit_tiny_32"
