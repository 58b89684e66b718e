"""One training step (forward, backward, SGD) of a student: plain, with separate branches, and with ours.

Random images, channels last, 3 branches with 1 x 1 and identity. The sides take turns; the table shows the median time
of a step, the median of its ratio to the plain step of the same round, and the bytes of activations that a step keeps
for its backward pass (each storage once, without parameters). For GhostNetV3 timm's own ghostnetv3_100, with branches
of its own, takes part. `--json PATH` writes the figures.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import timm
import torch
from torch import Tensor, nn

from softshard.trainer.students import build_student, expand


def sides_of(name: str, size: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    plain = build_student(name, 1000)
    example = torch.zeros(1, 3, size, size)
    sides: dict[str, nn.Module] = {"plain": plain}
    for label, form in (("separate", "separate"), ("ours", "auto")):
        torch.manual_seed(1)
        sides[label] = expand(copy.deepcopy(plain), example, implementation=form)
    if name.startswith("ghostnetv3"):
        sides["timm's own"] = timm.create_model(name)
    return {label: model.to(memory_format=torch.channels_last).train() for label, model in sides.items()}


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of the storages that the backward pass keeps, without those of parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), images)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images).square().mean()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def make_step(model: nn.Module, images: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(step: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(name: str, options: argparse.Namespace, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    images = torch.randn(options.images, 3, options.size, options.size).to(memory_format=torch.channels_last)
    sides = sides_of(name, options.size)
    steps = {label: make_step(model, images) for label, model in sides.items()}
    for step in steps.values():
        step()
    rounds = [{label: measure(step) for label, step in steps.items()} for _ in range(options.rounds)]
    result = {}
    for label, model in sides.items():
        result[label] = {
            **{
                clock: {
                    "seconds": statistics.median(figures[label][index] for figures in rounds),
                    "ratio": statistics.median(figures[label][index] / figures["plain"][index] for figures in rounds),
                }
                for index, clock in enumerate(("wall", "cpu"))
            },
            "saved_bytes": saved_bytes(model, images),
        }
    faster = statistics.median(figures["separate"][1] / figures["ours"][1] for figures in rounds)
    return {"sides": result, "separate / ours (CPU)": faster}


def show(name: str, threads: int, result: dict[str, Any]) -> None:
    print(f"{name}, {threads} thread{'s' * (threads > 1)}")
    print(f"{'':12} {'CPU s':>8} {'x plain':>8} {'wall s':>8} {'x plain':>8} {'saved MiB':>10}")
    for label, figures in result["sides"].items():
        times = [figures[clock][key] for clock in ("cpu", "wall") for key in ("seconds", "ratio")]
        print(
            f"{label:12} " + " ".join(f"{value:8.2f}" for value in times) + f" {figures['saved_bytes'] / 2**20:10.0f}"
        )
    print(
        f"ours are {result['separate / ours (CPU)']:.2f} times as fast as separate branches (goal 2.2, and 1.5 x plain)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mobilenetv2_100", "ghostnetv3_100"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name in options.models:
        for threads in options.threads:
            result = results[f"{name}, {threads}"] = compare(name, options, threads)
            show(name, threads, result)
    if options.json:
        options.json.write_text(json.dumps({"images": options.images, "size": options.size, **results}, indent=1))


if __name__ == "__main__":
    main()
