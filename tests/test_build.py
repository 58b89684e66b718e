"""Students by their names: stock models, their starts, and clear words for what cannot be built."""

import functools
import socket
from typing import Any

import pytest
import safetensors.torch
import timm
import timm.data
import torch
import torchvision.models
from small_students import difference
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import DataError, FormatError, RecipeError
from trainer.students import build_student, expand, fold

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


STUDENTS = [
    ("timm", "resnet18.a1_in1k"),
    ("timm", "ghostnetv3_100.in1k"),  # timm's own
    ("torchvision", "mobilenet_v2"),
    ("torchvision", "mnasnet0_5"),
]


@pytest.mark.parametrize(("library", "name"), STUDENTS)
def test_build_student(offline, library, name):
    model = build_student(name, 7, library=library)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mobilnetv2_100", 10), r"student\.model: no timm model is called 'mobilnetv2_100' \(near: mobilenetv2_100, "),
        (("resnet18.a1_in2k", 10), r"no timm model is called 'resnet18.a1_in2k' \(near: resnet18.a1_in1k, "),
        (("hf-hub:timm/resnet18.a1_in1k", 10), "no timm model is called 'hf-hub:"),
        (("qqqqqqqq", 10), r"no timm model is called 'qqqqqqqq'; timm\.list_models\(\) lists them"),
        (("mobilenetv2", 10, "torchvision"), r"no torchvision model is called 'mobilenetv2' \(near: mobilenet_v2, "),
        (("fasterrcnn_resnet50_fpn", 10, "torchvision"), "no torchvision model is called"),
        (("resnet18", 10, "keras"), r"student\.library: expected one of timm, torchvision, found 'keras'"),
        (("resnet18", 0), r"student\.num_classes: expected at least 1 class, found 0"),
    ],
)
def test_build_student_says_what_is_wrong(offline, arguments, message):
    model, num_classes, *library = arguments
    with pytest.raises(RecipeError, match=message):
        build_student(model, num_classes, **({"library": library[0]} if library else {}))


def test_pretrained_weights_that_are_not_there(monkeypatch):
    with pytest.raises(RecipeError, match=r"student\.pretrained: timm has no weights for 'ghostnet_130'"):
        build_student("ghostnet_130", 10, pretrained=True)

    def no_route(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", no_route)
    with pytest.raises(RecipeError, match=r"student\.pretrained: .*'resnet18'.*no route to host"):
        build_student("resnet18", 10, pretrained=True)


@pytest.mark.parametrize("num_classes", [7, 1000])
def test_pretrained_torchvision_student_keeps_all_but_a_classifier_of_another_size(monkeypatch, num_classes):
    published = torchvision.models.get_model("mobilenet_v2", weights=None)
    get_model = torchvision.models.get_model
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda name, weights, **kw: published if weights else get_model(name, **kw)
    )
    state = build_student("mobilenet_v2", num_classes, library="torchvision", pretrained=True).state_dict()
    same = {key for key, value in published.state_dict().items() if torch.equal(state[key], value)}
    fresh = set() if num_classes == 1000 else {"classifier.1.weight", "classifier.1.bias"}
    assert same == state.keys() - fresh


# GhostNetV3: million parameters and multiply-additions of the paper (arXiv 2404.11202)

GHOSTNETV3 = {
    "ghostnetv3_050": (2.85, 49.6, 2_857_836),
    "ghostnetv3_100": (6.15, 167.0, 6_156_908),
    "ghostnetv3_130": (8.95, 269.3, 8_960_404),
    "ghostnetv3_160": (12.38, 398.6, 12_392_698),
}


@pytest.mark.parametrize("name", GHOSTNETV3)
def test_ghostnetv3_folds_to_the_size_of_the_paper(name):
    parameters, macs, stock_parameters = GHOSTNETV3[name]
    student = build_student(name, 1000)
    before = count(student)
    expanded = expand(student, torch.zeros(1, 3, 64, 64))
    assert count(expanded) > 1.3 * before
    folded = fold(expanded).eval()
    assert count(folded) == before == stock_parameters
    # The paper's code leaves one bias a channel where the stock model keeps a batch norm's weight and bias.
    channels = [len(weight) for key, weight in folded.named_parameters() if in_the_papers_folded_part(key)]
    assert round((stock_parameters - sum(channels)) / 1e6, 2) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        folded.to("meta")(torch.zeros(1, 3, 224, 224, device="meta"))
    assert round(counter.get_total_flops() / 2e6, 1) == macs


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def in_the_papers_folded_part(key):
    """Batch norm weights of ghost modules and of the depthwise convolutions between them."""
    return key.endswith(("primary_conv.1.weight", "cheap_operation.1.weight", "bn_dw.weight"))


def test_the_narrowest_ghostnetv3_is_exported_and_loaded_by_stock_timm(tmp_path):
    """timm has no name of its own for this body, but keeps the arguments that make it."""
    folded = fold(expand(build_student("ghostnetv3_050", 10), torch.zeros(1, 3, 64, 64))).eval()
    assert timm.data.resolve_model_data_config(folded)["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    timm.models.save_for_hf(folded, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(x), folded(x))
    by_hand = timm.create_model("ghostnet_050", version="v2", num_classes=10)
    by_hand.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"), strict=True)


# Local files as the start

NAME, CLASSES = "mobilenetv2_035", 7


@functools.cache
def published(classes=CLASSES, name=NAME) -> Any:
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=classes)


