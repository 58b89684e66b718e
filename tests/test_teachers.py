import math
import re
import sys
import urllib.error
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import timm.data
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import ViT_B_32_Weights

from teachers import PUBLISHED, Ensemble, Teacher, TeacherError, load_teacher
from teachers import published as published_module
from teachers.teacher import Preprocessing

IMAGENET = Preprocessing(8, timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD, "bicubic")
Mean = Literal["probabilities", "logits"]
MEANS: tuple[Mean, ...] = ("probabilities", "logits")


def save(model: nn.Module, path: Path) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_model(model, str(path))
    else:
        torch.save({"state_dict": model.state_dict()}, path)
    return str(path)


def pixels(size: int, count: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture
def resnet(tmp_path: Path) -> str:
    return save(timm.create_model("resnet10t", num_classes=10), tmp_path / "resnet.safetensors")


# --- any teacher


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


def test_pixels_are_normalised_as_timm_does_it(resnet: str) -> None:
    teacher = load_teacher("resnet10t", "timm", resnet, 32, 10)
    mean, std = (torch.tensor(IMAGENET[place]).view(1, 3, 1, 1) for place in (1, 2))
    torch.testing.assert_close(teacher(pixels(32)), teacher.model((pixels(32) / 255 - mean) / std))


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"weight": torch.zeros(1), "run": _Evil(tmp_path / "ran")}, path)
    with pytest.raises(TeacherError, match=r"evil.pth: expected tensors only.*save the state_dict alone"):
        load_teacher("resnet10t", "timm", str(path), 32, 10)
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
    with pytest.raises(TeacherError, match=r"none.pth: expected teacher weights, found no file"):
        load_teacher("resnet10t", "timm", "none.pth", 32, 10)
    assert capfd.readouterr().err == ""


def test_what_is_not_a_batch_of_logits_is_refused() -> None:
    wanted = r"teacher toy: expected floating-point logits \(2, 10\), found"
    for model, found in [
        (nn.Identity(), r"torch.float32 \(2, 3, 8, 8\)"),
        (_Outputs(lambda x: (x, x)), "tuple"),
        (_Outputs(lambda x: x.flatten(1).long()[:, :10]), r"torch.int64 \(2, 10\)"),
    ]:
        with pytest.raises(TeacherError, match=f"{wanted} {found}; use a classifier"):
            Teacher("toy", "timm", model, 10, IMAGENET)(pixels(8))


# --- timm


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


# --- torchvision


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_a_torchvision_teacher_gives_the_models_logits(tmp_path: Path, name: str, kind: str) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    teacher = load_teacher(name, "torchvision", save(model, tmp_path / f"w.{kind}"), 64, 10)
    mean, std = (torch.tensor(IMAGENET[place]).view(1, 3, 1, 1) for place in (1, 2))
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
    torch.save({"run": _Evil(tmp_path / "ran")}, file)
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


# --- published


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


# --- ensembles


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.sampled_from([4, 8]), min_size=1, max_size=4),
    mean=st.sampled_from(MEANS),
    flip=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
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
        found = Ensemble([teachers[place] for place in order], [weights[place] for place in order], mean, flip)(images)
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
    teachers = [Teacher("toy", "timm", _Outputs(lambda _, row=row: row), 3, IMAGENET) for row in logits]
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


class _Outputs(nn.Module):
    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: Tensor) -> Any:
        return self.outputs(images)


class _Spoilt(nn.Module):
    """The model, but for one logit of the second image."""

    def __init__(self, model: nn.Module, value: float) -> None:
        super().__init__()
        self.model, self.value = model, value

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        logits[1, 3] = self.value
        return logits


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_an_exported_transformer_of_another_size_is_named(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    teacher = load_teacher(f"local-dir:{tmp_path}", "timm", None, 32, 10)
    with pytest.raises(TeacherError, match=r"expected a model for 32 x 32 pixels, found: .*; set `size`"):
        teacher(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
