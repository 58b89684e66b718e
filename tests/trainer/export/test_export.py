import copy
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import torchvision.models
from helpers.small_runs import digits, make_inputs, train_recipe, write_run
from huggingface_hub import ModelCard
from timm.data.config import resolve_data_config
from torch import Tensor, nn

import softshard.trainer.export.formats
from softshard.pipeline.images.beton import open_beton
from softshard.pipeline.recipes.yaml_file import save_recipe
from softshard.pipeline.runtime.errors import DataError, FormatError, RecipeError
from softshard.trainer.__main__ import main
from softshard.trainer.evaluate import evaluate
from softshard.trainer.export.compare import compare
from softshard.trainer.export.export import export
from softshard.trainer.export.formats import FORMATS, chosen_formats
from softshard.trainer.export.formats.contract import Job
from softshard.trainer.export.formats.folder import load_folder
from softshard.trainer.export.formats.onnx_file import write_onnx
from softshard.trainer.export.manifest import cost_of, open_exported
from softshard.trainer.loop.run_folder import CLASSES, RECIPE, WEIGHTS
from softshard.trainer.student import make_student

EXPORTERS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def run(inputs: Path) -> Path:
    return write_run(inputs, "run")


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    """The run in every format that the tests' installation has."""
    export(run, run.parent / "exported", ("timm", "onnx", "int8"))
    return run.parent / "exported"


@pytest.fixture
def out(run: Path) -> Iterator[Path]:
    path = run.parent / "out"
    yield path
    assert not [name for name in os.listdir(run.parent) if name.startswith(".out")]
    shutil.rmtree(path, ignore_errors=True)


def normalized(folder: Path, images: Tensor) -> Tensor:
    return open_exported(folder).preprocessing.normalize(images)


