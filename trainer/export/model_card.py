"""README.md of an exported folder: a model card for people and for the Hugging Face hub."""

from pathlib import Path

from softshard.pipeline.runtime.files import write_atomically
from softshard.trainer.export.manifest import Exported, FormatFigures

CARD = "README.md"
FEW_LABELS = 20

HEADER = """---
library_name: {library}
pipeline_tag: image-classification
tags: [image-classification, {library}, softshard]
---
# {model}

An image classifier of {classes} classes, with {folded.parameters:,} parameters and {folded.macs:,} multiply-adds for an
image of {size} x {size} pixels.
{made}

| format | file | bytes | top-1 | predictions equal to the folded network's |
| ------ | ---- | ----: | ----: | -----------------------------------------: |
{rows}

Top-1 and predictions are those on the {images} images of the validation set.

## Input

Every format takes normalized images and answers with logits, float32 [N, 3, {size}, {size}] -> [N, {classes}]: RGB, the
shorter side resized to {resized} pixels ({interpolation}), the middle cut out, scaled to 0..1, minus the mean
{mean}, divided by the standard deviation {std}.
{labels}

## Use

In this folder:
"""

TIMM = """
```python
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
images = transform(Image.open("image.jpg").convert("RGB"))[None]
with torch.inference_mode():
    label = model.pretrained_cfg["label_names"][model(images).argmax()]
```
"""

TORCHVISION = """
```python
import json
from pathlib import Path

import safetensors.torch
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

config = json.loads(Path("config.json").read_text())
model = torchvision.models.get_model("{model}", weights=None, num_classes={classes}{options}).eval()
model.load_state_dict(safetensors.torch.load_file("model.safetensors"))
transform = v2.Compose([
    v2.Resize({resized}), v2.CenterCrop({size}), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize({mean}, {std}),
])
images = transform(Image.open("image.jpg").convert("RGB"))[None]
with torch.inference_mode():
    label = config["label_names"][model(images).argmax()]
```
"""

ONNX = """
```python
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
[logits] = session.run(["logits"], {{"images": images.numpy()}})
```
"""

EXECUTORCH = """
One image at a time, with ExecuTorch:

```python
from executorch.runtime import Runtime

[logits] = Runtime.get().load_program("{file}").load_method("forward").execute([images])
```
"""

COREML = """
One image at a time, on macOS with coremltools (in Swift, the class that Xcode makes of {file}):

```python
import coremltools

logits = coremltools.models.MLModel("{file}").predict({{"images": images.numpy()}})["logits"]
```
"""

# torchvision builds these with heads that a student does not have
AUXILIARY_HEADS = ("googlenet", "inception_v3")
USE = {"timm": TIMM, "torchvision": TORCHVISION, "onnx": ONNX, "int8": ONNX, "executorch": EXECUTORCH, "coreml": COREML}


def write_card(folder: Path, exported: Exported) -> None:
    write_atomically(folder / CARD, card(exported).encode())


def card(exported: Exported) -> str:
    """The text: a header for the hub, without a license, figures, the input, and lines that load each format."""
    pixels, student = exported.preprocessing, exported.student
    values = {
        "library": student.library,
        "model": student.model,
        "classes": len(exported.label_names),
        "folded": exported.folded,
        "images": exported.images,
        "made": _made(exported),
        "rows": "\n".join(_row(name, figures) for name, figures in exported.formats.items()),
        "labels": _labels(exported.label_names),
        "options": ", aux_logits=False, init_weights=True" if student.model in AUXILIARY_HEADS else "",
        "resized": int(pixels.size / pixels.crop_pct),
        "size": pixels.size,
        "interpolation": pixels.interpolation,
        "mean": [round(value, 6) for value in pixels.mean],
        "std": [round(value, 6) for value in pixels.std],
    }
    uses = (USE[name].format(file=figures.file, **values) for name, figures in exported.formats.items())
    return HEADER.format(**values) + "".join(uses)


def _made(exported: Exported) -> str:
    if exported.student.expand is None:
        return "It was trained with softshard as it is."
    trained = exported.trained
    return (
        f"It was trained with softshard with more branches, {trained.parameters:,} parameters and {trained.macs:,} "
        "multiply-adds, which have been folded into it exactly."
    )


def _row(name: str, figures: FormatFigures) -> str:
    top1, agreement = (
        "not run here" if value is None else f"{value:.2f} %" for value in (figures.top1, figures.agreement)
    )
    return f"| {name} | {figures.file} | {figures.bytes:,} | {top1} | {agreement} |"


def _labels(names: tuple[str, ...]) -> str:
    if len(names) > FEW_LABELS:
        return "The names of the classes are `label_names` in config.json."
    return f"The classes are {', '.join(names)}."
