"""What every exported format has in common: its input, what it is made from, how its predictions are asked for."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from softshard.pipeline.recipes.recipe import Model

INPUT, OUTPUT = "images", "logits"
Predictor = Callable[[Tensor], Tensor]  # float32 [N, 3, S, S], normalized, on the CPU -> float32 [N, classes]


class InputSpec(Model):
    """Pixels as every exported format expects them, which is what timm's own models expect.

    They are RGB, scaled to 0..1, minus `mean`, divided by `std`.
    """

    size: int
    crop_pct: float  # timm's: the shorter side becomes size / crop_pct, the middle is cut out
    interpolation: Literal["bilinear"] = "bilinear"  # what views are rendered with
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalize(self, images: Tensor) -> Tensor:
        """Turn pixels, uint8 [N, 3, S, S], into float32 of the same shape, in new memory."""
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return ((images.float() / 255 - mean) / std).contiguous()


@dataclass(frozen=True)
class Job:
    """What a format is written from.

    `calibration()` gives batches of normalized views, float32 [N, 3, S, S], the same ones at each call.
    """

    network: nn.Module  # folded, in evaluation mode, float32, on the CPU
    model: str
    preprocessing: InputSpec
    label_names: tuple[str, ...]
    calibration: Callable[[], Iterable[Tensor]]

    def example(self, batch: int) -> Tensor:
        """Make an input of the network, float32 [batch, 3, S, S]."""
        return torch.zeros(batch, 3, self.preprocessing.size, self.preprocessing.size)

    def metadata(self) -> dict[str, object]:
        """Collect what is written into files that can hold it."""
        return {"model": self.model, **self.preprocessing.model_dump(mode="json"), "label_names": self.label_names}


@dataclass(frozen=True)
class Format:
    """A format beside the folder of weights: its file, the optional packages it needs and the extra that has them.

    `write(job, path)` returns the opset, where there is one.
    `load(path, threads)` gives its predictions, with `threads` threads or (None) as many as its runtime likes; None
    where this system cannot run it. `exact`: predictions are those of the folded network but for rounding.
    """

    file: str
    extra: str
    packages: tuple[str, ...]
    write: Callable[[Job, Path], int | None]
    load: Callable[[Path, int | None], Predictor] | None
    exact: bool = True
    needs: tuple[str, ...] = ()  # other formats that it is made from
