"""The store of soft labels: exactness, size, loading and random access, against other layouts in the same run.

The exactness and the sizes are those of a teacher's logits: `--logits PATH.npz` with the key `logits`, float16
[images, views, classes]; without it synthetic ones stand in, whose figures say little about a teacher. The store of
the speed part has `--samples` rows, drawn from the codes of these logits. Sides take turns; the tables show medians of
the rounds, for wall time and for process CPU time, and medians of the rounds' ratios. One thread computes; zarr decodes
chunks in threads of its own. Everything read is in the system's cache. peers.py says where the peers' layouts come
from. `--json PATH` writes the figures.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import peers
import torch
from numpy.typing import NDArray
from torch import Tensor

from softshard.pipeline.images.manifest import StoreManifest
from softshard.pipeline.recipes.recipe import TemplateRecipe, ViewRecipe
from softshard.pipeline.store.store import create_store, open_store
from softshard.pipeline.store.topk import Codes, SoftLabels, decode, encode, encode_template
from softshard.pipeline.store.unit import code_arrays
from softshard.pipeline.store.zarr_group import compressed_bytes

OURS = "softshard"
K, BLOCK_ROWS, BATCH = 10, 32768, 1024
TEMPLATE_VIEWS = 8  # the first ones make the template, the others score it
PEER_VIEWS = 50  # in a file of ml-dr's, whose configuration makes so many
PEER_FILES = 2048
TEMPLATE_ROWS = 65536  # more than any cache holds
TEMPERATURE = 2.0
Lookup = Callable[[NDArray[np.int64]], tuple[Tensor, ...]]  # classes and their probabilities of some rows


class Side(NamedTuple):
    """`batches` of BATCH rows below `rows` are looked up in a round."""

    lookup: Lookup
    rows: int
    batches: int


def synthetic_logits() -> Tensor:
    """Images with a few classes that stand out and views that wander, about as unsure as a teacher out of domain."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(256, 1, 1000, generator=generator)
    images += 6.5 * torch.rand(images.shape, generator=generator).pow(200)
    views = 0.5 * torch.randn(256, 16, 1000, generator=generator)
    return ((images + views) * 1.25).half().float()


def manifest(samples: int, classes: int, k: int, block_rows: int, template: bool = False) -> StoreManifest:
    return StoreManifest(
        samples=samples,
        classes=classes,
        top_k=k,
        block_rows=block_rows,
        batch_size=BATCH,
        class_list_digest="",
        views=ViewRecipe(seed=0, count=1),
        teachers=(),
        ensemble="probabilities",
        flip_average=False,
        template=TemplateRecipe(views=TEMPLATE_VIEWS) if template else None,
        precision="float32",
        channels_last=False,
        compile=False,
        probes=(),
        libraries={},
    )


def bytes_per_view(codes: Codes, classes: int) -> float:
    """Compressed as one block of one view."""
    rows, k = codes.index.shape
    arrays = {name: values[None] for name, values in code_arrays(codes).items()}
    return sum(compressed_bytes(manifest(rows, classes, k, rows), arrays).values()) / rows


def template_bytes(template: NDArray[np.uint8]) -> float:
    """Of an image, compressed as one block."""
    rows, classes = template.shape
    shape = manifest(rows, classes, K, rows, template=True)
    return compressed_bytes(shape, {"tail_template": template})["tail_template"] / rows


def dense(labels: SoftLabels, classes: int) -> Tensor:
    """The whole distribution, [B, C]."""
    rows, k = labels.index.shape
    share = (
        torch.full((rows, classes), 1 / (classes - k)) if labels.tail_distribution is None else labels.tail_distribution
    )
    return (labels.tail[:, None] * share).scatter(1, labels.index, labels.probability)


def divergence(logits: Tensor, labels: SoftLabels, temperature: float) -> float:
    """KL(teacher || labels) in nats, the mean over the rows."""
    log_p = torch.log_softmax(logits.double() / temperature, dim=1)
    log_q = dense(labels, logits.shape[1]).double().clamp_min(torch.finfo(torch.float32).tiny).log()
    return float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean())


