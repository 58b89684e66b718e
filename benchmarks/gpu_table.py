"""Tables from the reports of gpu_check.py, for docs/benchmarks.md: no figure of a GPU is written by hand.

    python benchmarks/gpu_table.py gpu-report.json      prints them
    python benchmarks/gpu_table.py --into docs/benchmarks.md benchmarks/reports/*.json      puts them between its marks

Reports of tiny runs are refused: they show that the check works, and nothing about a machine. Without any report the
text says that nothing was run.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the packages, where they are not installed

from gpu_stages import STAGES
from gpu_stages.report import Report

from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.runtime.files import write_atomically

BEGIN, END = "<!-- gpu reports -->\n", "<!-- end of gpu reports -->\n"
NOTHING = "No GPU code of this project was run yet: there is no report of `make gpu-check`.\n"
Figures = dict[str, Any]
Rows = list[list[str]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="*", type=Path)
    parser.add_argument("--into", type=Path, help="a file with the marks")
    options = parser.parse_args(arguments)
    try:
        text = tables(options.reports)
        if options.into:
            write_atomically(options.into, replaced(options.into, text).encode())
        else:
            print(text, end="")
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def replaced(path: Path, text: str) -> str:
    """The file's text with `text` between its marks. Raises DataError where there are no marks."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise DataError(f"{path}: expected the marks {BEGIN.strip()} and {END.strip()}, found none; add them")
    return before + begin + text + end + after


def tables(paths: Sequence[Path]) -> str:
    """Of all reports, in the order of their names. Raises DataError for what is no report of a whole machine."""
    return "\n".join(_tables(path) for path in sorted(paths)) or NOTHING


def _tables(path: Path) -> str:
    content = Report.read(path).content
    if content["tiny"]:
        raise DataError(f"{path}: expected a report of a whole check, found a tiny one; run it without --tiny")
    parts = [_heading(content), _table(["stage", "ok", "failed", "skipped", "not reached"], _statuses(content))]
    problems = list(_problems(content))
    if problems:
        parts.append("".join(f"- {line}\n" for line in problems))
    figures = {stage: list(_figures(content, stage)) for stage in STAGES}
    parts += [*_numerics(figures["numerics"]), *_student(figures["student"]), *_teacher(figures["teacher"])]
    return "\n".join([*parts, *_pipeline(figures["pipeline"])])


def _heading(content: Figures) -> str:
    machine, checks = content["machine"], [c for s in content["stages"].values() for c in s["checks"].values()]
    dates, codes = sorted({check["date"] for check in checks}), {check["code"] for check in checks}
    gpu = f"{machine['gpus']} x {machine['gpu']}" if machine["gpu"] else "no GPU"
    versions = [f"{name} {machine[name]}" for name in ("driver", "cuda", "cudnn", "torch", "triton", "timm", "python")]
    states = f", {len(codes)} states of the code" if len(codes) > 1 else ""
    return (
        f"**{gpu}**, {machine['cores']} cores of {machine['processor']}; {', '.join(versions)}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1]))) if dates else 'nothing run'}{states}.\n"
    )


def _statuses(content: Figures) -> Rows:
    rows = []
    for name, stage in content["stages"].items():
        found = [check["status"] for check in stage["checks"].values()]
        counts = [found.count(status) for status in ("ok", "failed", "skipped")]
        rows.append([name, *map(str, counts), str(len(stage["planned"]) - len(found))])
    return rows


def _problems(content: Figures) -> Iterator[str]:
    for stage, found in content["stages"].items():
        for name, check in found["checks"].items():
            if check["status"] != "ok":
                yield _text(f"{stage}, {name}: {check['status']}: {check['why']}")


def _figures(content: Figures, stage: str) -> Iterator[tuple[str, Figures]]:
    """Also those of failed checks, which stand above with what is wrong."""
    for name, check in content["stages"].get(stage, {"checks": {}})["checks"].items():
        if check.get("figures"):
            yield name, check["figures"]


def _numerics(checks: list[tuple[str, Figures]]) -> Iterator[str]:
    """Errors of layers by precision, ours beside those of separate branches; every other figure in a line."""
    layers = [(name, figures) for name, figures in checks if name.startswith("layers: ")]
    precisions = list(dict.fromkeys(precision for _, figures in layers for precision in figures))
    if layers:
        rows = [
            [name.removeprefix("layers: "), *(_errors(figures.get(p)) for p in precisions)] for name, figures in layers
        ]
        yield _table(["worst error of a layer: ours / separate branches", *precisions], rows)
    others = [[name, _listed(figures)] for name, figures in checks if not name.startswith("layers: ")]
    if others:
        yield _table(["check", "figures"], others)


