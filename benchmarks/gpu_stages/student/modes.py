"""A student's step by other ways than operation by operation: compiled, and as CUDA graphs."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor

from gpu_stages.stage import Outcome, Setting
from gpu_stages.student.figures import Figures, Sides, attempt, begin, layers_of, measure, relate
from gpu_stages.student.sides import TEMPERATURE, Training, make_training
from gpu_stages.timing import Step, synchronize
from softshard.pipeline.store.topk import decode

WARMUP = 3  # steps before a capture: what is loaded, chosen or allocated once must be so already


def compiled(model: str, form: str, images: int, backend: str, setting: Setting) -> Outcome:
    outcome, sides = begin(model, images, "channels_last", "compiled", setting), Sides()
    outcome.figures |= {"backend": backend, "sides": sides}

    def side() -> Figures:
        training = make_training(model, form, images, setting)
        found = layers_of(outcome, training, form, setting) | compile_student(training, backend)
        return found | measure(outcome, form, training.step, images, setting)

    attempt(outcome, sides, form, side, setting)
    return outcome


def graphs(model: str, form: str, images: int, setting: Setting) -> Outcome:
    """Of a form, operation by operation, with the passes as a graph and with all of a step as one; `times` is relative
    to the first."""
    outcome, sides = begin(model, images, "channels_last", "graphs", setting), Sides()
    outcome.figures |= {"form": form, "captured": setting.device == "cuda", "sides": sides}

    def side(name: str) -> Figures:
        training = make_training(model, form, images, setting)
        found = layers_of(outcome, training, form, setting)
        if name == "eager":
            return found | measure(outcome, name, training.step, images, setting)
        step = CapturedStep(training, everything=name == "everything")
        before = [parameter.detach().clone() for parameter in training.student.parameters()]
        found |= measure(outcome, name, step, images, setting) | {"mib": step.mib}
        same = sum(map(torch.equal, before, training.student.parameters()))
        outcome.expect(same <= len(before) // 2, f"{name}: {same} of {len(before)} parameters did not change")
        return found

    for name in ("eager", "passes", "everything"):
        attempt(outcome, sides, name, lambda name=name: side(name), setting)
    relate(sides, "eager")
    return outcome


def compile_student(training: Training, backend: str) -> dict[str, Any]:
    """Compile the student as trainer/loop/train_state.py does, and take two steps. Seconds of the first, which
    compiles, and of the second; how many graphs there are, and how many frames of those tried stayed uncompiled."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    for module in training.student.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # pyright: ignore[reportArgumentType]
    training.model = torch.compile(training.student, dynamic=False, backend=backend)
    seconds = [_seconds(training) for _ in range(2)]
    frames = counters["frames"]
    return {
        "first_step_s": seconds[0],
        "second_step_s": seconds[1],
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "frames_left": frames["total"] - frames["ok"],
    }


def _seconds(training: Training) -> float:
    synchronize(training.device.type)
    started = time.perf_counter()
    training.step()
    synchronize(training.device.type)
    return round(time.perf_counter() - started, 3)


class CapturedStep:
    """A training's step with its passes, or all of it, in a CUDA graph; on a CPU the same calls without a capture.

    Labels come from memory to tensors on the device that the graph reads. The passes alone are captured for good:
    learning rate, moments and average are those of every update. timm's LAMB takes its rate and bias corrections from
    the host, so all of it in one graph repeats one update's: no way to train, but the time that such a way would take.
    """

    def __init__(self, training: Training, everything: bool) -> None:
        self._training, self._everything = training, everything
        self._inputs = [part.to(training.device) for part in self._labels()]
        self.loss = torch.zeros(())
        self._replay, self.mib = captured(self._run, training.device.type)

    def __call__(self) -> Tensor:
        for given, part in zip(self._inputs, self._labels(), strict=True):
            pinned = part.pin_memory() if given.is_cuda else part
            given.copy_(pinned, non_blocking=True)
        self._replay()
        if not self._everything:
            self._training.update()
        return self.loss

    def _labels(self) -> list[Tensor]:
        batch = self._training.batch
        return [*batch.codes.tensors(), torch.from_numpy(batch.template)]

    def _run(self) -> None:
        training = self._training
        training.optimizer.zero_grad()  # gradients to be made in the graph's own memory, and written there each time
        index, gap, tail, template = self._inputs
        self.loss = training.passes(decode(index, gap, tail, training.size.classes, TEMPERATURE, template))
        if self._everything:
            training.update()


def captured(run: Callable[[], None], device: str) -> tuple[Step, float | None]:
    """What replays `run`, and the MiB allocated at most while it was captured: replaying allocates nothing."""
    if device != "cuda":
        run()
        return run, None
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            run()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.reset_peak_memory_stats()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own
    return graph.replay, torch.cuda.max_memory_allocated() / 2**20
