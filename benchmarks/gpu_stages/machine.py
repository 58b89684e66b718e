"""What the figures of a report were measured on."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "torchvision", "timm", "triton", "numpy", "accelerate", "numba", "ffcv", "zarr", "pydantic", "softshard",
)  # fmt: skip


def describe(device: str) -> dict[str, Any]:
    """The device, the processor and the versions; what is not installed is None. Raises RuntimeError without a GPU."""
    import torch  # here: what only starts stages need not load it

    found: dict[str, Any] = {"device": device, "gpu": None, "gpus": 0, "driver": None, "cuda": None, "cudnn": None}
    if device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device that torch can use")
        properties = torch.cuda.get_device_properties(0)
        found["gpu"], found["gpus"] = properties.name, torch.cuda.device_count()
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["driver"], found["cuda"], found["cudnn"] = _driver(), torch.version.cuda, torch.backends.cudnn.version()
    found["processor"], found["cores"] = _processor(), len(os.sched_getaffinity(0))
    found["python"] = platform.python_version()
    return found | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