def _errors(found: Figures | None) -> str:
    return f"{found['worst']:.1e} / {found['worst of separate']:.1e}" if found else ""


def _listed(figures: Figures, where: str = "") -> str:
    """`name value; name, name value; ...`, without what is missing, lists, and paths."""
    parts = []
    for name, value in figures.items():
        if isinstance(value, dict):
            parts.append(_listed(value, f"{where}{name}, "))
        elif value is not None and not isinstance(value, list) and "/" not in str(value):
            parts.append(f"{where}{name} {_number(value)}")
    return "; ".join(part for part in parts if part)


def _student(checks: list[tuple[str, Figures]]) -> Iterator[str]:
    steps = [(figures, figures["sides"]) for _, figures in checks if "sides" in figures]
    if steps:
        rows = [row for figures, sides in steps for row in _sides(figures, sides)]
        yield _table(["student", "mode", "layout", "batch", "side", "ms", "images/s", "MiB", "times"], rows)
    online = [figures for _, figures in checks if "students" in figures]
    if online:
        rows = [row for figures in online for row in _online(figures)]
        yield _table(["student", "batch", "form", "step", "ms", "times ours", "at most"], rows)


def _sides(figures: Figures, sides: Figures) -> Iterator[list[str]]:
    head = [figures["model"], figures["mode"], figures["layout"], str(figures["batch"])]
    for name, cost in sides.items():
        side = f"{figures['form']}, {name}" if "form" in figures else name
        if "why" in cost:
            side += f": {cost['why']}"
        if "first_step_s" in cost:
            side += f", first step {cost['first_step_s']:.0f} s, {cost['graphs']} graphs"
        yield [*head, side, *(_number(cost.get(key)) for key in ("ms", "images_per_s", "mib", "times"))]


def _online(figures: Figures) -> Iterator[list[str]]:
    for form, sides in figures["students"].items():
        for name, cost in sides.items():
            step = f"{name}: {cost['why']}" if "why" in cost else name
            head = [figures["model"], str(figures["batch"]), form, step]
            yield [*head, *(_number(cost.get(key)) for key in ("ms", "times", "ceiling"))]
    for name, cost in figures["teachers"].items():
        yield [figures["model"], str(figures["batch"]), "", f"{name} alone", _number(cost.get("ms")), "", ""]


def _teacher(checks: list[tuple[str, Figures]]) -> Iterator[str]:
    rows = []
    for _, figures in checks:
        for batch, cost in figures["batches"].items():
            images = f"{batch}: {cost['why']}" if "why" in cost else batch
            numbers = [_number(cost.get(key)) for key in ("images_per_s", "mib")]
            rows.append([figures["model"], figures["mode"], images, *numbers])
    if rows:
        yield _table(["teacher", "mode", "batch", "images/s", "MiB"], rows)
    best: dict[str, Figures] = {}
    for _, figures in checks:
        if figures.get("images_per_s", 0) > best.get(figures["model"], {}).get("images_per_s", 0):
            best[figures["model"]] = figures
    if best:
        views = list(next(iter(best.values()))["imagenet"])
        heads = [f"ImageNet x {count} views: {what}" for count in views for what in ("hours", "GB, uncompressed")]
        yield _table(["teacher, at its best", *heads], [[name, *_imagenet(found)] for name, found in best.items()])


def _imagenet(figures: Figures) -> Iterator[str]:
    for found in figures["imagenet"].values():
        yield from (_number(found["hours"]), _number(found["bytes"] / 1e9))


def _pipeline(checks: list[tuple[str, Figures]]) -> Iterator[str]:
    if checks:
        yield _table(["the whole way", "figures"], [[name, _listed(figures)] for name, figures in checks])


def _number(value: Any) -> str:
    """Four digits; what is missing is nothing."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers stand at the right."""
    numbers = [not any(set(row[column]) - set("0123456789.,e+-/ ") for row in rows) for column in range(len(heads))]
    lines = [heads, ["--:" if number else "---" for number in numbers], *rows]
    return "".join(f"| {' | '.join(_text(cell).replace('|', '/') for cell in line)} |\n" for line in lines)


def _text(words: str) -> str:
    """In one line, and without what would be a mark of the file."""
    return " ".join(words.split()).replace("<!--", "< !--")


if __name__ == "__main__":
    sys.exit(main())
