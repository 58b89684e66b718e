"""ONNX, and ONNX in eight bits. The packages are an optional extra, so they are imported where they are used."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softshard.pipeline.runtime.errors import DataError
from softshard.trainer.export.formats.contract import INPUT, OUTPUT, Job, Predictor


def write_onnx(job: Job, path: Path) -> int:
    """Write ONNX for batches of any size, in the opset that torch chooses.

    images float32 [batch, 3, S, S] -> logits float32 [batch, classes]. The metadata properties hold job.metadata and
    the opset, each value as JSON.

    Returns:
        The opset.

    Raises:
        DataError: torch cannot export the network.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    try:
        program = torch.onnx.export(
            job.network,
            (job.example(batch=2),),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"onnx: expected a network that torch can export, found that {job.model} is none: {reason}; "
            "leave the format out of --formats"
        ) from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # the code that each node comes from, with paths of this machine
    opset = program.model.opset_imports[""]
    metadata = job.metadata() | {"opset": opset}
    program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    program.save(path)
    return opset


def write_int8(job: Job, path: Path) -> int:
    """Quantize the model.onnx beside `path` statically, with the ranges seen on job.calibration().

    Activations are unsigned, weights signed, with a scale for each channel.

    Returns:
        The opset.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        # Shapes are known from the export, and the symbolic inference would need one more package.
        quant_pre_process(path.parent / "model.onnx", prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            path,
            _reader(job),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,  # x86 without VNNI adds two products in 16 bits, which full weights overflow
        )
    return next(entry.version for entry in onnx.load(path).opset_import if not entry.domain)


def load_onnx(path: Path, threads: int | None) -> Predictor:
    """Load an ONNX file for predictions of onnxruntime on the CPU."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(images: Tensor) -> Tensor:
        [logits] = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return predict


def _reader(job: Job) -> Any:
    """The calibration batches in the shape that onnxruntime asks for."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(job.calibration())

        def get_next(self) -> dict[str, Any] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    return Reader()