def measure_codes(logits: Tensor) -> list[dict[str, Any]]:
    """For each k the bytes of a view and KL at temperature 1, 2, 4, on a uniform tail and on the template; logits
    [images, views, C]."""
    classes, order = logits.shape[2], torch.Generator().manual_seed(0)
    template = encode_template(logits[:, :TEMPLATE_VIEWS])
    scored = logits[:, TEMPLATE_VIEWS:]
    templates = template[:, None].expand(-1, scored.shape[1], -1).flatten(0, 1)
    scored, pooled = scored.flatten(0, 1), logits.flatten(0, 1)
    pooled = pooled[torch.randperm(len(pooled), generator=order)]
    results = []
    for k in (3, 5, 10, 20):
        parts = encode(scored, k).tensors()
        result: dict[str, Any] = {"k": k, "bytes": bytes_per_view(encode(pooled, k), classes)}
        for name, shape in (("uniform", None), ("template", templates)):
            result[name] = [divergence(scored, decode(*parts, classes, t, shape), t) for t in (1.0, 2.0, 4.0)]
        results.append(result)
        kl = [" / ".join(f"{value:.3f}" for value in result[name]) for name in ("uniform", "template")]
        print(f"{k:3}{result['bytes']:9.1f}    {kl[0]:26}{kl[1]}", flush=True)
    return results


def make_store(path: Path, codes: Codes, classes: int) -> None:
    samples = len(codes)
    keys = np.random.default_rng(0).integers(0, 2**64, samples, np.uint64)
    store = create_store(path, manifest(samples, classes, K, BLOCK_ROWS), keys, np.zeros(samples, np.uint32))
    for block in range(store.blocks):
        store.write_block(0, block, codes[store.rows(block)])


def peak_memory(path: Path) -> int:
    """Bytes by which reading a view makes this process grow at most."""

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split(f"{field}:")[1].split()[0])

    store = open_store(path)
    store.read_block(0, 0)  # the libraries are loaded, their threads started
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    codes = store.read_view(0)
    assert len(codes) == store.manifest.samples
    return resident("VmHWM") - before


