"""A store that was written once must read for ever, the same by this package, by xarray and by plain zarr."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
import zarr

from softshard.pipeline.shards.format import open_shards, read_shard
from softshard.pipeline.store.store import open_store
from softshard.pipeline.store.topk import decode
from softshard.pipeline.verify import verify

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "labels.json").read_text())


def test_the_golden_store_reads_as_it_was_written() -> None:
    store = open_store(GOLDEN / "labels.zarr")
    assert [f"{key:016x}" for key in store.keys] == EXPECTED["keys"]
    assert store.crc32.tolist() == EXPECTED["crc32"]
    assert store.read_template().tolist() == EXPECTED["template"]
    for view, expected in enumerate(EXPECTED["views"]):
        codes = store.read_view(view)
        assert {name: getattr(codes, name).tolist() for name in ("index", "gap", "tail")} == expected
    report = verify(GOLDEN / "labels.zarr")
    assert (report.problems, report.checked) == ([], "4 of 4 blocks labeled, 2 of 2 templates")


@pytest.mark.parametrize("name", ["uniform", "along"])
def test_the_golden_labels_decode_as_they_did(name: str) -> None:
    store = open_store(GOLDEN / "labels.zarr")
    template = torch.from_numpy(store.read_template()) if name == "along" else None
    soft = decode(*store.read_view(1).tensors(), store.manifest.classes, 2.0, template)
    found = torch.cat([soft.probability, soft.tail[:, None]], dim=1)
    torch.testing.assert_close(found, torch.tensor(EXPECTED[name]), rtol=1e-5, atol=1e-7)


def test_the_golden_shards_hold_the_same_labels() -> None:
    manifest, row = open_shards(GOLDEN / "shards"), 0
    for shard in manifest.shards:
        for sample in read_shard(GOLDEN / "shards", shard, manifest):
            assert (f"{sample.key:016x}", sample.crc32) == (EXPECTED["keys"][row], EXPECTED["crc32"][row])
            assert sample.template is not None
            assert sample.template.tolist() == EXPECTED["template"][row]
            assert sample.codes.index.tolist() == [view["index"][row] for view in EXPECTED["views"]]
            assert sample.codes.gap.tolist() == [view["gap"][row] for view in EXPECTED["views"]]
            assert sample.codes.tail.tolist() == [view["tail"][row] for view in EXPECTED["views"]]
            row += 1
    assert row == 6


def test_other_programs_read_the_golden_store() -> None:
    with xarray.open_zarr(GOLDEN / "labels.zarr", consolidated=False) as dataset:
        assert dict(dataset.sizes) == {"view": 2, "sample": 6, "rank": 3, "step": 2, "block": 2, "class": 8}
        assert dataset.isel(view=1).topk_index.values.tolist() == EXPECTED["views"][1]["index"]
    plain = zarr.open_group(GOLDEN / "labels.zarr", mode="r")["topk_gap"]
    assert isinstance(plain, zarr.Array)
    assert np.asarray(plain[0]).tolist() == EXPECTED["views"][0]["gap"]
