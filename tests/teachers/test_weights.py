"""One reader of weights for teachers and students: what it loads, and what it says of weights that do not fit."""

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision.models
from torch import Tensor, nn

from softshard.teachers.weights import WeightsError, load_weights, read_weights


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))


def test_reading_weights_imports_no_teachers() -> None:
    code = (
        "import sys, softshard.teachers.weights\n"
        "print([name for name in sys.modules if name.startswith(('softshard.', 'torchvision.models'))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "softshard.teachers.weights" in found
    assert "softshard.teachers.load" not in found
    assert "softshard.teachers.teacher" not in found


def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path) -> None:
    state = network().state_dict()
    wrapped = {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}
    torch.save(wrapped, tmp_path / "w.pth")
    assert list(read_weights(tmp_path / "w.pth")) == list(state)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_networks_that_ask_for_their_version_load_from_files(tmp_path: Path, suffix: str) -> None:
    """Files do not keep the versions of modules, without which torchvision's MNASNet refuses its own weights."""
    model, other = (torchvision.models.mnasnet0_5(weights=None, num_classes=4) for _ in range(2))
    path = tmp_path / f"w.{suffix}"
    torch.save(model.state_dict(), path) if suffix == "pth" else safetensors.torch.save_file(model.state_dict(), path)
    load_weights(other, read_weights(path), str(path))
    assert_equal(other.state_dict(), model.state_dict())


def test_names_from_older_versions_of_a_module_are_known() -> None:
    """The published weights of torchvision's transformers are from before their MLPs changed their names."""
    model, other = (torchvision.models.VisionTransformer(64, 32, 1, 2, 8, 16, num_classes=4) for _ in range(2))
    old = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
        for name, tensor in model.state_dict().items()
    }
    assert any("linear_1" in name for name in old)
    load_weights(other, old, "old")
    assert_equal(other.state_dict(), model.state_dict())


def test_what_is_different_is_named() -> None:
    state = network().state_dict()
    del state["0.weight"], state["1.num_batches_tracked"]
    wrong = {**state, "2.weight": torch.zeros(3, 4), "more": torch.zeros(1)}
    message = (
        r"^w\.pth: expected the weights of this model, found others: missing 0\.weight; unknown more; "
        r"2\.weight \[3, 4\] instead of \[2, 4\]; correct `model`, `classes` or the file$"
    )
    with pytest.raises(WeightsError, match=message):
        load_weights(network(), wrong, "w.pth")


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