class TestTimmFolder:
    def test_stock_timm_loads_it_and_predicts_as_the_run_does(self, inputs: Path, run: Path, folder: Path) -> None:
        stock: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        plain = timm.create_model("test_efficientnet", num_classes=10)
        plain.load_state_dict(stock.state_dict(), strict=True)
        student = make_student(train_recipe(inputs), run / WEIGHTS).eval()
        mean, std = (torch.tensor(stock.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        images = digits(inputs)
        with torch.inference_mode():
            # float32 sums in another order; parity in float64 is asserted by export itself
            torch.testing.assert_close(stock((images / 255 - mean) / std), student(images), rtol=1e-4, atol=1e-4)

    def test_it_says_how_to_use_the_model(self, folder: Path) -> None:
        stock: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
        config = stock.pretrained_cfg
        assert config["input_size"] == (3, 32, 32)
        assert config["crop_pct"] == 1.0
        assert config["interpolation"] == "bilinear"
        assert config["num_classes"] == 10
        assert config["label_names"] == [f"digit {digit}" for digit in range(10)]
        assert resolve_data_config(pretrained_cfg=config, use_test_size=True)["input_size"] == (3, 32, 32)

    def test_evaluations_of_run_and_folder_agree(self, inputs: Path, run: Path, folder: Path) -> None:
        recipe = train_recipe(inputs)
        one, two = evaluate(recipe, run / WEIGHTS), evaluate(recipe, folder)
        assert one.predictions == two.predictions
        assert one.parameters > two.parameters
        assert open_exported(folder).formats["timm"].top1 == two.scores.top1

    def test_others_may_read_it(self, folder: Path) -> None:
        assert all(path.stat().st_mode & 0o444 == 0o444 for path in (folder, *folder.iterdir()))

    def test_ghostnetv3_at_half_width_loads_too(self, inputs: Path, out: Path) -> None:
        run = write_run(inputs, "ghost", ("student.model", "ghostnetv3_050"), ("data.size", "64"))
        export(run, out)
        stock = timm.create_model(f"local-dir:{out}", pretrained=True)
        plain = timm.create_model("ghostnet_050", num_classes=10, version="v2")
        plain.load_state_dict(stock.state_dict(), strict=True)

    def test_a_damaged_one_is_named(self, folder: Path, out: Path) -> None:
        shutil.copytree(folder, out)
        weights = (out / WEIGHTS).read_bytes()
        for data in (weights[: len(weights) // 2], b"", b"x" * 100):
            (out / WEIGHTS).write_bytes(data)
            with pytest.raises(FormatError, match=r"out: expected a model that loads, found: .*; export again"):
                load_folder(out)
        (out / "config.json").write_text("{")
        with pytest.raises(FormatError, match=r"out: expected a model that loads, found: .*; export again"):
            load_folder(out)

    def test_another_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"expected an exported folder with config.json, found none"):
            load_folder(tmp_path)


def test_torchvision_students_export_a_state_dict_of_torchvision(inputs: Path, out: Path) -> None:
    changes = ("student.model", "shufflenet_v2_x0_5"), ("student.library", "torchvision")
    run = write_run(inputs, "torchvision", *changes)
    export(run, out)
    stock = torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=10)
    stock.load_state_dict(safetensors.torch.load_file(out / WEIGHTS), strict=True)
    recipe = train_recipe(inputs, *changes)
    assert evaluate(recipe, out).predictions == evaluate(recipe, run / WEIGHTS).predictions
    assert list(open_exported(out).formats) == ["torchvision"]
    run_card(out, inputs)


class TestOnnx:
    def test_any_batch_gives_the_logits_of_the_folded_network(self, inputs: Path, folder: Path) -> None:
        session: Any = onnxruntime.InferenceSession(folder / "model.onnx")
        network, images = load_folder(folder).eval(), normalized(folder, digits(inputs))
        for count in (1, 7, 20):
            [logits] = session.run(["logits"], {"images": images[:count].numpy()})
            with torch.inference_mode():
                torch.testing.assert_close(torch.from_numpy(logits), network(images[:count]), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("file", ["model.onnx", "model.int8.onnx"])
    def test_the_file_says_how_to_use_it(self, folder: Path, file: str) -> None:
        model = onnx.load(folder / file)
        onnx.checker.check_model(model, full_check=True)
        metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props if "." not in entry.key}
        assert metadata["mean"] == [0.485, 0.456, 0.406]
        assert metadata["std"] == [0.229, 0.224, 0.225]
        assert (metadata["size"], metadata["crop_pct"], metadata["interpolation"]) == (32, 1.0, "bilinear")
        assert metadata["label_names"] == [f"digit {digit}" for digit in range(10)]
        [opset] = [entry.version for entry in model.opset_import if not entry.domain]
        assert metadata["opset"] == opset

    @pytest.mark.parametrize("file", ["model.onnx", "model.int8.onnx"])
    def test_nothing_in_the_file_depends_on_where_it_was_written(self, folder: Path, file: str) -> None:
        """torch.onnx puts the lines of code that each node comes from into it, with the paths of their files."""
        assert not any(name in (folder / file).read_bytes() for name in (b"site-packages", b'.py"'))

    def test_a_network_that_torch_cannot_export(self, folder: Path, tmp_path: Path) -> None:
        class Branching(nn.Flatten):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input if input.sum() > 0 else -input)

        job = Job(Branching().eval(), "branching", open_exported(folder).preprocessing, (), list)
        with pytest.raises(DataError, match=r"onnx: expected a network that torch can export, .* branching is none"):
            write_onnx(job, tmp_path / "model.onnx")

    def test_what_the_manifest_says_of_it(self, folder: Path) -> None:
        figures = open_exported(folder).formats["onnx"]
        assert figures.bytes == (folder / "model.onnx").stat().st_size
        assert figures.agreement == 100.0
        assert figures.difference is not None
        assert figures.difference < 1e-5


class TestInt8:
    def test_weights_are_bytes_with_a_scale_for_each_channel(self, folder: Path) -> None:
        model = onnx.load(folder / "model.int8.onnx")
        shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        weights = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in shapes]
        kernels = [node for node in weights if len(shapes[node.input[0]]) == 4]
        assert len(kernels) == 17  # those of all convolutions
        for node in kernels:
            assert types[node.input[0]] == onnx.TensorProto.INT8
            assert shapes[node.input[1]] == shapes[node.input[0]][:1]

    def test_it_is_evaluated(self, inputs: Path, folder: Path) -> None:
        session: Any = onnxruntime.InferenceSession(folder / "model.int8.onnx")
        [logits] = session.run(["logits"], {"images": normalized(folder, digits(inputs)).numpy()})
        labels = open_beton(inputs / "validation.beton").labels
        figures = open_exported(folder).formats["int8"]
        assert figures.top1 == 100 * (logits.argmax(1) == labels).mean()
        assert figures.bytes < 0.5 * open_exported(folder).formats["onnx"].bytes

    def test_it_brings_the_model_that_it_is_made_from(self) -> None:
        assert chosen_formats(["int8"], "timm") == ["onnx", "int8"]

    def test_the_same_views_calibrate_each_time(self, folder: Path, run: Path, out: Path) -> None:
        export(run, out, ["int8"])
        one, two = (onnx.load(path / "model.int8.onnx") for path in (folder, out))
        scales = [{t.name: t.SerializeToString() for t in model.graph.initializer} for model in (one, two)]
        assert scales[0] == scales[1]


