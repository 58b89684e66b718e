"""Expanded students under what wraps a model in training: mixed precision, channels_last, checkpointing, DDP."""

import copy
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_students import assert_folds_into_a_stock_model, difference, small_expanded, small_images
from helpers.small_weights import calibrate, grad, randomise
from helpers.workers import FORKS
from timm.layers.norm_act import BatchNormAct2d
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from softshard.trainer.students import build_student, expand, fold
from softshard.trainer.students.branches import MultiBranchConv
from softshard.trainer.students.trace import find_pairs

pytestmark = pytest.mark.usefixtures("one_thread")


def stock() -> nn.Module:
    return build_student("mobilenetv2_035", 10)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(seed))


def test_mixed_precision_keeps_statistics_and_weights_in_float32():
    model = calibrate(randomise(expand(stock(), images(1))), images(8))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images(8, seed=1))
        assert output.dtype == torch.bfloat16
        output.float().square().mean().backward()
    optimizer.step()
    after = model.eval().state_dict()
    assert all(value.dtype in (torch.float32, torch.int64) and value.isfinite().all() for value in after.values())
    still = [key for key, value in after.items() if torch.equal(value, before[key])]
    assert not [key for key in still if "running" in key or "weight" in key], "everything learns"
    x = images(4, seed=2)
    assert difference(model, fold(model), x) <= 1e-3  # the statistics are one step old
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(model, fold(model), x) <= 0.2  # bfloat16 has 8 bits


def test_channels_last_computes_the_same():
    model = calibrate(randomise(expand(stock(), images(1))).double(), images(8).double())
    x = images(4, seed=2).double()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    y = x.to(memory_format=torch.channels_last)
    for training in (False, True):
        model.train(training)
        other.train(training)
        outputs = []
        for each, batch in ((model, x), (other, y)):
            torch.manual_seed(0)  # for dropout
            outputs.append(each(batch))
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    for (key, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6 * a.grad.abs().max().item(), msg=key)
    assert difference(other.eval(), fold(other), y) <= 1e-12


def test_gradient_checkpointing_is_what_it_is_in_the_plain_model():
    """It runs blocks twice, so that running statistics move twice: in stock timm and here alike. (Through one
    convolution those of a block's last layer move once, since the second run ends there, before the update.)"""
    plain: Any = calibrate(randomise(stock()), images(8)).double().train()
    plain.set_grad_checkpointing()
    kept = copy.deepcopy(plain)
    names = {**dict(kept.named_buffers()), **dict(kept.named_parameters())}
    as_one: Any = expand(copy.deepcopy(kept), images(1).double())
    model: Any = expand(kept, images(1).double(), implementation="separate")
    model.load_state_dict(as_one.state_dict(), strict=True)
    assert find_pairs(plain, images(1).double()) == find_pairs(stock(), images(1))
    without = copy.deepcopy(model)
    without.set_grad_checkpointing(False)
    outputs = []
    for each in (plain, model, without, as_one):
        torch.manual_seed(0)
        outputs.append(each(images(4).double()))
        outputs[-1].square().sum().backward()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[2])
    torch.testing.assert_close(outputs[3], outputs[0], rtol=0, atol=1e-9)
    assert all(torch.equal(buffer, names[key]) for key, buffer in plain.named_buffers())
    assert {int(value) for key, value in plain.state_dict().items() if key.endswith("tracked")} == {2, 3}
    for a, b, c in zip(*(each.parameters() for each in (model, without, as_one)), strict=True):
        assert torch.equal(a.grad, b.grad)
        torch.testing.assert_close(c.grad, a.grad, rtol=0, atol=1e-9 * max(a.grad.abs().max().item(), 1.0))


