"""Where a step's time goes on the device while the loader feeds it: kernels, copies, both at once, nothing."""

import json
import re
from itertools import islice
from typing import Any

from torch.profiler import ProfilerActivity, profile

from gpu_stages.pipeline.feeding import Feed, Step, make_step, packed_images, scale_of
from gpu_stages.pipeline.overlap import Interval, covered, overlap
from gpu_stages.stage import Outcome, Setting
from gpu_stages.timing import synchronize

TO_DEVICE = re.compile(r"Memcpy HtoD \((\w+) -> Device\)")  # Pinned or Pageable
Event = dict[str, Any]  # of torch's trace: cat, name, ts and dur in microseconds, args


def copies(setting: Setting) -> Outcome:
    """Trace a student's training, in the plain form whose steps are the shortest."""
    scale, (beton, what) = scale_of(setting), packed_images(setting)
    name, branches = next(iter(scale.students.items()))
    step = make_step(setting, name, branches, scale.size)
    events = trace(setting, Feed(beton, scale, setting.device), step, scale.warm, scale.checked)
    outcome = Outcome({"student": name, "images": what, "batch": scale.batch} | device_figures(events, scale.checked))
    if setting.device == "cuda":
        _expect_pinned(outcome, events, scale.batch * 3 * scale.size**2, scale.checked)
    return outcome


def _expect_pinned(outcome: Outcome, events: list[Event], batch_bytes: int, steps: int) -> None:
    """From memory that is not pinned no copy is one that nobody waits for."""
    outcome.expect(any(event.get("cat") == "kernel" for event in events), "the profiler has seen no kernels")
    sources = [_source(event) for event in _copies(events) if event["args"].get("bytes") == batch_bytes]
    expected = ["Pinned"] * steps
    outcome.expect(sources == expected, f"expected {steps} copies of images from pinned memory, found {sources}")


def trace(setting: Setting, feed: Feed, step: Step, warm: int, steps: int) -> list[Event]:
    """What happened in `steps` steps, after some that are not looked at."""
    activity = ProfilerActivity.CUDA if setting.device == "cuda" else ProfilerActivity.CPU
    batches, path = feed.batches(warm + steps), setting.folder / "trace.json"
    for batch in islice(batches, warm):
        step(batch)
    synchronize(setting.device)
    with profile(activities=[activity]) as profiler:
        for batch in batches:
            step(batch)
        synchronize(setting.device)
    profiler.export_chrome_trace(str(path))
    return json.loads(path.read_text())["traceEvents"]


def device_figures(events: list[Event], steps: int) -> dict[str, Any]:
    """Of everything on the device between its first and its last event. Shares are of that time, but `overlapped`,
    which is that part of the time of copies to the device in which kernels run, too."""
    busy = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not busy:
        return {"steps": steps, "events": 0}
    kernels = [event for event in busy if event["cat"] == "kernel"]
    to_device = _copies(busy)
    spans, copying = _spans(busy), _spans(to_device)
    total = max(end for _, end in spans) - min(start for start, _ in spans)
    return {
        "steps": steps,
        "events": len(busy),
        "ms_per_step": round(total / 1000 / steps, 3),
        "idle": 1 - covered(spans) / total,
        "kernels": covered(_spans(kernels)) / total,
        "copies": covered(copying) / total,
        "overlapped": overlap(copying, _spans(kernels)) / covered(copying) if copying else None,
        "streams_of_kernels": _streams(kernels),
        "streams_of_copies": _streams(to_device),
        "from_memory": {kind: _sums(to_device, kind) for kind in sorted({_source(event) for event in to_device})},
    }


def _copies(events: list[Event]) -> list[Event]:
    return [event for event in events if event.get("cat") == "gpu_memcpy" and TO_DEVICE.search(event["name"])]


def _source(event: Event) -> str:
    found = TO_DEVICE.search(event["name"])
    assert found
    return found[1]


def _sums(events: list[Event], kind: str) -> dict[str, Any]:
    chosen = [event for event in events if _source(event) == kind]
    ms = sum(event["dur"] for event in chosen) / 1000
    return {"count": len(chosen), "bytes": sum(event["args"].get("bytes", 0) for event in chosen), "ms": round(ms, 3)}


def _spans(events: list[Event]) -> list[Interval]:
    return [(event["ts"], event["ts"] + event["dur"]) for event in events]


def _streams(events: list[Event]) -> list[int]:
    return sorted({event["args"]["stream"] for event in events})
