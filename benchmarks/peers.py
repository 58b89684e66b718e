"""How others lay out a teacher's top k on disk, written here from their public descriptions and code, to measure.

TinyViT (microsoft/Cream, TinyViT/save_logits.py and TinyViT/data/augmentation/dataset_wrapper.py, manager.py): one file
an epoch, for each key a record of an int32 seed, K int16 classes and K float16 probabilities. Its reader keeps the file
open, seeks and reads; here it is given the row, so that it has no keys to look up.

ml-dr (apple/ml-dr, reinforce.py, dr/data.py, dr/utils.py, dr/transforms.py, configs/imagenet/reinforce/randaug.yaml):
one file an image, a pickle of (id, [{"params": ..., "prob": ([K probabilities], [K classes])}, ...]) with an entry for
each view, as Python numbers. It is written with torch.save, or with joblib and zlib when `joblib` is set; the set is
published as a .tar.gz. `params` is what its transformations drew: it replays views from them, as TinyViT does from its
seed and as a store does from the view's number.
"""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# torchvision's RandAugment at its default strength: the magnitude of each operation, and which have a random sign
MAGNITUDES = np.array([0, 0.09, 0.09, 30.45, 30.45, 9, 0.27, 0.27, 0.27, 0.27, 7, 178.5, 0, 0], np.float32)
SIGNED = range(1, 10)
OPERATIONS = 2
ERASED = 0.25


def write_tinyvit(path: Path, index: NDArray[Any], probability: NDArray[Any]) -> None:
    """index and probability: [rows, K], a record a row."""
    rows, k = index.shape
    records = np.empty(rows, [("seed", "<i4"), ("index", "<i2", k), ("probability", "<f2", k)])
    records["seed"] = np.random.default_rng(0).integers(0, 2**31, rows)
    records["index"], records["probability"] = index, probability
    records.tofile(path)


def read_tinyvit(file: BinaryIO, rows: NDArray[Any], k: int) -> tuple[Tensor, Tensor]:
    """One batch: index [B, K] and probability [B, K], read and parsed row by row, then stacked."""
    size = 4 + 4 * k
    index, probability = [], []
    for row in rows.tolist():
        file.seek(size * row)
        record = file.read(size)
        index.append(np.frombuffer(record, np.int16, k, 4))
        probability.append(np.frombuffer(record, np.float16, k, 4 + 2 * k))
    return torch.from_numpy(np.stack(index)).long(), torch.from_numpy(np.stack(probability)).float()


def drawn_parameters(rng: np.random.Generator) -> list[Any]:
    """What ml-dr's random crop, flip, RandAugment and erasing keep of one view, in its compressed form."""
    crop = tuple(rng.integers((0, 0, 96, 96), (120, 160, 375, 400)).tolist())
    operations = []
    for number in rng.integers(0, len(MAGNITUDES), OPERATIONS).tolist():
        sign = -1 if number in SIGNED and rng.random() < 0.5 else 1
        operations.append((number, sign * float(MAGNITUDES[number])))
    erased = tuple(rng.integers((0, 0, 32, 32), (160, 160, 120, 120)).tolist()) if rng.random() < ERASED else None
    return [crop, bool(rng.random() < 0.5), operations, erased]


def ml_dr_entry(number: int, index: NDArray[Any], probability: NDArray[Any]) -> tuple[int, list[dict[str, Any]]]:
    """What ml-dr keeps of image `number`; index and probability: [views, K]."""
    rng = np.random.default_rng(number)
    return number, [
        {"params": drawn_parameters(rng), "prob": (p.tolist(), i.tolist())}
        for i, p in zip(index, probability, strict=True)
    ]


def save_torch(entry: Any, path: Path) -> None:
    torch.save(entry, path, pickle_protocol=4)


def save_joblib(entry: Any, path: Path) -> None:
    joblib.dump(entry, path, compress=True)


def write_ml_dr(
    folder: Path, index: NDArray[Any], probability: NDArray[Any], save: Callable[[Any, Path], None] = save_torch
) -> None:
    """index and probability: [images, views, K], a file an image."""
    folder.mkdir()
    for number in range(len(index)):
        save(ml_dr_entry(number, index[number], probability[number]), folder / f"{number}.pth.tar")


def write_joblib_arrays(folder: Path, index: NDArray[Any], probability: NDArray[Any]) -> None:
    """The plain way with joblib: a file an image, with two arrays of all its views, [views, K] each, zlib level 3."""
    folder.mkdir()
    for number in range(len(index)):
        arrays = {"index": index[number].astype(np.int16), "probability": probability[number].astype(np.float16)}
        joblib.dump(arrays, folder / f"{number}.jb", compress=3)


def read_ml_dr(folder: Path, images: NDArray[Any], view: int) -> tuple[Tensor, Tensor]:
    """One batch: index [B, K] and probability [B, K] of one view of some images, a file each."""
    index, probability = [], []
    for number in images.tolist():
        # ml-dr's pickle protocol needs the full unpickler, which is the faster one too; the files are this script's own
        _, views = torch.load(folder / f"{number}.pth.tar", weights_only=False)
        p, i = views[view]["prob"]
        index.append(torch.tensor(i))
        probability.append(torch.tensor(p))
    return torch.stack(index), torch.stack(probability)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files, without what the file system rounds up."""
    return sum(path.stat().st_size for path in folder.iterdir())


def tar_gz_bytes(folder: Path) -> int:
    """Bytes of the folder as a .tar.gz."""
    path = folder.with_suffix(".tar.gz")
    with tarfile.open(path, "w:gz", compresslevel=6) as archive:  # gzip's own default
        archive.add(folder, folder.name)
    return path.stat().st_size


def layout_bytes(index: NDArray[Any], probability: NDArray[Any], views: int, folder: Path) -> dict[str, float]:
    """Bytes of a view in each layout, from the top k of pooled views, [rows, K], `views` of them a file."""
    rows, k = len(index) // views * views, index.shape[1]
    files = index[:rows].reshape(-1, views, k), probability[:rows].reshape(-1, views, k)
    write_tinyvit(folder / "values.bin", index, probability)
    write_ml_dr(folder / "torch", *files)
    write_ml_dr(folder / "joblib", *files, save=save_joblib)
    write_joblib_arrays(folder / "arrays", *files)
    return {
        "TinyViT": (folder / "values.bin").stat().st_size / len(index),
        "ml-dr, torch.save": folder_bytes(folder / "torch") / rows,
        "ml-dr, torch.save, as .tar.gz": tar_gz_bytes(folder / "torch") / rows,
        "ml-dr, joblib": folder_bytes(folder / "joblib") / rows,
        "joblib of two arrays": folder_bytes(folder / "arrays") / rows,
    }
