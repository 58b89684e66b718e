import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_runs import make_inputs, write_run
from PIL import Image
from torch import Tensor

import softshard.trainer.export.formats
import softshard.trainer.export.latency
from softshard.pipeline.runtime.errors import DataError
from softshard.trainer.__main__ import main
from softshard.trainer.export.export import export
from softshard.trainer.export.latency import Latency, Side, latency, measure, plot, ratios, save_json, speedup, table
from softshard.trainer.export.manifest import Cost


def predict(images: Tensor) -> Tensor:
    return images


def made_up(form, name: str, milliseconds: list[float], bytes: int | None = None) -> Latency:
    return Latency(Side("net", form, name, Cost(parameters=1234, macs=5_600_000), bytes, predict), tuple(milliseconds))


LATENCIES = [
    made_up("unfolded", "torch", [40.0, 60.0, 50.0]),
    made_up("unfolded", "onnx", [30.0, 29.0, 90.0], 4000),
    made_up("folded", "torch", [10.0, 20.0, 10.0]),
    made_up("folded", "onnx", [10.0, 9.0, 30.0], 2000),
    made_up("folded", "int8", [5.0, 18.0, 15.0], 1000),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("latency"))


@pytest.fixture(scope="module")
def folder(inputs: Path) -> Path:
    export(write_run(inputs, "run"), inputs / "exported", ["int8"])
    return inputs / "exported"


class TestLatency:
    def test_every_format_is_measured_folded_and_unfolded_where_it_can_be(self, folder: Path) -> None:
        measured = latency(folder, rounds=2)
        sides = [(each.side.form, each.side.format) for each in measured]
        unfolded, folded = [("unfolded", name) for name in ("torch", "onnx")], ["torch", "onnx", "int8"]
        assert sides == [*unfolded, *(("folded", name) for name in folded)]
        assert all(len(each.rounds) == 2 and min(each.rounds) > 0 for each in measured)
        assert measured[1].side.cost.macs > 1.1 * measured[3].side.cost.macs
        assert measured[3].side.bytes == (folder / "model.onnx").stat().st_size

    def test_a_student_without_branches_has_one_form(self, inputs: Path) -> None:
        export(write_run(inputs, "plain", ("student.expand", "null")), inputs / "exported_plain")
        assert [each.side.form for each in latency(inputs / "exported_plain", rounds=1)] == ["folded"]

    def test_extras_that_are_not_installed(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(softshard.trainer.export.formats, "find_spec", lambda package: None)
        with pytest.raises(DataError, match=r"onnx: expected onnx, .*; install with: pip install 'softshard\[onnx\]'"):
            latency(folder, rounds=1)

    def test_a_file_that_is_gone(self, inputs: Path, folder: Path, tmp_path: Path) -> None:
        for path in folder.iterdir():
            if path.suffix != ".onnx":
                (tmp_path / path.name).write_bytes(path.read_bytes())
        with pytest.raises(DataError, match=r"model.onnx: expected the onnx file of this export, found none"):
            latency(tmp_path, rounds=1)

    def test_another_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"expected an exported folder with export.json, found none"):
            latency(tmp_path, rounds=1)


def test_sides_take_turns_on_one_thread_after_a_call_that_is_not_timed() -> None:
    calls: list[tuple[str, int, tuple[int, ...]]] = []

    def side(name: str) -> Side:
        def predict(images: Tensor) -> Tensor:
            calls.append((name, torch.get_num_threads(), tuple(images.shape)))
            return images

        return Side(name, "folded", "torch", Cost(parameters=1, macs=1), None, predict)

    before = torch.get_num_threads()
    measured = measure([side("a"), side("b")], size=8, rounds=4)
    assert [each.side.student for each in measured] == ["a", "b"]
    assert [len(each.rounds) for each in measured] == [4, 4]
    assert "".join(name for name, _, _ in calls) == "aabb" * 7
    assert {call[1:] for call in calls} == {(1, (1, 3, 8, 8))}
    assert torch.get_num_threads() == before


class TestFigures:
    def test_median_and_percentile(self) -> None:
        rounds = [float(value) for value in np.random.default_rng(0).permutation(101)]
        each = made_up("folded", "torch", rounds)
        assert each.median == 50.0
        assert each.p90 == pytest.approx(90, abs=1)
        assert made_up("folded", "torch", [3.0]).p90 == 3.0

    def test_speedup_is_the_median_of_the_rounds_ratios(self) -> None:
        assert speedup(LATENCIES[1], LATENCIES[3]) == 3.0

    def test_what_is_compared(self) -> None:
        assert ratios(LATENCIES) == [
            ("net", "torch, folded against unfolded", 4.0),
            ("net", "onnx, folded against unfolded", 3.0),
            ("net", "int8 against onnx", 2.0),
        ]

    def test_the_table(self) -> None:
        lines = table(LATENCIES).splitlines()
        assert lines[3] == "| net | unfolded | onnx | 1,234 | 5.6 | 4,000 | 30.00 | 90.00 |"
        assert lines[-1] == "net: int8 against onnx: 2.00 x as fast"

    def test_the_json(self, tmp_path: Path) -> None:
        save_json(LATENCIES, tmp_path / "latency.json")
        rows = json.loads((tmp_path / "latency.json").read_text())
        assert [row["median"] for row in rows] == [each.median for each in LATENCIES]
        assert rows[4]["rounds"] == [5.0, 18.0, 15.0]
        assert list(rows[4].values())[:6] == ["net", "folded", "int8", 1000, 1234, 5_600_000]

    def test_the_plot(self, tmp_path: Path) -> None:
        plot(LATENCIES, tmp_path / "latency.png")
        with Image.open(tmp_path / "latency.png") as picture:
            assert picture.size == (1200, 750)
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10


class TestCommand:
    def test_it_prints_the_table_and_writes_what_is_asked_for(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(softshard.trainer.export.latency, "latency", lambda folder, rounds: LATENCIES[:rounds])
        written = tmp_path / "latency.json", tmp_path / "latency.png"
        options = ["--json", str(written[0]), "--plot", str(written[1])]
        assert main(["latency", "--export", str(folder), "--rounds", "5", *options]) == 0
        assert all(path.stat().st_size for path in written)
        printed = capsys.readouterr().out
        assert re.search(r"^\| net \| folded \| int8 \| ", printed, re.MULTILINE)
        assert re.search(r"^net: onnx, folded against unfolded: 3.00 x as fast$", printed, re.MULTILINE)

    def test_too_few_rounds(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["latency", "--export", str(folder), "--rounds", "0"]) == 2
        assert "--rounds: expected at least 1, found 0" in capsys.readouterr().err
