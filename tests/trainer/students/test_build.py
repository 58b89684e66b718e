"""Students by their names: stock models, their starts, and clear words for what cannot be built."""

import functools
import re
import socket
from typing import Any

import pytest
import safetensors.torch
import timm
import timm.data
import torch
import torchvision.models
from helpers.small_students import difference
from torch.utils.flop_counter import FlopCounterMode

from softshard.pipeline.runtime.errors import DataError, FormatError, RecipeError
from softshard.trainer.students import build_student, expand, fold

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
    ("library", "model", "near"),
    [
        ("timm", "mobilnetv2_100", ["mobilenetv2_100", "mobilevitv2_100", "mobilenetv2_140"]),
        ("timm", "resnet18.a1_in2k", ["resnet18.a1_in1k", "resnet18.a3_in1k", "resnet18.a2_in1k"]),
        ("timm", "hf-hub:timm/resnet18.a1_in1k", ["resnet18.a1_in1k", "resnet18.a3_in1k", "resnet18.a2_in1k"]),
        ("timm", "qqqqqqqq", []),
        ("torchvision", "mobilenetv2", ["mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"]),
        ("torchvision", "fasterrcnn_resnet50_fpn", []),
    ],
)
def test_unknown_models_are_refused_with_near_names(offline, library, model, near):
    listing = {"timm": "timm.list_models()", "torchvision": "torchvision.models.list_models()"}[library]
    matches = f" (near: {', '.join(near)})" if near else ""
    message = f"student.model: no {library} model is called {model!r}{matches}; {listing} lists them"
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        build_student(model, 10, library=library)


def test_build_student_says_what_is_wrong(offline):
    with pytest.raises(RecipeError, match=r"^student\.library: expected one of timm, torchvision, found 'keras'$"):
        build_student("resnet18", 10, library="keras")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RecipeError, match=r"^student\.num_classes: expected at least 1 class, found 0$"):
        build_student("resnet18", 0)


def test_pretrained_weights_that_do_not_exist(offline):
    message = (
        r"^student\.pretrained: timm has no weights for 'ghostnet_130'; set it to false, or choose one of "
        r"timm\.list_models\(pretrained=True\)$"
    )
    with pytest.raises(RecipeError, match=message):
        build_student("ghostnet_130", 10, pretrained=True)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_pretrained_weights_that_cannot_be_downloaded(monkeypatch, library):
    get_model = torchvision.models.get_model

    def no_route(name, *, weights="DEFAULT", **options):
        if weights is None:
            return get_model(name, weights=None, **options)
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", no_route)
    monkeypatch.setattr(torchvision.models, "get_model", no_route)
    message = (
        r"^student\.pretrained: the weights of 'resnet18' are not in the cache and could not be downloaded \(no route "
        r"to host\); connect once, give a file as student\.checkpoint, or set it to false$"
    )
    with pytest.raises(RecipeError, match=message):
        build_student("resnet18", 10, library=library, pretrained=True)


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
    expanded: Any = expand(student, x[:1], conv_types=["dense", "pointwise"])
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


NOT_TENSORS = "expected a .safetensors file, or a .pth file of tensors only, found: "
ALONE = "save the state_dict alone"
STARTS = [
    ("none.pth", None, "expected a file of student weights, found none; correct the path"),
    ("evil.pth", {"state_dict": Evil()}, f"{NOT_TENSORS}*; pickled code is not read: {ALONE}"),
    ("list.pth", [1], f"{NOT_TENSORS}*; pickled code is not read: {ALONE}"),
    ("broken.pth", b"x" * 100, f"{NOT_TENSORS}*; pickled code is not read: {ALONE}"),
    ("broken.safetensors", b"x" * 100, f"{NOT_TENSORS}*; pickled code is not read: {ALONE}"),
    ("empty.pth", {}, f"expected a state_dict of tensors, found an empty one; {ALONE}"),
    (
        "mixed.pth",
        {"a": 1, "b": "c", "d": torch.zeros(1)},
        f"expected a state_dict of tensors, found int, str; {ALONE}",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), STARTS, ids=[name for name, *_ in STARTS])
def test_what_a_start_must_be(tmp_path, name, content, message):
    """`*` is what torch or safetensors says."""
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    expected = f"^{re.escape(f'{file}: {message}')}$".replace(r"\*", ".+")
    with pytest.raises(DataError if content is None else FormatError, match=expected):
        build_student(NAME, CLASSES, checkpoint=file)


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(
    ("other", "found"),
    [
        (
            "resnet10t",
            "missing conv_stem.weight, blocks.0.0.conv_dw.weight, blocks.0.0.bn1.weight and 255 more; "
            "unknown conv1.0.weight, conv1.1.weight, conv1.1.bias and 78 more; bn1.weight [64] instead of [16], "
            "bn1.bias [64] instead of [16], bn1.running_mean [64] instead of [16] and 1 more",
        ),
        (
            "mobilenetv2_050",
            "blocks.1.0.conv_pwl.weight [16, 48, 1, 1] instead of [8, 48, 1, 1], blocks.1.0.bn3.weight [16] instead "
            "of [8], blocks.1.0.bn3.bias [16] instead of [8] and {more} more",
        ),
    ],
)
def test_weights_of_another_architecture(tmp_path, pretrained, other, found):
    file = written(published(1000, other), tmp_path / "start.pth")
    differences = found.format(more=184 if pretrained else 186)  # without and with the classifier
    message = (
        f"{file}: expected the weights of a plain mobilenetv2_035, found others: {differences}; take the recipe that "
        "they were trained with"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        build_student(NAME, CLASSES, pretrained=pretrained, checkpoint=file)


def test_weights_of_other_classes(tmp_path):
    file = written(published(1000), tmp_path / "start.pth")
    message = (
        f"{file}: expected weights of 7 classes, found 1000 in classifier.weight; correct student.num_classes, or set "
        "student.pretrained to true to start with a fresh classifier"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
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
