"""Reports of the benchmarks on a CPU, and their tables in docs/benchmarks.md: no figure of a report is written by hand.

    python scripts/bench_tables.py run loader --rounds 9     runs benchmarks/loader.py and keeps a report of it
    python scripts/bench_tables.py tables                    puts the tables of all reports between the page's marks

A report is benchmarks/reports/cpu/NAME.json: what `--json` wrote, with command, date and machine. A section of the page
without a report stays as it is. benchmarks/gpu_table.py makes the tables of GPUs.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from softshard.pipeline.runtime.errors import DataError
from softshard.pipeline.runtime.files import write_atomically

REPORTS, PAGE = Path("benchmarks/reports/cpu"), Path("docs/benchmarks.md")
FEW = 3  # longer lists are the figures of single rounds
Figures = dict[str, Any]
LIBRARIES = ("torch", "timm", "ffcv", "numba", "numpy", "pillow")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run", help="run a benchmark and keep its report; further options are its own")
    running.add_argument("name", help="loader, pack, store, ...")
    verbs.add_parser("tables", help="put the tables of all reports into the page")
    options, rest = parser.parse_known_args(arguments)
    try:
        if options.verb == "run":
            run(options.name, rest)
        else:
            write_atomically(PAGE, filled(PAGE.read_text(), sorted(REPORTS.glob("*.json"))).encode())
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run(name: str, options: Sequence[str]) -> None:
    """Run a benchmark with `--json`, and write its report."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        subprocess.run([sys.executable, f"benchmarks/{name}.py", *options, "--json", str(figures)], check=True)
        report = {
            "command": shlex.join(["python", f"benchmarks/{name}.py", *options]),
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "figures": json.loads(figures.read_text()),
        }
    REPORTS.mkdir(parents=True, exist_ok=True)
    write_atomically(REPORTS / f"{name}.json", json.dumps(report, indent=1).encode())


def machine() -> str:
    """Cores, processor and versions, in one line."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"{cores} cores of {(models or [platform.machine()])[0]}; Python {platform.python_version()}, {versions}"


def filled(text: str, reports: Sequence[Path]) -> str:
    """The page with the tables of the reports between their marks. Raises DataError for a report without marks."""
    for path in reports:
        begin, end = f"<!-- report: {path.stem} -->\n", f"<!-- end of report: {path.stem} -->\n"
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise DataError(f"{PAGE}: expected the marks {begin.strip()} and {end.strip()}, found none; add them")
        report = json.loads(path.read_text())
        head = f"`{report['command']}`, {report['date']}; {report['machine']}.\n\n"
        text = before + begin + head + "\n".join(tables(report["figures"])) + end + after
    return text


def tables(figures: Any, title: str = "figure") -> Iterator[str]:
    """Tables of what a benchmark wrote: single figures, then one for all sections that have the same figures, or one
    for each. Goals and the figures of single rounds are left out."""
    figures = named(figures)
    sections = {name: named(value) for name, value in figures.items() if is_section(value)}
    single = flat({name: value for name, value in figures.items() if name not in sections})
    if single:
        yield table([title, "value"], [[name, value] for name, value in single.items()])
    if len({tuple(section) for section in sections.values()}) == 1 and len(sections) > 1:
        rows = {name: flat(section) for name, section in sections.items()}
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        yield table([title, *columns], [[name, *(row[column] for column in columns)] for name, row in rows.items()])
    else:
        for name, section in sections.items():
            yield from tables(section, name)


def named(figures: Any) -> Any:
    """Records by what they are about, or by their number."""
    if isinstance(figures, list):
        return {str(record.pop("what", number)): record for number, record in enumerate(map(dict, figures), 1)}
    return figures


def is_section(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def flat(figures: Figures, where: str = "") -> dict[str, str]:
    """All figures of a section as text, by their names with those of the sections around them."""
    found: dict[str, str] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            found |= flat(value, f"{where}{name}, ")
        elif isinstance(value, list) and len(value) <= FEW and not is_section(value):
            found[where + name] = " / ".join(number(part) for part in value)
        elif not isinstance(value, list) and not name.startswith("goal"):
            found[where + name] = number(value)
    return found


def number(value: Any) -> str:
    """Four digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *(["--:"] * (len(heads) - 1))], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
