"""What the student's checks find out: costs by side, each side for itself."""

import math
import traceback
from collections.abc import Callable
from typing import Any

from gpu_stages.stage import Outcome, Setting
from gpu_stages.student.sides import Training, layers_by_form, size_of, wrong_layers
from gpu_stages.timing import OUT_OF_MEMORY, Step, cost, give_back, is_out_of_memory

Figures = dict[str, Any]
Sides = dict[str, Figures]


def begin(model: str, images: int, layout: str, mode: str, setting: Setting) -> Outcome:
    head = {"model": model, "batch": images, "pixels": size_of(setting).pixels, "layout": layout, "mode": mode}
    return Outcome(head)


def attempt(outcome: Outcome, sides: Sides, name: str, side: Callable[[], Figures], setting: Setting) -> None:
    """Add a side's figures. What goes wrong with it is a problem of this side alone; too little memory is none."""
    try:
        sides[name] = side()
    except Exception as error:
        if is_out_of_memory(error):
            sides[name] = dict(OUT_OF_MEMORY)
        else:
            traceback.print_exc()
            outcome.problems.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    give_back(setting.device)


def layers_of(outcome: Outcome, training: Training, form: str, setting: Setting) -> Figures:
    """The forms that the layers really train in. It is a problem when the side is not what it is called."""
    layers = layers_by_form(training)
    wrong = wrong_layers(form, layers, setting.device == "cuda")
    outcome.expect(not wrong, wrong)
    return {"layers": layers}


def measure(outcome: Outcome, name: str, step: Step, images: int, setting: Setting) -> Figures:
    """The cost of a step of training, with its loss before and after all of them, which must be finite."""
    first = float(step())
    found = cost_of(step, images, setting)
    last = float(step())
    finite = math.isfinite(first) and math.isfinite(last)
    outcome.expect(finite, f"{name}: expected finite losses, found {first} at first and {last} at last")
    return found | {"losses": [first, last] if finite else None}


def cost_of(step: Step, images: int, setting: Setting) -> Figures:
    size = size_of(setting)
    found = cost(step, setting.device, size.rounds, size.warmup)
    return found._asdict() | {"images_per_s": 1000 * images / found.ms}


def relate(sides: Sides, first: str) -> None:
    """`times`: how long each side takes, relative to the first."""
    unit = sides.get(first, {}).get("ms")
    for side in sides.values():
        if unit and "ms" in side:
            side["times"] = side["ms"] / unit
