"""A store becomes shards and a store again, byte for byte; stock webdataset reads them; no damage passes in silence."""

import gc
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from helpers.small_packs import edit, pack_folder
from helpers.small_sources import pack_from, rows_of
from helpers.small_stores import assert_equal, create, files_of, fill, make_manifest, make_template
from webdataset.compat import WebDataset

from softshard.pipeline.__main__ import main
from softshard.pipeline.images.beton import Beton
from softshard.pipeline.images.manifest import StoreManifest, key_digest, text_digest
from softshard.pipeline.runtime.errors import DataError, FormatError
from softshard.pipeline.shards import writer
from softshard.pipeline.shards.convert import convert
from softshard.pipeline.shards.format import decode_sample, open_shards, write_manifest
from softshard.pipeline.show import describe
from softshard.pipeline.store.store import Store, create_store, open_store
from softshard.pipeline.store.topk import decode
from softshard.pipeline.verify import verify
from softshard.trainer.losses import topk_kl


def tars(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def stock(folder: Path) -> list[dict]:
    """All samples, as stock webdataset gives them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its tars to the garbage collector
        samples = list(WebDataset(tars(folder), shardshuffle=False))
        gc.collect()
    return samples


def matching_manifest(beton: Beton, **changes) -> StoreManifest:
    digest = text_digest(beton.manifest.classes)
    return make_manifest(samples=len(beton), block_rows=7, **changes).model_copy(update={"class_list_digest": digest})


def label_images(path: Path, beton: Beton, rows: np.ndarray | None = None) -> Store:
    """A store of a .beton's images, in another order of rows."""
    rows = np.random.default_rng(5).permutation(len(beton)) if rows is None else rows
    manifest = matching_manifest(beton, template=1).model_copy(update={"samples": len(rows)})
    store = create_store(path, manifest, beton.keys[rows], beton.crc32[rows])
    fill(store)
    return store


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a template; 10 samples in blocks of 4."""
    path = tmp_path_factory.mktemp("source") / "labels.zarr"
    fill(create(path, make_manifest(template=1)))
    return path


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    """Its shards of 3 samples each."""
    convert(str(source), str(source.parent / "shards"), None, 3)
    return source.parent / "shards"


@pytest.fixture
def shards_of_labels(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "shards"))


@pytest.fixture(scope="module")
def with_images(tmp_path_factory: pytest.TempPathFactory, photos: Beton) -> tuple[Path, Store]:
    """Shards of the photographs with their labels, and the store of these."""
    folder = tmp_path_factory.mktemp("with_images")
    store = label_images(folder / "labels.zarr", photos)
    convert(store.name, str(folder / "shards"), photos.path, 5)
    return folder / "shards", store


# There and back


@pytest.mark.parametrize(
    ("shape", "shard_samples"),
    [
        ({"samples": 1, "k": 1, "views": 1}, 1),
        ({"samples": 10, "k": 1, "views": 2, "template": 2}, 3),
        ({"samples": 9, "classes": 5, "k": 5, "views": 5}, 4),
        ({"samples": 11, "classes": 70000, "k": 3, "views": 3, "template": 3}, 100),
        ({"samples": 8, "classes": 2, "k": 2, "views": 4, "block_rows": 8}, 8),
        ({"samples": 5, "k": 2, "views": 1, "block_rows": 32, "template": 1}, 2),
    ],
)
def test_the_way_back_gives_the_same_files(tmp_path: Path, shape: dict, shard_samples: int) -> None:
    manifest = make_manifest(**shape)
    fill(create(tmp_path / "a.zarr", manifest))
    text = convert(str(tmp_path / "a.zarr"), str(tmp_path / "shards"), None, shard_samples)
    count = -(-manifest.samples // shard_samples)
    assert text.startswith(f"{tmp_path}/a.zarr -> {tmp_path}/shards: {manifest.samples} samples in {count} shards, ")
    assert text.endswith(" bytes a view")
    assert [Path(tar).name for tar in tars(tmp_path / "shards")] == [f"labels-{n:06}.tar" for n in range(count)]
    assert verify(tmp_path / "shards").problems == []
    assert "views of" in convert(str(tmp_path / "shards"), str(tmp_path / "b.zarr"), None, 1)
    assert files_of(tmp_path / "b.zarr") == files_of(tmp_path / "a.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "b.zarr", "shards"]


def test_a_store_that_grew_comes_back(tmp_path: Path) -> None:
    store = create(tmp_path / "a.zarr", make_manifest(views=1))
    fill(store)
    store.grow(3)
    fill(store)
    convert(store.name, str(tmp_path / "shards"), None, 4)
    convert(str(tmp_path / "shards"), str(tmp_path / "b.zarr"), None, 4)
    assert files_of(tmp_path / "b.zarr") == files_of(tmp_path / "a.zarr")


def test_shards_with_images_come_back(with_images: tuple[Path, Store], tmp_path: Path) -> None:
    folder, store = with_images
    assert verify(folder).problems == []
    convert(str(folder), str(tmp_path / "b.zarr"), None, 1)
    assert files_of(tmp_path / "b.zarr") == files_of(Path(store.name))


def test_the_same_labels_give_the_same_bytes(source: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()  # an empty folder is as good as none
    convert(str(source), str(tmp_path / "again"), None, 3)
    assert files_of(tmp_path / "again") == files_of(whole)


def test_what_there_is_to_show(whole: Path, with_images: tuple[Path, Store]) -> None:
    document = describe(str(whole))
    size = sum(Path(tar).stat().st_size for tar in tars(whole))
    assert (document["kind"], document["images"], document["bytes"]) == ("shards", False, size)
    assert [shard["samples"] for shard in document["shards"]] == [3, 3, 3, 1]
    assert document["manifest"]["samples"] == 10
    assert json.loads(json.dumps(document)) == document
    assert describe(str(with_images[0]))["images"] is True


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, back = str(tmp_path / "shards"), str(tmp_path / "back.zarr")
    assert main(["convert", str(source), shards, "--shard-samples", "4"]) == 0
    assert main(["convert", shards, back]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{source} -> {shards}: 10 samples in 3 shards, ")
    assert second.startswith(f"{shards} -> {back}: 2 views of 10 images, ")
    assert main(["convert", shards, back + "2", "--images", "x.beton"]) == 2
    assert "expected it with a store as the source, found shards" in capsys.readouterr().err


# Other programs


def test_stock_webdataset_reads_labels(source: Path, whole: Path) -> None:
    manifest, store = open_shards(whole).labels, open_store(source)
    samples = stock(whole)
    assert [sample["__key__"] for sample in samples] == [f"{key:016x}" for key in store.keys]
    for row, sample in enumerate(samples):
        labels = decode_sample(sample["soft.bin"], manifest)
        assert (labels.key, labels.crc32) == (store.keys[row], store.crc32[row])
        for view in range(manifest.views.count):
            assert_equal(labels.codes[np.array([view])], store.read_rows(view, np.array([row])))
        np.testing.assert_array_equal(labels.template, make_template(manifest)[row])


def test_stock_webdataset_reads_images_beside_their_labels(with_images: tuple[Path, Store], photos: Beton) -> None:
    folder, store = with_images
    manifest, images = open_shards(folder).labels, rows_of(photos)
    samples = stock(folder)
    assert len(samples) == len(images)
    for row, sample in enumerate(samples):
        labels = decode_sample(sample["soft.bin"], manifest)
        assert labels.key == store.keys[row]
        [key] = [key for key in images if key_digest(key) == labels.key]
        name, _, suffix = key.rpartition(".")
        assert sample["__key__"] == name
        assert (sample[suffix.lower()], int(sample["cls"])) == images[key]
        soft = decode(*labels.codes.tensors(), manifest.classes, 1.0)
        assert topk_kl(torch.zeros(manifest.views.count, manifest.classes), soft, 1.0, "spread").isfinite()


def test_the_example_of_the_docs_trains(with_images: tuple[Path, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/webdataset.md").read_text()
    [example] = [block for block in page.split("```") if block.startswith("python\n") and "import webdataset" in block]
    assert len([line for line in example.splitlines()[1:] if line]) <= 20
    monkeypatch.chdir(with_images[0].parent)
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of webdataset
        exec(example.removeprefix("python\n").replace("224, 224", "32, 32"), names)
        gc.collect()
    assert names["logits"].isfinite().all()


def test_shards_with_images_can_be_packed(with_images: tuple[Path, Store], photos: Beton, tmp_path: Path) -> None:
    again = pack_from("webdataset", with_images[0], tmp_path / "again.beton")
    assert rows_of(again) == rows_of(photos)
    assert np.array_equal(again.keys, with_images[1].keys)


# Damage


def damage(rng: np.random.Generator, path: Path) -> None:
    position = int(rng.integers(path.stat().st_size))
    if rng.random() < 0.3:
        path.write_bytes(path.read_bytes()[:position])
    else:
        old = path.read_bytes()[position]
        edit(path, position, bytes([old ^ int(rng.integers(1, 256))]))


@pytest.mark.parametrize("images", [False, True])
def test_no_damage_passes_in_silence(
    images: bool, whole: Path, with_images: tuple[Path, Store], tmp_path: Path
) -> None:
    original, rng = with_images[0] if images else whole, np.random.default_rng(3)
    folder = Path(shutil.copytree(original, tmp_path / "shards"))
    files = sorted(folder.iterdir())
    for number in range(50):
        path = files[number % len(files)]
        damage(rng, path)
        [problem] = verify(folder).problems
        assert problem.startswith(f"{path}: expected ")
        with pytest.raises(FormatError) as caught:
            convert(str(folder), str(tmp_path / "back.zarr"), None, 1)
        assert str(caught.value) == problem
        assert not (tmp_path / "back.zarr").exists()
        shutil.copy(original / path.name, path)
    assert verify(folder).problems == []


def test_every_damaged_tar_has_a_line(shards_of_labels: Path) -> None:
    (shards_of_labels / "labels-000001.tar").unlink()
    edit(shards_of_labels / "labels-000003.tar", 700, b"?")
    first, second = verify(shards_of_labels).problems
    assert first.startswith(f"{shards_of_labels}/labels-000001.tar: expected a file of a set of shards, found none")
    assert second.startswith(f"{shards_of_labels}/labels-000003.tar: expected a file with digest ")


def test_tars_that_changed_places_are_noticed(shards_of_labels: Path) -> None:
    first, second = (shards_of_labels / f"labels-00000{number}.tar" for number in range(2))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert len(verify(shards_of_labels).problems) == 2


def test_a_key_twice_is_noticed(shards_of_labels: Path, tmp_path: Path) -> None:
    manifest = open_shards(shards_of_labels)
    first, second, *rest = manifest.shards
    shutil.copy(shards_of_labels / first.name, shards_of_labels / second.name)
    shards = (first, second.model_copy(update={"digest": first.digest}), *rest)
    write_manifest(shards_of_labels, manifest.model_copy(update={"shards": shards}))
    [problem] = verify(shards_of_labels).problems
    assert problem.startswith(f"{shards_of_labels}: expected a different key for each sample, found ")
    with pytest.raises(FormatError, match="more than once"):
        convert(str(shards_of_labels), str(tmp_path / "back.zarr"), None, 1)
    assert not (tmp_path / "back.zarr").exists()


def test_a_damaged_block_of_the_store_stops_it(source: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(source, tmp_path / "labels.zarr"))
    edit(path / "tail/c/1/2", 17, b"??")
    with pytest.raises(FormatError, match="view 1, block 2: tail: expected intact chunks"):
        convert(str(path), str(tmp_path / "shards"), None, 3)
    assert list(tmp_path.iterdir()) == [path]


# What does not fit together


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (["block_digest/c/1/2"], r"expected all 2 views labeled, found view 1 with 2 of 3 blocks; finish labeling"),
        (["block_digest/c/0/0", "block_digest/c/1/2"], "found view 0 with 2 of 3 blocks, view 1 with 2 of 3 blocks;"),
        (["template_digest/c/1"], "expected the tail template of all 3 blocks, found 2; finish labeling first"),
    ],
)
def test_a_store_that_is_not_complete_is_refused(source: Path, tmp_path: Path, remove: list[str], message: str) -> None:
    path = Path(shutil.copytree(source, tmp_path / "labels.zarr"))
    for name in remove:
        (path / name).unlink()
    with pytest.raises(DataError, match=message):
        convert(str(path), str(tmp_path / "shards"), None, 3)
    assert list(tmp_path.iterdir()) == [path]


def test_a_target_in_use_is_kept(source: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("kept")
    for target in (tmp_path, tmp_path / "note"):
        with pytest.raises(DataError, match="expected a new or empty folder for shards, found one in use"):
            convert(str(source), str(target), None, 3)
    for target in ("s3://bucket/shards", "gs://bucket/shards"):
        with pytest.raises(DataError, match="expected a folder for shards, found an address"):
            convert(str(source), target, None, 3)
    with pytest.raises(DataError, match="--shard-samples: expected at least 1, found 0"):
        convert(str(source), str(tmp_path / "shards"), None, 0)
    with pytest.raises(FormatError, match="found a file"):
        convert(str(whole), str(tmp_path / "note"), None, 3)
    assert files_of(tmp_path) == {"note": b"kept"}


def test_another_store_at_the_target_is_kept(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.zarr"
    create(path, make_manifest())  # without a template
    other = create_store(
        tmp_path / "other.zarr", make_manifest(template=1), np.arange(10, dtype=np.uint64), np.zeros(10, np.uint32)
    )
    for target in (path, Path(other.name)):
        before = files_of(target)
        with pytest.raises(DataError, match="expected a free name for a new store, or one that these shards were"):
            convert(str(whole), str(target), None, 3)
        assert files_of(target) == before


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, samples) -> None:
        path.write_bytes(b"".join(next(iter(samples)).values()))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_shard", refuse)
    with pytest.raises(DataError, match="expected to write shards, found: No space left on device; make room"):
        convert(str(source), str(tmp_path / "a" / "shards"), None, 3)
    assert list((tmp_path / "a").iterdir()) == []


def test_an_interrupted_conversion_goes_on(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, write = tmp_path / "back.zarr", Store.write_block

    def write_or_stop(self: Store, *args) -> None:
        if self.coverage().sum() == stop_at:
            raise KeyboardInterrupt
        write(self, *args)

    for stop_at in (0, 3, 5):
        with monkeypatch.context() as patch:
            patch.setattr(Store, "write_block", write_or_stop)
            with pytest.raises(KeyboardInterrupt):
                convert(str(whole), str(target), None, 3)
        assert open_store(target).coverage().sum() == stop_at
    for _ in range(2):
        convert(str(whole), str(target), None, 3)
        assert files_of(target) == files_of(source)


# Images


def test_other_images_are_refused(
    photos: Beton, digits: Beton, with_images: tuple[Path, Store], tmp_path: Path
) -> None:
    subset = label_images(tmp_path / "subset.zarr", photos, np.arange(20))
    cases: list[tuple[str, Beton, str]] = [
        (subset.name, photos, "found 0 missing, 2 without labels, 0 with other content; give the .beton it was made"),
        (with_images[1].name, digits, "expected the class list of .*, found another"),
    ]
    for store, beton, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            convert(store, str(tmp_path / "shards"), beton.path, 5)
        assert str(caught.value).startswith(str(beton.path))
    assert not (tmp_path / "shards").exists()


def test_changed_images_are_counted(root: Path, tmp_path: Path) -> None:
    beton = pack_folder(root)[1]
    store = label_images(tmp_path / "labels.zarr", beton)
    (root / "a" / "0.jpg").write_bytes((root / "b" / "1.jpg").read_bytes())
    (root / "b" / "1.jpg").rename(root / "b" / "2.jpg")
    changed = pack_folder(root)[1]
    with pytest.raises(DataError, match="found 1 missing, 1 without labels, 1 with other content"):
        convert(store.name, str(tmp_path / "shards"), changed.path, 5)


def test_a_damaged_image_stops_it(root: Path, tmp_path: Path) -> None:
    beton = pack_folder(root)[1]
    store = label_images(tmp_path / "labels.zarr", beton)
    edit(beton.path, int(beton.offsets[1]) + 100, b"?!")
    with pytest.raises(FormatError, match=r"a/1.jpg: expected CRC-32 \w{8}, found \w{8}; copy the file again"):
        convert(store.name, str(tmp_path / "shards"), beton.path, 5)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("rename", "few"),
    [
        ([("0.jpg", "v1.0.jpg")], "'a/v1.0.jpg';"),
        ([("0.jpg", ".0.jpg"), ("1.jpg", "1.a.jpg")], "'a/.0.jpg', 'a/1.a.jpg';"),
        ([("0.jpg", "1.jpeg")], "'a/1.jpeg', 'a/1.jpg';"),
        ([("0.jpg", "new\nline/0.jpg")], r"'a/new\\nline/0.jpg';"),
        ([("0.jpg", f"{n}.1.jpg") for n in range(5)], r"'a/0.1.jpg', 'a/1.1.jpg', 'a/2.1.jpg' and 2 more;"),
    ],
)
def test_keys_that_webdataset_would_split_elsewhere(
    root: Path, tmp_path: Path, rename: list[tuple[str, str]], few: str
) -> None:
    for old, new in rename:
        (root / "a" / new).parent.mkdir(exist_ok=True)
        shutil.copy(root / "a" / old, root / "a" / new)
    for old in {old for old, _ in rename}:
        (root / "a" / old).unlink()
    beton = pack_folder(root)[1]
    store = label_images(tmp_path / "labels.zarr", beton)
    with pytest.raises(DataError, match=f"found {few.replace('.', '[.]')} rename and pack again, or convert without"):
        convert(store.name, str(tmp_path / "shards"), beton.path, 5)
    convert(store.name, str(tmp_path / "shards"), None, 5)


def test_long_and_foreign_names_come_through(root: Path, tmp_path: Path) -> None:
    folder = root / "b" / "v1.0" / ("long" * 40) / "été"
    folder.mkdir(parents=True)
    (root / "b" / "1.jpg").rename(folder / ("名" * 60 + ".JPEG"))
    beton = pack_folder(root)[1]
    store = label_images(tmp_path / "labels.zarr", beton)
    convert(store.name, str(tmp_path / "shards"), beton.path, 3)
    keys = {sample["__key__"] for sample in stock(tmp_path / "shards")}
    assert keys == {key.rpartition(".")[0] for key in beton.manifest.keys}
    assert rows_of(pack_from("webdataset", tmp_path / "shards", tmp_path / "again.beton")) == rows_of(beton)
    convert(str(tmp_path / "shards"), str(tmp_path / "back.zarr"), None, 3)
    assert files_of(tmp_path / "back.zarr") == files_of(Path(store.name))
