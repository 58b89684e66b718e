"""The scripts that split images and make parts of the docs."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT

from softshard.pipeline.runtime.errors import DataError

SPLIT, KEYS, LINKS, TABLES = (
    runpy.run_path(str(ROOT / f"scripts/{name}.py"))
    for name in ("split_images", "recipe_keys", "check_links", "bench_tables")
)


def write_images(root: Path, counts: dict[str, int]) -> Path:
    root.mkdir()
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.jpg").write_bytes(f"{name} {number}".encode())
    return root


def files_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


class TestSplit:
    def test_each_class_is_divided_and_nothing_is_lost(self, tmp_path: Path) -> None:
        images = write_images(tmp_path / "images", {"cat": 10, "dog": 25, "rare": 2})
        counts = SPLIT["split"](images, tmp_path / "own", 0.2, 0)
        assert counts == {"train": 8 + 20 + 1, "validation": 2 + 5 + 1}
        sides = {name: files_of(tmp_path / "own" / name) for name in counts}
        assert not sides["train"].keys() & sides["validation"].keys()
        assert sides["train"] | sides["validation"] == files_of(images)

    def test_the_seed_decides_and_nothing_else(self, tmp_path: Path) -> None:
        images = write_images(tmp_path / "images", {"cat": 40, "dog": 40})
        for name, seed in (("one", 1), ("again", 1), ("other", 2)):
            SPLIT["split"](images, tmp_path / name, 0.5, seed)
        one, again, other = (files_of(tmp_path / name / "validation") for name in ("one", "again", "other"))
        assert one == again
        assert one != other

    @pytest.mark.parametrize(
        ("counts", "fraction", "message"),
        [
            ({}, 0.2, "expected class folders, found none"),
            ({"cat": 1}, 0.2, "cat: expected at least two images of a class, found 1"),
            ({"cat": 5}, 1.0, "--validation: expected a fraction between 0 and 1, found 1.0"),
        ],
    )
    def test_what_cannot_be_divided(
        self, tmp_path: Path, counts: dict[str, int], fraction: float, message: str
    ) -> None:
        images = write_images(tmp_path / "images", counts)
        with pytest.raises(DataError, match=message):
            SPLIT["split"](images, tmp_path / "own", fraction, 0)
        assert not (tmp_path / "own").exists()

    def test_an_earlier_split_stays(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        images = write_images(tmp_path / "images", {"cat": 5})
        assert SPLIT["main"]([str(images), str(tmp_path / "own")]) == 0
        assert capsys.readouterr().out == f"{tmp_path}/own: 4 images in train/, 1 images in validation/\n"
        before = files_of(tmp_path / "own")
        assert SPLIT["main"]([str(images), str(tmp_path / "own"), "--seed", "5"]) == 2
        assert "found an earlier split" in capsys.readouterr().err
        assert files_of(tmp_path / "own") == before


class TestRecipeKeys:
    def test_every_key_has_a_row_with_its_type_default_and_meaning(self, tmp_path: Path) -> None:
        assert KEYS["main"]([str(tmp_path)]) == 0
        text = "".join((tmp_path / f"{name}.md").read_text() for name in ("pack", "label", "views", "train"))
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
        assert all(len(cells) == 4 and all(cells) for cells in rows)
        shown = {cells[0].removeprefix("| ").strip("`") for cells in rows}
        for recipe in KEYS["RECIPES"].values():
            prefix = "views." if recipe.__name__ == "ViewRecipe" else ""
            assert {prefix + key for key in recipe.model_fields} <= shown
        assert "| `min_top1` | float ≥ 0, ≤ 100 or null | `null` |" in text
        assert "| `views.crop.scale` | two of float > 0, ≤ 1 | `[0.08, 1.0]` |" in text
        assert "| `teachers.N.model` | string | required |" in text

    def test_a_key_without_a_meaning_is_an_error(self) -> None:
        class Silent(KEYS["Model"]):
            said: int = 1
            """Said."""
            unsaid: int = 2

        with pytest.raises(SystemExit, match="Silent: expected a docstring below unsaid"):
            KEYS["docstrings"](Silent)


def test_links_that_lead_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/index.html").write_text('<h2 id="there">b</h2><a href="..">a</a><img src="missing.svg">')
    good = '<a href="b/#there">b</a><a href="https://example.org/x#y">elsewhere</a><a href="#here" id="here">here</a>'
    (tmp_path / "index.html").write_text(f'{good}<a href="b/#gone">b</a><a href="c/">c</a>')
    assert LINKS["problems"](tmp_path) == [
        "b/index.html: missing.svg: expected a file, found none",
        "index.html: b/#gone: expected an id on that page, found none",
        "index.html: c/: expected a file, found none",
    ]
    assert LINKS["main"]([str(tmp_path)]) == 1
    assert capsys.readouterr().out.endswith("3 links lead nowhere\n")


class TestBenchmarkTables:
    def report(self, folder: Path, name: str, figures: Any) -> Path:
        path = folder / f"{name}.json"
        path.write_text(
            json.dumps({"command": "python x.py", "date": "2026-12-01", "machine": "M", "figures": figures})
        )
        return path

    def test_a_report_between_the_marks(self, tmp_path: Path) -> None:
        page = "before\n<!-- report: pack -->\nold\n<!-- end of report: pack -->\nafter\n"
        figures = {"times as fast": 3.8125, "goal": 2, "rounds": [1, 2, 3, 4]}
        text = TABLES["filled"](page, [self.report(tmp_path, "pack", figures)])
        assert text == (
            "before\n<!-- report: pack -->\n`python x.py`, 2026-12-01; M.\n\n| figure | value |\n| --- | --: |\n"
            "| times as fast | 3.812 |\n<!-- end of report: pack -->\nafter\n"
        )
        assert TABLES["filled"](page, []) == page
        with pytest.raises(DataError, match="expected the marks <!-- report: other -->"):
            TABLES["filled"](page, [self.report(tmp_path, "other", {})])

    def test_records_sections_and_nested_figures(self) -> None:
        records = [{"what": "a | b", "ms": 1.5, "goal": 1}, {"what": "c", "ms": 12345.6, "goal": 1}]
        assert list(TABLES["tables"](records)) == ["| figure | ms |\n| --- | --: |\n| a / b | 1.5 |\n| c | 12,346 |\n"]
        nested = {
            "images": 64,
            "sides": {"ours": {"cpu": {"s": 1}, "kl": [0.5, 0.25]}, "peer": {"cpu": {"s": 2}, "kl": []}},
        }
        assert list(TABLES["tables"](nested)) == [
            "| figure | value |\n| --- | --: |\n| images | 64 |\n",
            "| sides | cpu, s | kl |\n| --- | --: | --: |\n| ours | 1 | 0.5 / 0.25 |\n| peer | 2 |  |\n",
        ]

    def test_the_page_has_the_tables_of_the_repository(self) -> None:
        page = (ROOT / "docs/benchmarks.md").read_text()
        assert TABLES["filled"](page, sorted((ROOT / TABLES["REPORTS"]).glob("*.json"))) == page
