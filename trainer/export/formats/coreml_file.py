"""Core ML. The package is an optional extra, so it is imported where it is used."""

import json
from pathlib import Path

import torch
from torch import Tensor

from softshard.trainer.export.formats.contract import INPUT, OUTPUT, Job, Predictor


def write_coreml(job: Job, path: Path) -> None:
    """Write an ML program for iOS 16, macOS 13 and later, in Core ML's own float16.

    images float32 [1, 3, S, S] -> logits [1, classes]. The user-defined metadata hold job.metadata, each value as JSON.
    """
    import coremltools  # pyright: ignore[reportMissingImports]

    program = torch.export.export(job.network, (job.example(batch=1),)).run_decompositions({})
    model = coremltools.convert(
        program,
        inputs=[coremltools.TensorType(name=INPUT)],
        outputs=[coremltools.TensorType(name=OUTPUT)],
        convert_to="mlprogram",
        minimum_deployment_target=coremltools.target.iOS16,
    )
    model.user_defined_metadata.update({name: json.dumps(value) for name, value in job.metadata().items()})
    model.save(str(path))


def load_coreml(path: Path, threads: int | None) -> Predictor:
    """Load what write_coreml wrote: predictions of Core ML, image by image, on macOS."""
    import coremltools  # pyright: ignore[reportMissingImports]

    model = coremltools.models.MLModel(str(path))

    def predict(images: Tensor) -> Tensor:
        return torch.cat([torch.from_numpy(model.predict({INPUT: image[None].numpy()})[OUTPUT]) for image in images])

    return predict
