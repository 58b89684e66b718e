"""The student of a recipe: its library, its start, its branches, and the normalization of its pixels."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.small_runs import train_recipe

from softshard.pipeline.runtime.errors import DataError, RecipeError
from softshard.trainer.recipe import TrainRecipe
from softshard.trainer.student import make_student
from softshard.trainer.students import build_student
from softshard.trainer.students.branches import MultiBranchConv

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def recipe(folder: Path, *changes: tuple[str, str]) -> TrainRecipe:
    return train_recipe(folder, ("data.size", "64"), *((f"student.{key}", value) for key, value in changes))


def normalized(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images / 255 - mean) / std


def test_a_torchvision_student(tmp_path: Path) -> None:
    student = make_student(recipe(tmp_path, ("library", "torchvision"), ("model", "shufflenet_v2_x0_5"))).eval()
    assert sum(isinstance(module, MultiBranchConv) for module in student.modules()) > 50
    torch.testing.assert_close(student(IMAGES), student.network(normalized(IMAGES)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pretrained", ["false", "true"])
def test_expanded_students_start_as_their_checkpoint(tmp_path: Path, pretrained: str) -> None:
    torch.manual_seed(7)
    start = build_student("mobilenetv2_035", 10).eval()
    safetensors.torch.save_file(start.state_dict(), tmp_path / "start.safetensors")
    changes = ("checkpoint", str(tmp_path / "start.safetensors")), ("pretrained", pretrained)
    student = make_student(recipe(tmp_path, ("model", "mobilenetv2_035"), *changes)).eval()
    assert any(isinstance(module, MultiBranchConv) for module in student.modules())
    torch.testing.assert_close(student(IMAGES), start(normalized(IMAGES)), rtol=1e-4, atol=1e-5)


def test_a_runs_weights_need_no_checkpoint(tmp_path: Path) -> None:
    student = make_student(recipe(tmp_path))
    safetensors.torch.save_file(
        {key: value.contiguous() for key, value in student.network.state_dict().items()}, tmp_path / "run.safetensors"
    )
    gone = recipe(tmp_path, ("checkpoint", "gone.pth"))
    again = make_student(gone, tmp_path / "run.safetensors")
    assert torch.equal(again.eval()(IMAGES), student.eval()(IMAGES))
    message = r"^gone.pth: expected a file of student weights, found none; correct the path$"
    with pytest.raises(DataError, match=message):
        make_student(gone)
    message = (
        rf"^{tmp_path}/run.safetensors: expected the weights of this recipe's student, found others: missing "
        r"blocks.1.0.conv_pwl.weight, blocks.1.0.bn2.weight, blocks.1.0.bn2.bias and 42 more; unknown "
        r"(blocks\.\S+\.branches\.\S+, ){2}blocks\.\S+\.branches\.\S+ and 117 more; "  # in the order of the file
        r"take the recipe that they were trained with$"
    )
    with pytest.raises(DataError, match=message):
        make_student(recipe(tmp_path, ("expand", "null")), tmp_path / "run.safetensors")


def test_the_recipe_reaches_expand(tmp_path: Path) -> None:
    expand = "{branches: 2, conv_types: [dense, pointwise], scale_branch: false, identity: false, init: split_gamma}"
    student = make_student(recipe(tmp_path, ("model", "resnet10t"), ("expand", expand)))
    branches = [module for module in student.modules() if isinstance(module, MultiBranchConv)]
    assert {module.plain.conv.kernel_size for module in branches} == {(1, 1), (3, 3)}
    for module in branches:
        first, second = module.conv_bns()
        assert module.scale is module.identity is None
        assert torch.equal(first.conv.weight, second.conv.weight)
        gamma = first.bn.weight + second.bn.weight
        torch.testing.assert_close(gamma, gamma.round())  # 1, and 0 at a block's end


@pytest.mark.parametrize(
    ("implementation", "forms"), [("auto", {"depthwise", "closed", "stacked"}), ("separate", {None})]
)
def test_the_recipe_says_how_branches_are_computed(tmp_path: Path, implementation: str, forms: set[str | None]) -> None:
    student = make_student(recipe(tmp_path, ("model", "mobilenetv2_035"), ("expand.implementation", implementation)))
    assert {module.form for module in student.modules() if isinstance(module, MultiBranchConv)} == forms


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("library", "keras", "--student.library: input should be 'timm' or 'torchvision' (got \"keras\")"),
        (
            "expand.conv_types",
            "[dw]",
            "{folder}/train.yaml: student.expand.conv_types.0: input should be 'depthwise', 'pointwise', 'grouped' or "
            "'dense' (got \"dw\")",
        ),
        (
            "expand.implementation",
            "one",
            "--student.expand.implementation: input should be 'auto', 'fused', 'separate' or 'triton' (got \"one\")",
        ),
        ("expand.init", "ones", "--student.expand.init: input should be 'zero_gamma' or 'split_gamma' (got \"ones\")"),
        ("expand.branches", "0", "--student.expand.branches: input should be greater than or equal to 1 (got 0)"),
        ("num_classes", "1", "--student.num_classes: input should be greater than or equal to 2 (got 1)"),
    ],
)
def test_values_that_a_recipe_refuses(tmp_path: Path, key: str, value: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(tmp_path, (key, value))
    assert str(error.value) == message.format(folder=tmp_path)
