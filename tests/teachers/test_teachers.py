"""Teachers: weights are read without running code, from timm and from anywhere; the published are timm's."""

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import timm.data
import torch
from helpers.small_teachers import IMAGENET, Evil, Outputs, pixels, save
from torch import nn

from softshard.teachers import PUBLISHED, Teacher, TeacherError, load_teacher
from softshard.teachers import published as published_module


@pytest.fixture
def resnet(tmp_path: Path) -> str:
    return save(timm.create_model("resnet10t", num_classes=10), tmp_path / "resnet.safetensors")


def test_weights_from_safetensors_and_pth_are_the_same(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=10)
    files = [save(model, tmp_path / f"w.{kind}") for kind in ("safetensors", "pth")]
    one, two = (load_teacher("resnet10t", "timm", file, 32, 10) for file in files)
    assert one.weights_digest() == two.weights_digest()
    assert torch.equal(one(pixels(32)), two(pixels(32)))


def test_the_digest_depends_on_every_weight(resnet: str) -> None:
    teacher = load_teacher("resnet10t", "timm", resnet, 32, 10)
    before = teacher.weights_digest()
    teacher.get_buffer("model.bn1.running_mean")[0] += 1e-6
    assert teacher.weights_digest() != before


def test_a_teacher_is_frozen_and_stays_in_eval_mode(resnet: str) -> None:
    teacher = load_teacher("resnet10t", "timm", resnet, 32, 10)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = teacher(pixels(32))
    nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher(pixels(32)), before)


def test_pixels_are_normalized_as_timm_does_it(resnet: str) -> None:
    teacher = load_teacher("resnet10t", "timm", resnet, 32, 10)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET[1:3])
    torch.testing.assert_close(teacher(pixels(32)), teacher.model((pixels(32) / 255 - mean) / std))


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"weight": torch.zeros(1), "run": Evil(tmp_path / "ran")}, path)
    with pytest.raises(
        TeacherError,
        match=r"evil.pth: expected a .safetensors file, or a .pth file of tensors only.*save the state_dict alone",
    ):
        load_teacher("resnet10t", "timm", str(path), 32, 10)
    assert not (tmp_path / "ran").exists()


