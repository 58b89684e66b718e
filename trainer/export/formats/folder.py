"""The folder of weights that every export has: config.json in timm's layout, and model.safetensors."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import timm.models
from torch import nn

from softshard.pipeline.runtime.errors import DataError, FormatError
from softshard.teachers.weights import WeightsError, load_weights, read_weights
from softshard.trainer.export.formats.contract import Job
from softshard.trainer.students import build_student

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_folder(job: Job, library: str, folder: Path) -> Path:
    """Write config.json and model.safetensors.

    For timm, what `timm.create_model('local-dir:FOLDER', pretrained=True)` loads. For torchvision, the state_dict of
    its model, and a config.json that says which, with timm's keys.

    Returns:
        The path of model.safetensors.
    """
    config = {"label_names": job.label_names, "pretrained_cfg": _settings(job)}
    if library == "timm":
        timm.models.save_for_hf(job.network, str(folder), model_config=config, safe_serialization=True)
    else:
        model = {"library": library, "architecture": job.model, "num_classes": len(job.label_names)}
        (folder / CONFIG).write_text(json.dumps(model | config, indent=2))
        safetensors.torch.save_file(job.network.state_dict(), folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors lets nobody else read it
    return folder / WEIGHTS


def load_folder(folder: Path) -> nn.Module:
    """Load the network of an exported folder into a stock model of timm or torchvision.

    Returns:
        The network, in training mode, on the CPU.

    Raises:
        DataError: it is no exported folder.
        FormatError: what is in it does not load.
    """
    if not (folder / CONFIG).is_file():
        raise DataError(
            f"{folder}: expected an exported folder with config.json, found none; make it with `softshard export`"
        )
    try:
        config = json.loads((folder / CONFIG).read_text())
        of_torchvision = config.get("library") == "torchvision"
        network = _torchvision_network(config) if of_torchvision else timm.create_model(f"local-dir:{folder}")
        load_weights(network, read_weights(folder / WEIGHTS), WEIGHTS, remedy="restore the folder")
        return network
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError, WeightsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FormatError(f"{folder}: expected a model that loads, found: {reason}; export again") from None


def _torchvision_network(config: dict[str, Any]) -> nn.Module:
    network = build_student(config["architecture"], config["num_classes"], library="torchvision")
    # where timm's models have theirs, so that one function finds mean and std of both
    network.pretrained_cfg = config["pretrained_cfg"]
    return network


def _settings(job: Job) -> dict[str, Any]:
    pixels = job.preprocessing
    return {
        "input_size": (3, pixels.size, pixels.size),
        "test_input_size": None,  # published weights may be evaluated at another size, these were not
        "crop_pct": pixels.crop_pct,
        "test_crop_pct": None,
        "interpolation": pixels.interpolation,
        "mean": pixels.mean,
        "std": pixels.std,
    }
