"""Tables from the reports of the GPU check, and that the docs have those of the reports in the repository."""

import json
from pathlib import Path
from typing import Any

import gpu_table
import pytest
from helpers.paths import ROOT

COST = {"ms": 12.5, "least": 12.0, "most": 14.0, "mib": 1024.25, "images_per_s": 20480.0, "times": 1.5}
MACHINE = {
    "device": "cuda", "gpu": "GPU X", "gpus": 2, "driver": "1.2", "cuda": "13.0", "cudnn": 91000, "processor": "CPU Y",
    "cores": 16, "python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0", "timm": "1.0.31",
}  # fmt: skip


def check(figures: dict[str, Any], status: str = "ok", why: str = "", code: str = "a") -> dict[str, Any]:
    return {"status": status, "why": why, "date": "2026-12-01", "code": code, "run": "r", "figures": figures}


def stage(**checks: Any) -> dict[str, Any]:
    return {"status": "ok", "why": "", "planned": [*checks, "never begun"], "checks": checks}


@pytest.fixture
def report(tmp_path: Path) -> Path:
    layer = {"worst": 1.2e-5, "worst of separate": 3.5e-5, "layers": 9, "where": "3 x 3: y", "separate there": 1e-5}
    imagenet = {"50": {"hours": 12.25, "bytes": 1_921_750_500}, "300": {"hours": 73.5, "bytes": 11_530_503_000}}
    rates = {"64": COST, "1024": {"why": "out of memory"}}
    stages = {
        "numerics": stage(
            **{"layers: pointwise": check({"float32": layer}), "losses": check({"worst errors": {"float32": 1e-7}})},
            broken=check({"sides": {}}, "failed", "error 2\n<!-- end of gpu reports -->", "b"),
        ),
        "student": stage(
            eager=check({
                "model": "m", "mode": "eager", "layout": "NCHW", "batch": 256,
                "sides": {"plain": COST, "triton": {"why": "out of memory"}},
            }),
            online=check({
                "model": "m", "batch": 256, "teachers": {"deit": {"ms": 90.0}},
                "students": {"closed": {"ours": COST, "deit": {"ms": 100.0, "times": 8.0, "ceiling": 9.25}}},
            }),
        ),
        "teacher": stage(
            eager=check({"model": "t", "mode": "eager", "batches": rates, "images_per_s": 2e4, "imagenet": imagenet})
        ),
        "pipeline": stage(
            label=check({"views_per_second": 1234.5, "verified": "/x: whole", "epochs": [{"loss": 1.0}]}),
            alone=check({}, "skipped", "needs two GPUs, found one"),
        ),
    }  # fmt: skip
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"version": 1, "machine": MACHINE, "tiny": False, "stages": stages}))
    return path


def test_a_report_in_tables(report: Path, capsys) -> None:
    assert gpu_table.main([str(report)]) == 0
    assert capsys.readouterr().out == (
        "**2 x GPU X**, 16 cores of CPU Y; driver 1.2, cuda 13.0, cudnn 91000, torch 2.11.0, triton 3.6.0, "
        """timm 1.0.31, python 3.12.3; 2026-12-01, 2 states of the code.

| stage | ok | failed | skipped | not reached |
| --- | --: | --: | --: | --: |
| numerics | 2 | 1 | 0 | 1 |
| student | 2 | 0 | 0 | 1 |
| teacher | 1 | 0 | 0 | 1 |
| pipeline | 1 | 0 | 1 | 1 |

- numerics, broken: failed: error 2 < !-- end of gpu reports -->
- pipeline, alone: skipped: needs two GPUs, found one

| worst error of a layer: ours / separate branches | float32 |
| --- | --: |
| pointwise | 1.2e-05 / 3.5e-05 |

| check | figures |
| --- | --- |
| losses | worst errors, float32 1e-07 |
| broken |  |

| student | mode | layout | batch | side | ms | images/s | MiB | times |
| --- | --- | --- | --: | --- | --: | --: | --: | --: |
| m | eager | NCHW | 256 | plain | 12.5 | 20,480 | 1,024 | 1.5 |
| m | eager | NCHW | 256 | triton: out of memory |  |  |  |  |

| student | batch | form | step | ms | times ours | at most |
| --- | --: | --- | --- | --: | --: | --: |
| m | 256 | closed | ours | 12.5 | 1.5 |  |
| m | 256 | closed | deit | 100 | 8 | 9.25 |
| m | 256 |  | deit alone | 90 |  |  |

| teacher | mode | batch | images/s | MiB |
| --- | --- | --- | --: | --: |
| t | eager | 64 | 20,480 | 1,024 |
| t | eager | 1024: out of memory |  |  |

| teacher, at its best | ImageNet x 50 views: hours | ImageNet x 50 views: GB, uncompressed """
        """| ImageNet x 300 views: hours | ImageNet x 300 views: GB, uncompressed |
| --- | --: | --: | --: | --: |
| t | 12.25 | 1.922 | 73.5 | 11.53 |

| the whole way | figures |
| --- | --- |
| label | views_per_second 1,234 |
"""
    )


def test_tables_between_the_marks(report: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{gpu_table.BEGIN}old\n{gpu_table.END}after\n")
    assert gpu_table.main(["--into", str(readme), str(report)]) == 0
    assert readme.read_text() == f"before\n{gpu_table.BEGIN}{gpu_table.tables([report])}{gpu_table.END}after\n"
    assert gpu_table.main(["--into", str(readme)]) == 0
    assert readme.read_text() == f"before\n{gpu_table.BEGIN}{gpu_table.NOTHING}{gpu_table.END}after\n"


def test_the_docs_have_the_tables_of_the_repository() -> None:
    """So they can say that something was run on a GPU only where there is a report of it."""
    page = ROOT / "docs/benchmarks.md"
    reports = sorted((ROOT / "benchmarks/reports").glob("*.json"))
    assert page.read_text() == gpu_table.replaced(page, gpu_table.tables(reports))


def test_what_makes_no_table(report: Path, tmp_path: Path, capsys) -> None:
    tiny = json.loads(report.read_text()) | {"tiny": True}
    report.write_text(json.dumps(tiny))
    assert gpu_table.main([str(report)]) == 2
    assert capsys.readouterr().err == (
        f"{report}: expected a report of a whole check, found a tiny one; run it without --tiny\n"
    )
    none = tmp_path / "none.json"
    assert gpu_table.main([str(none)]) == 2
    assert capsys.readouterr().err == (
        f"{none}: expected a report of benchmarks/gpu_check.py, found none or something else; name another file\n"
    )
    text = tmp_path / "text.md"
    text.write_text(gpu_table.BEGIN)
    assert gpu_table.main(["--into", str(text)]) == 2
    assert capsys.readouterr().err == (
        f"{text}: expected the marks <!-- gpu reports --> and <!-- end of gpu reports -->, found none; add them\n"
    )
    assert text.read_text() == gpu_table.BEGIN