def test_pickled_code_in_an_exported_folder_is_not_run(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=10)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=False)
    torch.save({"weight": torch.zeros(1), "run": Evil(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(TeacherError, match=r"expected a model and weights that timm can load"):
        load_teacher(f"local-dir:{tmp_path}", "timm", None, 32, 10)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x80\x02garbage", b"\x80\x02}q\x00.", b"\x08\0\0\0\0\0\0\0{}{}{}{}"]
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_broken_files_are_named(tmp_path: Path, content: bytes, suffix: str, library: Any) -> None:
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(content)
    model = {"timm": "resnet10t", "torchvision": "squeezenet1_1"}[library]
    with pytest.raises(TeacherError, match=f"broken.{suffix}: expected"):
        load_teacher(model, library, str(path), 32, 10)


@pytest.mark.parametrize("content", [[], torch.zeros(2), {}, {"epoch": 3}, {"model": {"w": 1.5}}, {3: torch.zeros(2)}])
def test_a_file_without_a_state_dict_is_named(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(TeacherError, match=r"other.pth: expected"):
        load_teacher("resnet10t", "timm", str(tmp_path / "other.pth"), 32, 10)


def test_a_missing_file_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TeacherError, match=r"none.pth: expected a file of weights, found none; correct the path"):
        load_teacher("resnet10t", "timm", "none.pth", 32, 10)
    assert capfd.readouterr().err == ""


def test_what_is_not_a_batch_of_logits_is_refused() -> None:
    wanted = r"teacher toy: expected floating-point logits \(2, 10\), found"
    for model, found in [
        (nn.Identity(), r"torch.float32 \(2, 3, 8, 8\)"),
        (Outputs(lambda x: (x, x)), "tuple"),
        (Outputs(lambda x: x.flatten(1).long()[:, :10]), r"torch.int64 \(2, 10\)"),
    ]:
        with pytest.raises(TeacherError, match=f"{wanted} {found}; use a classifier"):
            Teacher("toy", "timm", model, 10, IMAGENET)(pixels(8))


def test_an_unknown_name_gets_near_matches() -> None:
    with pytest.raises(TeacherError, match=r"expected a timm model name, found 'resnet5O'; near: resnet50"):
        load_teacher("resnet5O", "timm", None, 224, 1000)


def test_an_unknown_tag_gets_near_matches() -> None:
    with pytest.raises(TeacherError, match=r"found 'resnet50.a1_in2k'; near: resnet50.a1_in1k"):
        load_teacher("resnet50.a1_in2k", "timm", None, 224, 1000)


def test_the_models_own_settings_are_the_default(tmp_path: Path, resnet: str) -> None:
    teacher = load_teacher("resnet10t", "timm", resnet, None, 10)
    assert (teacher.library, teacher.size, teacher.interpolation) == ("timm", 176, "bicubic")
    bilinear = save(timm.create_model("resnet18", num_classes=10), tmp_path / "resnet18.pth")
    assert load_teacher("resnet18.tv_in1k", "timm", bilinear, 32, 10).interpolation == "bilinear"
    vit = save(timm.create_model("vit_tiny_patch16_224", num_classes=10), tmp_path / "vit.pth")
    teacher = load_teacher("vit_tiny_patch16_224", "timm", vit, None, 10)
    assert (teacher.size, teacher.interpolation) == (224, "bicubic")
    assert (teacher.mean / 255).flatten().tolist() == pytest.approx([0.5] * 3)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_transformer_is_built_for_the_size_of_the_recipe(tmp_path: Path, kind: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64)
    teacher = load_teacher("vit_tiny_patch16_224", "timm", save(model, tmp_path / f"w.{kind}"), 64, 10)
    assert teacher(pixels(64)).shape == (2, 10)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in teacher.model.state_dict().items())


def test_position_embeddings_are_resampled_as_timm_does_it(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    file = save(timm.create_model(name, num_classes=10, img_size=64), tmp_path / "w.safetensors")
    overlay = {"file": file, "num_classes": 10}
    expected = timm.create_model(name, pretrained=True, num_classes=10, img_size=96, pretrained_cfg_overlay=overlay)
    teacher = load_teacher(name, "timm", file, 96, 10)
    states = teacher.model.state_dict(), expected.state_dict()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    assert teacher(pixels(96)).shape == (2, 10)


def test_a_distilled_teacher_gives_the_average_of_its_heads(tmp_path: Path) -> None:
    name = "deit_tiny_distilled_patch16_224"
    file = save(timm.create_model(name, num_classes=10, img_size=64), tmp_path / "w.safetensors")
    teacher = load_teacher(name, "timm", file, 64, 10)
    network: Any = teacher.model
    features = network.forward_features((pixels(64) - teacher.mean) / teacher.std)
    heads = network.head(features[:, 0]), network.head_dist(features[:, 1])
    torch.testing.assert_close(teacher(pixels(64)), (heads[0] + heads[1]) / 2)


@pytest.mark.parametrize(("model", "size"), [("resnet10t", 32), ("vit_tiny_patch16_224", 64)])
@pytest.mark.parametrize("other", ["resnet18", "deit_tiny_patch16_224"])
def test_weights_of_another_model_are_refused(tmp_path: Path, model: str, size: int, other: str) -> None:
    file = save(timm.create_model(other, num_classes=7), tmp_path / "w.safetensors")
    with pytest.raises(TeacherError, match=r"w.safetensors: expected the weights of this model, found others"):
        load_teacher(model, "timm", file, size, 10)


def test_weights_that_break_timms_filter_are_named(tmp_path: Path) -> None:
    torch.save({"patch_embed.proj.weight": torch.zeros(3, 5)}, tmp_path / "w.pth")
    with pytest.raises(TeacherError, match=r"w.pth: expected the weights of this model, found others"):
        load_teacher("vit_tiny_patch16_224", "timm", str(tmp_path / "w.pth"), 64, 10)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"expected a folder with config.json, found none"):
        load_teacher(f"local-dir:{tmp_path}", "timm", None, 32, 10)


@pytest.mark.parametrize("size", [None, 32])
def test_an_exported_folder_is_a_teacher(tmp_path: Path, size: int | None) -> None:
    model = timm.create_model("resnet10t", num_classes=10)
    timm.models.save_for_hf(model, str(tmp_path), model_config={"num_classes": 10}, safe_serialization=True)
    teacher = load_teacher(f"local-dir:{tmp_path}", "timm", None, size, 10)
    assert teacher.size == (size or 176)
    with pytest.raises(TeacherError, match=r"expected 3 classes, as the recipe says, found 10; correct `classes`"):
        load_teacher(f"local-dir:{tmp_path}", "timm", None, size, 3)


def test_a_hub_out_of_reach_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TeacherError, match=r"teacher resnet10t: expected .* timm can load.*local file as `checkpoint`"):
        load_teacher("resnet10t", "timm", None, 32, 1000)


def test_an_exported_transformer_of_another_size_is_named(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    teacher = load_teacher(f"local-dir:{tmp_path}", "timm", None, 32, 10)
    with pytest.raises(TeacherError, match=r"expected a model for 32 x 32 pixels, found: .*; set `size`"):
        teacher(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_teacher_is_timms(name: str) -> None:
    config, entry = timm.get_pretrained_cfg(name, allow_unregistered=False), PUBLISHED[name]
    assert config is not None
    assert config.has_weights
    assert name in timm.list_pretrained()
    assert config.num_classes == 1000
    assert 80 < entry.top1 < 90
    paper = entry.source.split("; ")[0].split(", ")[-1]
    row = f"| {entry.name} | {name} | {paper} | {entry.top1:.3f} | {config.input_size[-1]} |"
    assert row in (published_module.__doc__ or "").splitlines()


def test_beitv2_takes_imagenets_mean_and_deviation() -> None:
    config = timm.get_pretrained_cfg("beitv2_base_patch16_224.in1k_ft_in22k_in1k")
    assert config is not None
    assert (config.mean, config.std) == (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