@EXPORTERS
def test_executorch(inputs: Path, run: Path, out: Path) -> None:
    runtime = pytest.importorskip("executorch.runtime")
    figures = export(run, out, ["executorch"]).formats["executorch"]
    assert figures.agreement == 100.0
    program = runtime.Runtime.get().load_program(out / "model.pte")
    assert program.load_method("size").execute([]) == [32]
    assert program.load_method("mean").execute([]) == pytest.approx([0.485, 0.456, 0.406])
    run_card(out, inputs)


@EXPORTERS
def test_coreml(run: Path, out: Path) -> None:
    coremltools = pytest.importorskip("coremltools")
    figures = export(run, out, ["coreml"]).formats["coreml"]
    assert (figures.agreement is None) == (sys.platform != "darwin")
    model = coremltools.models.MLModel(str(out / "model.mlpackage"), skip_model_load=True)
    assert [entry.name for entry in model.get_spec().description.input] == ["images"]
    assert [entry.name for entry in model.get_spec().description.output] == ["logits"]
    assert json.loads(model.user_defined_metadata["size"]) == 32


def run_card(folder: Path, inputs: Path) -> None:
    """Run the lines of a model card as a reader would."""
    shutil.copy(inputs / "validation" / "3" / "0.jpg", folder / "image.jpg")
    before = Path.cwd()
    os.chdir(folder)
    names: dict[str, Any] = {}
    try:
        for block in re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL):
            exec(block, names)
    finally:
        os.chdir(before)
        (folder / "image.jpg").unlink()
    assert names["label"] in [f"digit {digit}" for digit in range(10)]


class TestCard:
    def test_its_lines_work(self, inputs: Path, folder: Path) -> None:
        run_card(folder, inputs)

    def test_it_has_the_figures(self, folder: Path) -> None:
        text, exported = (folder / "README.md").read_text(), open_exported(folder)
        header: Any = ModelCard(text).data
        assert (header.library_name, header.pipeline_tag) == ("timm", "image-classification")
        assert header.tags == ["image-classification", "timm", "softshard"]
        assert header.license is None
        assert f"{exported.folded.parameters:,} parameters" in text
        for name, figures in exported.formats.items():
            assert f"| {name} | {figures.file} | {figures.bytes:,} | {figures.top1:.2f} % |" in text
        assert "digit 9" in text


class TestManifest:
    def test_cost(self, folder: Path) -> None:
        exported = open_exported(folder)
        assert exported.folded == cost_of(load_folder(folder), 32)
        assert exported.trained.macs > 1.1 * exported.folded.macs
        assert cost_of(timm.create_model("mobilenetv2_100"), 224).macs == pytest.approx(300.8e6, rel=1e-3)

    def test_a_damaged_one_is_named(self, folder: Path, out: Path) -> None:
        out.mkdir()
        text = (folder / "export.json").read_text()
        for damaged in (text.replace('"images": 20', '"images": 21'), text[:100], "[]"):
            (out / "export.json").write_text(damaged)
            with pytest.raises(FormatError, match=r"export.json: expected a manifest .*; export again"):
                open_exported(out)

    def test_another_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"expected an exported folder with export.json, found none"):
            open_exported(tmp_path)