def written(model, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_local_file_is_the_start(tmp_path, offline, kind, pretrained):
    file = written(published(), tmp_path / f"start.{kind}")
    student = build_student(NAME, CLASSES, pretrained=pretrained, checkpoint=file)
    assert all(torch.equal(value, published().state_dict()[key]) for key, value in student.state_dict().items())
    assert student.training


def test_published_weights_of_other_classes_start_a_fresh_classifier(tmp_path, offline):
    file = written(published(1000), tmp_path / "start.safetensors")
    torch.manual_seed(2)
    initial = build_student(NAME, CLASSES).state_dict()
    torch.manual_seed(2)
    student = build_student(NAME, CLASSES, pretrained=True, checkpoint=file).state_dict()
    for key, value in student.items():
        assert torch.equal(value, initial[key] if "classifier" in key else published(1000).state_dict()[key])


def test_published_timm_weights_are_the_start_and_expand_keeps_them(tmp_path, monkeypatch):
    """Through timm's own code for published weights; only where they come from is changed."""
    file = written(published(1000, "resnet18"), tmp_path / "published.safetensors")
    create = timm.create_model

    def from_file(name, pretrained=False, **options):
        return create(name, pretrained, pretrained_cfg_overlay={"file": str(file)}, **options)

    monkeypatch.setattr(timm, "create_model", from_file)
    student: Any = build_student("resnet18", CLASSES, pretrained=True).eval()
    source = published(1000, "resnet18").eval()
    x = torch.randn(2, 3, 33, 33)
    assert torch.equal(student.forward_features(x), source.forward_features(x))
    expanded: Any = expand(student, x[:1], kinds=["dense", "pointwise"])
    assert torch.equal(expanded.forward_features(x), source.forward_features(x))
    assert difference(expanded, fold(expanded), x) < 1e-4


def test_weights_in_their_authors_layout_pass_through_timms_filter(tmp_path):
    """timm converts what it downloads: here the names that the authors of GhostNetV3 gave to some batch norms."""
    model = timm.create_model("ghostnetv3_100.in1k", num_classes=CLASSES)
    authors = {key.replace("bn1.", "bn.") if "dw_rpr_" in key else key: v for key, v in model.state_dict().items()}
    assert authors.keys() != model.state_dict().keys()
    torch.save(authors, tmp_path / "authors.pth")
    student = build_student("ghostnetv3_100.in1k", CLASSES, checkpoint=tmp_path / "authors.pth").state_dict()
    assert all(torch.equal(value, student[key]) for key, value in model.state_dict().items())


def test_weights_from_before_batch_norms_counted(tmp_path):
    state = {key: value for key, value in published().state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    student = build_student(NAME, CLASSES, checkpoint=tmp_path / "old.pth").state_dict()
    assert all(torch.equal(value, student[key]) for key, value in state.items())


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


def test_what_a_start_must_be(tmp_path):
    files = {name: tmp_path / f"{name}.pth" for name in ("none", "evil", "empty", "numbers", "list")}
    torch.save({"state_dict": Evil()}, files["evil"])
    torch.save({}, files["empty"])
    torch.save({"a": 1, "b": torch.zeros(1)}, files["numbers"])
    torch.save([1], files["list"])
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    wanted = {
        "none.pth": (DataError, "none.pth: expected student weights, found no file; "),
        "evil.pth": (FormatError, r"evil.pth: expected a .safetensors file, or a .pth file of tensors only, found: "),
        "empty.pth": (FormatError, "expected a state_dict of tensors, found an empty one"),
        "numbers.pth": (FormatError, "expected a state_dict of tensors, found int; save the state_dict alone"),
        "list.pth": (FormatError, "expected a .safetensors file, or a .pth file of tensors only"),
        "broken.safetensors": (FormatError, "expected a .safetensors file, or a .pth file of tensors only"),
    }
    for name, (error, message) in wanted.items():
        with pytest.raises(error, match=message):
            build_student(NAME, CLASSES, checkpoint=tmp_path / name)


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(
    ("other", "found"),
    [
        (
            "resnet10t",
            r"missing conv_stem.weight, blocks.0.0.conv_dw.weight, .* and 255 more; unknown conv1.0.weight, ",
        ),
        ("mobilenetv2_050", r"found others: \S+ \[\S+, .*\] instead of \["),
    ],
)
def test_weights_of_another_architecture(tmp_path, pretrained, other, found):
    file = written(published(1000, other), tmp_path / "start.pth")
    with pytest.raises(DataError, match=rf"start.pth: expected the weights of a plain mobilenetv2_035, .*{found}"):
        build_student(NAME, CLASSES, pretrained=pretrained, checkpoint=file)


def test_weights_of_other_classes(tmp_path):
    file = written(published(1000), tmp_path / "start.pth")
    with pytest.raises(DataError, match=r"of 7 classes, found 1000 in classifier.weight; .* set student.pretrained"):
        build_student(NAME, CLASSES, checkpoint=file)


def test_torchvision_students_have_no_auxiliary_heads(tmp_path, monkeypatch):
    source = torchvision.models.googlenet(weights=None, num_classes=1000, init_weights=False)
    assert any("aux" in key for key in source.state_dict())
    get_model = torchvision.models.get_model
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda name, weights, **kw: source if weights else get_model(name, **kw)
    )
    student = build_student("googlenet", CLASSES, library="torchvision", pretrained=True)
    assert student(torch.randn(2, 3, 64, 64)).shape == (2, CLASSES)
    assert torch.equal(student.state_dict()["conv1.conv.weight"], source.state_dict()["conv1.conv.weight"])