def in_two_processes(work: Callable[[int, Path], None], folder: Path) -> list[dict[str, torch.Tensor]]:
    """What work(rank, folder) saves as rank.pt in each of two processes of a gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    workers = [FORKS.Process(target=in_a_process, args=(work, rank, address, folder)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def in_a_process(work: Callable[[int, Path], None], rank: int, address: str, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    work(rank, folder)
    distributed.destroy_process_group()


def test_two_processes_train_one_student(tmp_path: Path):
    one, two = in_two_processes(train_in_a_process, tmp_path)
    models = [small_expanded(seed=5) for _ in range(2)]
    for model, state in zip(models, (one, two), strict=True):
        model.load_state_dict(state, strict=True)
        assert_folds_into_a_stock_model(model.eval())
    start = randomise(small_expanded(seed=0))
    for (key, a), b, before in zip(
        models[0].named_parameters(), models[1].parameters(), start.parameters(), strict=True
    ):
        assert torch.equal(a, b), key
        if key.endswith("weight"):  # a batch norm further on takes biases away again
            assert not torch.equal(a, before), f"{key} did not learn"


def train_in_a_process(rank: int, folder: Path) -> None:
    """Three steps of DDP, which stops at parameters without gradients; each process has images of its own."""
    model = DistributedDataParallel(randomise(small_expanded(seed=rank)))  # rank 0's weights for all
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        (model(small_images(seed=2 * step + rank)) - 1).square().mean().backward()
        optimizer.step()
    torch.save(model.module.state_dict(), folder / f"{rank}.pt")


# Depthwise and pointwise layers alone: torch's own SyncBatchNorm, after any other, does not run on a CPU.


def test_two_processes_average_the_gradients_of_separate_branches(tmp_path: Path):
    """Each process has statistics of its own."""
    results = in_two_processes(a_step_in_a_process, tmp_path)
    models = [narrow("separate") for _ in range(2)]
    for model, part in zip(models, parts(), strict=True):
        model(part).sub(1).square().sum().backward()
    for key, parameter in models[0].named_parameters():
        expected = (grad(parameter) + grad(models[1].get_parameter(key))) / 2
        for result in results:
            assert_near(result[f"d {key}"], expected)
    for model, result in zip(models, results, strict=True):
        for key, buffer in model.named_buffers():
            assert_near(result[key], buffer)


def a_step_in_a_process(rank: int, folder: Path) -> None:
    model = narrow()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    y = wrapped(parts()[rank])
    y.sub(1).square().sum().backward()
    save_step(model, y, folder / f"{rank}.pt")


def test_synchronized_statistics_are_those_of_the_whole_batch(tmp_path: Path):
    """Two processes with five and three images and SyncBatchNorm, which the convolution of all branches takes over:
    outputs, statistics and averaged gradients of one process with all eight and separate branches."""
    results = in_two_processes(a_synchronized_step_in_a_process, tmp_path)
    model = narrow("separate")
    y = model(torch.cat(parts()))
    (y.sub(1).square().sum() / 2).backward()  # the average over two processes
    assert_near(torch.cat([result["y"] for result in results]), y.detach())
    for result in results:
        for key, parameter in model.named_parameters():
            assert_near(result[f"d {key}"], grad(parameter))
        for key, buffer in model.named_buffers():
            assert_near(result[key], buffer)


def a_synchronized_step_in_a_process(rank: int, folder: Path) -> None:
    """Averages gradients by itself, since DistributedDataParallel refuses SyncBatchNorm on a CPU, too."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(narrow())
    y = model(parts()[rank])
    y.sub(1).square().sum().backward()
    for parameter in model.parameters():
        distributed.all_reduce(grad(parameter).div_(2))
    save_step(model, y, folder / f"{rank}.pt")


def narrow(implementation: str = "auto") -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(
        *(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=True), BatchNormAct2d(6)),
        *(nn.Conv2d(6, 20, 1, bias=False), nn.BatchNorm2d(20)),
        *(nn.Conv2d(20, 20, 5, 2, 2, groups=20, bias=False), BatchNormAct2d(20, act_layer=nn.ReLU6)),
        *(nn.Conv2d(20, 20, 1, bias=True), nn.BatchNorm2d(20)),
    )
    model = expand(plain, torch.randn(1, 6, 9, 8), implementation=implementation)
    forms = [module.form for module in model.modules() if isinstance(module, MultiBranchConv)]
    assert forms == (["depthwise", "closed"] * 2 if implementation == "auto" else [None] * 4)
    return randomise(model).double().train()


def parts() -> list[torch.Tensor]:
    """Uneven, and with different means."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(8, 6, 9, 8, generator=draw, dtype=torch.float64) + torch.arange(8).view(8, 1, 1, 1)
    return [images[:5], images[5:]]


def save_step(model: nn.Module, y: torch.Tensor, path: Path) -> None:
    gradients = {f"d {key}": grad(parameter) for key, parameter in model.named_parameters()}
    torch.save({"y": y.detach(), **gradients, **dict(model.named_buffers())}, path)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to 1e-11; some gradients vanish: those of biases before a batch norm."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11 * max(expected.abs().max().item(), 1.0))
