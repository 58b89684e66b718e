"""Stores in a bucket: an S3 server on this machine, labeled, read, damaged, grown as on a disk."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from helpers.small_runs import label_recipe, make_inputs
from helpers.small_stores import create, files_of, fill, make_manifest, read_all
from moto.server import ThreadedMotoServer

from softshard.pipeline.__main__ import main
from softshard.pipeline.labels.label import label
from softshard.pipeline.runtime.errors import DataError, FormatError
from softshard.pipeline.store.location import Folder, place
from softshard.pipeline.store.store import open_store


@pytest.fixture(scope="module")
def bucket() -> Iterator:
    """An empty bucket named `labels`, reached through the variables that the AWS tools read."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ALLOW_HTTP": "true",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="labels")
        yield client
    server.stop()


def objects(client, prefix: str) -> dict[str, bytes]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="labels", Prefix=prefix)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {key.removeprefix(prefix): client.get_object(Bucket="labels", Key=key)["Body"].read() for key in keys}


@pytest.mark.parametrize("template", [None, 2])
def test_a_store_in_a_bucket_has_the_files_of_one_on_a_disk(bucket, tmp_path: Path, template: int | None) -> None:
    url = f"s3://labels/{template}/labels.zarr"
    manifest = make_manifest(template=template)
    fill(create(url, manifest))
    fill(create(tmp_path / "labels.zarr", manifest))
    assert objects(bucket, f"{template}/labels.zarr/") == files_of(tmp_path / "labels.zarr")
    read_all(url)
    assert open_store(url).stored_bytes() == open_store(tmp_path / "labels.zarr").stored_bytes()
    open_store(url).grow(3)
    fill(open_store(url))
    assert open_store(url).coverage().tolist() == [3, 3, 3]
    read_all(url)


def test_damage_in_a_bucket_is_found(bucket) -> None:
    url = "s3://labels/damaged/labels.zarr"
    fill(create(url, make_manifest()))
    key = "damaged/labels.zarr/tail/c/1/2"
    data = bucket.get_object(Bucket="labels", Key=key)["Body"].read()
    bucket.put_object(Bucket="labels", Key=key, Body=data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FormatError, match=rf"{url}: view 1, block 2.*delete {url}/block_digest/c/1/2"):
        open_store(url).read_view(1)
    assert main(["verify", url]) == 1
    bucket.delete_object(Bucket="labels", Key=key)
    with pytest.raises(FormatError, match="view 1, block 2"):
        open_store(url).read_view(1)


def test_a_store_is_never_created_over_another(bucket) -> None:
    url = "s3://labels/twice/labels.zarr"
    create(url, make_manifest())
    with pytest.raises(DataError, match="expected a free name"):
        create(url, make_manifest())
    assert not place(url).create({"zarr.json": b"another"})
    assert open_store(url).manifest == make_manifest()


def test_labeling_into_a_bucket_goes_on_and_ends_as_on_a_disk(bucket, tmp_path: Path, capsys) -> None:
    inputs, url = make_inputs(tmp_path), "s3://labels/stage/labels.zarr"
    assert label(label_recipe(inputs))
    assert label(label_recipe(inputs, ("store", url)), range(1))
    assert label(label_recipe(inputs, ("store", url)))
    found = objects(bucket, "stage/")
    assert found.pop("labels.recipe.yaml").startswith(b"beton: ")
    assert {name.removeprefix("labels.zarr/"): data for name, data in found.items()} == files_of(inputs / "labels.zarr")
    capsys.readouterr()
    assert main(["show", url]) == 0
    assert "views 0-2: whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://labels/none.zarr", "found nothing there"),
        ("s3://none/labels.zarr", "s3://none/labels.zarr: expected to reach it, found|found nothing there"),
        ("ftp://labels/labels.zarr", "expected a path or an address with s3:// or gs://"),
    ],
)
def test_addresses_without_a_store(bucket, url: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_store(url)


def test_unfinished_files_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    store = create(tmp_path / "labels.zarr", make_manifest())
    old = [tmp_path / ".labels.zarr.77.partial" / "key", tmp_path / "labels.zarr" / "tail" / "0.ab.partial"]
    for file in old:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"left")
    store.place.sweep(0.0)
    assert all(file.exists() for file in old)
    store.place.sweep(old[1].stat().st_mtime + 10)
    assert not any(file.exists() for file in old)
    assert not (tmp_path / ".labels.zarr.77.partial").exists()


def test_free_room_is_that_of_the_disk(tmp_path: Path) -> None:
    free = Folder(tmp_path / "not" / "there" / "labels.zarr").free_bytes()
    assert free is not None
    assert free > 0