def clocked(work: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_load(path: Path, rounds: int) -> tuple[Codes, dict[str, float]]:
    store = open_store(path)
    codes = store.read_view(0)
    decoded = codes.index.nbytes + codes.gap.nbytes + codes.tail.nbytes
    times = [clocked(lambda: store.read_view(0)) for _ in range(rounds)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        peak = pool.submit(peak_memory, path).result()
    wall, cpu = (statistics.median(values) for values in zip(*times, strict=True))
    return codes, {"wall": wall, "cpu": cpu, "decoded bytes": decoded, "peak bytes": peak, "peak ratio": peak / decoded}


def make_sides(codes: Codes, template: NDArray[np.uint8], values: BinaryIO, images: Path) -> dict[str, Side]:
    """{name: side}; `values` is TinyViT's file, `images` ml-dr's folder. All give tensors of the classes, int64, and
    of their probabilities."""
    classes, samples = template.shape[1], len(codes)
    templates = np.resize(template, (min(TEMPLATE_ROWS, samples), classes))

    def plain(rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        return decode(*codes[rows].tensors(), classes, TEMPERATURE)[:3]

    def with_template(rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        shapes = torch.from_numpy(templates[rows % len(templates)])
        return decode(*codes[rows].tensors(), classes, TEMPERATURE, shapes)[:3]

    return {
        OURS: Side(plain, samples, 200),
        f"{OURS}, template": Side(with_template, samples, 10),
        "TinyViT": Side(lambda rows: peers.read_tinyvit(values, rows, K), samples, 20),
        "ml-dr": Side(lambda rows: peers.read_ml_dr(images, rows, 0), min(PEER_FILES, samples), 1),
    }


def measure_lookups(sides: dict[str, Side], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds a row of each round, by side; rows at random. All sides hold the same classes for a row."""
    everywhere = np.arange(min(side.rows for side in sides.values()))
    found = [side.lookup(everywhere)[0] for side in sides.values()]
    assert all(torch.equal(index, found[0]) for index in found)
    rng = np.random.default_rng(0)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (lookup, limit, count) in sides.items():
            batches = list(rng.integers(0, limit, (count, BATCH)))
            wall, cpu = clocked(lambda lookup=lookup, batches=batches: [len(lookup(rows)) for rows in batches])
            times[name].append((wall / (count * BATCH), cpu / (count * BATCH)))
    return times


def report_layouts(layouts: dict[str, float]) -> None:
    goals = {"TinyViT": 2.4, "ml-dr, torch.save": 5.0, "ml-dr, joblib": 5.0}
    print(f"\nbytes a view at k = {K}, {PEER_VIEWS} views a file     bytes   times ours    goal")
    for name, value in layouts.items():
        print(f"{name:40}{value:10.1f}{value / layouts[OURS]:13.2f}{goals.get(name, ''):>8}", flush=True)


def report_load(load: dict[str, float], samples: int) -> None:
    print(f"\nload a view of {samples} samples, digests checked      measured    goal")
    goals = {"cpu": ("CPU-seconds", 1), "wall": ("seconds", ""), "peak ratio": ("peak memory / codes in memory", 2)}
    for name, (what, goal) in goals.items():
        print(f"{what:40}{load[name]:16.2f}{goal:>8}", flush=True)


def report_lookups(times: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Samples a second, and how many times the peers' time is ours without a template."""
    goals = {OURS: "300,000/s", "TinyViT": "5x", "ml-dr": "1000x"}
    print(f"\nrandom batches of {BATCH}     samples/s: wall       CPU   times ours: wall     CPU        goal")
    results = {}
    for name, rounds in times.items():
        result = {}
        for number, clock in enumerate(("wall", "cpu")):
            result[f"samples/s ({clock})"] = 1 / statistics.median(value[number] for value in rounds)
            pairs = zip(rounds, times[OURS], strict=True)
            result[f"times ours ({clock})"] = statistics.median(value[number] / ours[number] for value, ours in pairs)
        speed, ratio, cpu_speed, cpu_ratio = result.values()
        print(f"{name:26}{speed:16,.0f}{cpu_speed:10,.0f}{ratio:19.2f}{cpu_ratio:8.2f}{goals.get(name, ''):>12}")
        results[name] = result
    return results


def measure_speed(
    pool: Codes, probability: NDArray[Any], template: NDArray[np.uint8], samples: int, rounds: int
) -> dict[str, Any]:
    """Loading and random access in stores of `samples` rows, which are drawn from the codes of the pool."""
    chosen = np.random.default_rng(0).integers(0, len(pool), samples)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_store(folder / "labels.zarr", pool[chosen], template.shape[1])
        codes, load = measure_load(folder / "labels.zarr", rounds)
        report_load(load, samples)
        probability = probability[chosen]
        peers.write_tinyvit(folder / "values.bin", codes.index, probability)
        places = np.arange(PEER_FILES * PEER_VIEWS).reshape(-1, PEER_FILES).T % samples  # view 0 of image n is row n
        peers.write_ml_dr(folder / "images", codes.index[places], probability[places])
        with open(folder / "values.bin", "rb") as values:
            sides = make_sides(codes, template, values, folder / "images")
            times = measure_lookups(sides, rounds)
    share = load["wall"] / samples, load["cpu"] / samples
    times[f"{OURS}, with the load"] = [(wall + share[0], cpu + share[1]) for wall, cpu in times[OURS]]
    return {"load": load, "lookups": report_lookups(times)}


def measure_sizes(logits: Tensor, pool: Codes, probability: NDArray[Any]) -> dict[str, Any]:
    template = template_bytes(encode_template(logits[:, :TEMPLATE_VIEWS]).numpy())
    print(f"template: {template:.0f} bytes an image\n")
    print("  k  bytes/view  KL at 1 / 2 / 4: uniform  template")
    codes = measure_codes(logits)
    [ours] = [result["bytes"] for result in codes if result["k"] == K]
    with tempfile.TemporaryDirectory() as folder:
        layouts = {OURS: ours} | peers.layout_bytes(pool.index, probability, PEER_VIEWS, Path(folder))
    report_layouts(layouts)
    return {"template bytes": template, "codes": codes, "layouts": layouts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logits", type=Path)
    parser.add_argument("--samples", type=int, default=1281167)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logits = torch.from_numpy(np.load(options.logits)["logits"]).float() if options.logits else synthetic_logits()
    source = str(options.logits) if options.logits else "SYNTHETIC logits, no teacher's"
    confidence = float(torch.softmax(logits, 2).amax(2).mean())
    print(f"{source}: {tuple(logits.shape)}, mean confidence {confidence:.2f}")
    pool = encode(logits.flatten(0, 1), K)
    probability = torch.softmax(logits.flatten(0, 1), 1).gather(1, pool.tensors()[0]).numpy()
    template = encode_template(logits[:, :TEMPLATE_VIEWS]).numpy()
    results = {"logits": source, "confidence": confidence} | measure_sizes(logits, pool, probability)
    results |= measure_speed(pool, probability, template, options.samples, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
