"""A run's metrics as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softshard.pipeline.runtime.files import atomic_path

PANELS = (
    ("loss", (("loss", "training"), ("hard_loss", "hard labels"), ("soft_loss", "soft labels"))),
    ("top-1, %", (("top1", "weights"), ("ema_top1", "average (EMA)"), ("folded_top1", "folded"))),
    (
        "validation loss, nats",
        (
            ("validation_loss", "weights"),
            ("ema_validation_loss", "average (EMA)"),
            ("folded_validation_loss", "folded"),
        ),
    ),
    ("agreement with the teacher, %", (("agreement", "weights"), ("ema_agreement", "average (EMA)"))),
    ("learning rate", (("lr", ""),)),
    ("images/s", (("images_per_second", ""),)),
)


def plot_curves(lines: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw a run's metrics as a PNG; panels of which there is nothing are left out.

    Args:
        lines: Those of metrics.jsonl, one for each epoch.
        title: Of the picture.
        path: Of the PNG.
    """
    from matplotlib.figure import Figure  # takes a second, which the first step need not wait for
    from matplotlib.ticker import MaxNLocator

    there = {key for line in lines for key, value in line.items() if value}  # losses that play no part are 0
    panels = [(name, [(key, label) for key, label in series if key in there]) for name, series in PANELS]
    panels = [(name, series) for name, series in panels if series]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 3 * rows))  # with fixed margins: a layout engine draws everything twice
    figure.subplots_adjust(0.07, 0.5 / (3 * rows), 0.98, 1 - 0.6 / (3 * rows), wspace=0.16, hspace=0.45)
    figure.suptitle(title, y=1 - 0.1 / (3 * rows), verticalalignment="top")
    for number, (name, series) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, 2, number)
        for key, label in series:
            points = [(line["epoch"], line[key]) for line in lines if key in line]
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) > 1 else "x")
        axes.set_title(name)
        axes.set_xlabel("epoch")
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend()
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=100, format="png")