class TestBadInput:
    def test_nothing_is_overwritten_and_nothing_half_written(self, run: Path, folder: Path) -> None:
        with pytest.raises(DataError, match=r"expected a new folder, found one that exists"):
            export(run, folder)
        assert not [name for name in os.listdir(folder.parent) if name.startswith(".exported")]

    def test_an_unfinished_run(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"expected a finished run with recipe.yaml, classes.txt and model.safe"):
            export(tmp_path, tmp_path / "out")

    @pytest.mark.parametrize("change", [("student.model", "mobilenetv2_050"), ("student.expand.branches", "3")])
    def test_a_checkpoint_of_another_architecture(
        self, inputs: Path, run: Path, out: Path, tmp_path: Path, change: tuple[str, str]
    ) -> None:
        shutil.copytree(run, tmp_path, dirs_exist_ok=True)
        save_recipe(train_recipe(inputs, change), tmp_path / RECIPE)
        with pytest.raises(DataError, match=r"expected the weights of this recipe's student, found others"):
            export(tmp_path, out)

    def test_a_checkpoint_of_other_classes(self, inputs: Path, run: Path, out: Path, tmp_path: Path) -> None:
        shutil.copytree(run, tmp_path, dirs_exist_ok=True)
        weights = safetensors.torch.load_file(run / WEIGHTS)
        for name in ("classifier.weight", "classifier.bias"):
            weights[name] = weights[name][:7].clone()
        safetensors.torch.save_file(weights, tmp_path / WEIGHTS)
        with pytest.raises(DataError, match=r"expected the weights of this recipe's student, found others"):
            export(tmp_path, out)

    def test_a_validation_set_of_other_classes(self, inputs: Path, run: Path, out: Path, tmp_path: Path) -> None:
        shutil.copytree(run, tmp_path, dirs_exist_ok=True)
        save_recipe(train_recipe(inputs, ("student.num_classes", "7")), tmp_path / RECIPE)
        with pytest.raises(DataError, match=r"expected 7 classes, as the student has, found 10"):
            export(tmp_path, out)

    def test_names_of_other_classes(self, run: Path, out: Path, tmp_path: Path) -> None:
        shutil.copytree(run, tmp_path, dirs_exist_ok=True)
        (tmp_path / CLASSES).write_text("one\ntwo\n")
        with pytest.raises(DataError, match=r"classes.txt: expected 10 class names, as the student has .* found 2"):
            export(tmp_path, out)

    def test_fresh_batch_norms_are_warned_of(self, inputs: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        export(write_run(inputs, "fresh", seen=False), out)
        assert re.search(r"^warning: .*fresh: expected batch norms that have seen images", capsys.readouterr().err)

    def test_others_are_not(self, run: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        export(run, out)
        assert "warning" not in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["torchvision", "tflite", ""])
    def test_unknown_formats(self, run: Path, out: Path, name: str) -> None:
        expected = f"--formats: expected some of timm, onnx, int8, executorch, coreml .* of timm, found '{name}'$"
        with pytest.raises(RecipeError, match=expected):
            export(run, out, ["onnx", name])

    @pytest.mark.parametrize(
        ("name", "missing", "extra"),
        [
            ("onnx", "onnxscript", "onnx"),
            ("int8", "onnxruntime", "onnx"),
            ("executorch", "executorch", "executorch"),
            ("coreml", "coremltools", "coreml"),
        ],
    )
    def test_extras_that_are_not_installed(
        self, run: Path, out: Path, monkeypatch: pytest.MonkeyPatch, name: str, missing: str, extra: str
    ) -> None:
        monkeypatch.setattr(
            softshard.trainer.export.formats, "find_spec", lambda package: None if package == missing else package
        )
        with pytest.raises(DataError, match=rf"found no {missing}; install .* pip install 'softshard\[{extra}\]'"):
            export(run, out, [name])
        assert not out.exists()

    def test_a_format_that_computes_something_else(self, run: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def write_others(job: Job, path: Path) -> int | None:
            network = copy.deepcopy(job.network)
            with torch.no_grad():
                next(network.parameters()).mul_(2)
            return write_onnx(replace(job, network=network), path)

        wrong = replace(FORMATS["onnx"], write=write_others)
        monkeypatch.setitem(softshard.trainer.export.formats.FORMATS, "onnx", wrong)
        with pytest.raises(DataError, match=r"onnx: expected the logits of the folded student, found a difference of"):
            export(run, out, ["onnx"])
        assert not out.exists()


def test_logits_that_are_no_numbers_do_not_pass() -> None:
    batches = [(torch.ones(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)) for _ in range(3)]
    calls = iter([1.0, float("nan"), 1.0])
    found = compare(lambda x: torch.ones(2, 5), {"other": lambda x: torch.full((2, 5), next(calls))}, batches)
    assert np.isnan(found["other"].difference)


def test_the_command_prints_what_it_found(
    run: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", "--run", str(run), "--out", str(out), "--formats", "timm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"out: \d+ parameters folded to \d+, largest relative difference \S+e-\d+ in float64", lines[0])
    assert re.search(r"timm: \S+model.safetensors, 0.4 MB, top-1 \S+ %, 100.00 % of 20 predicted the same", lines[1])
    assert main(["export", "--run", str(run), "--out", str(out), "--formats", "tflite"]) == 2
