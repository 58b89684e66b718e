"""ExecuTorch with XNNPACK. The package is an optional extra, so it is imported where it is used."""

from pathlib import Path

import torch
from torch import Tensor

from softshard.trainer.export.formats.contract import Job, Predictor


def write_executorch(job: Job, path: Path) -> None:
    """Write a program for XNNPACK; what job.metadata has are methods without arguments.

    `forward`: float32 [1, 3, S, S] -> float32 [1, classes].
    """
    from executorch.backends.xnnpack.partition import xnnpack_partitioner  # pyright: ignore[reportMissingImports]
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

    program = torch.export.export(job.network, (job.example(batch=1),))
    constants = {name: list(value) if isinstance(value, tuple) else value for name, value in job.metadata().items()}
    edge = to_edge_transform_and_lower(
        program, partitioner=[xnnpack_partitioner.XnnpackPartitioner()], constant_methods=constants
    )
    path.write_bytes(edge.to_executorch().buffer)


def load_executorch(path: Path, threads: int | None) -> Predictor:
    """Load a program for predictions, image by image; the number of threads holds for the whole process."""
    from executorch.extension.pybindings import portable_lib  # pyright: ignore[reportMissingImports]
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    if threads:
        portable_lib._unsafe_reset_threadpool(threads)
    forward = Runtime.get().load_program(path).load_method("forward")
    assert forward is not None

    def predict(images: Tensor) -> Tensor:
        # The runtime answers in memory of its own, which the next call overwrites.
        return torch.cat([forward.execute([image[None]])[0].clone() for image in images])

    return predict
