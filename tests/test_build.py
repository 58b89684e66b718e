"""Students by their names: stock models, and clear words for what cannot be built."""

import socket

import pytest
import timm
import torch
import torchvision.models

from pipeline.errors import RecipeError
from trainer.students import build_student


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(("library", "name"), [("timm", "resnet18.a1_in1k"), ("torchvision", "mobilenet_v2")])
def test_build_student(offline, library, name):
    model = build_student(name, 7, library=library)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
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
