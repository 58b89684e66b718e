"""What does a step of a student cost: in every form, against timm's own step and against a teacher that runs along?

A check's figures name its model, batch, pixels, layout and mode, and have costs (timing.Cost) by side. Sides are the
forms of sides.py, or what a module of a mode says; one that the device's memory does not suffice for has `why`
in place of a cost. What goes wrong with one side leaves the others. The forms in Triton have checks of their own: these
need more packages, and nobody knows yet what they do to a device.
"""

from collections.abc import Callable, Iterable, Sequence

from gpu_stages.stage import COMPILER, Check, Outcome, Setting
from gpu_stages.student.figures import Figures, Sides, attempt, begin, layers_of, measure, relate
from gpu_stages.student.modes import compiled, graphs
from gpu_stages.student.online import online
from gpu_stages.student.sides import make_training, size_of

MODELS, TINY_MODELS = ("mobilenetv2_100", "ghostnetv3_100"), ("test_efficientnet",)
FORMS, TRITON = ("plain", "separate", "closed"), ("plain", "triton")
ONLINE_FORMS, ONLINE_TRITON = ("plain", "closed"), ("triton",)
# In the order of their worth: compiled, every depthwise layer in Triton breaks a graph in two.
COMPILED, CAPTURED = ("plain", "closed", "separate", "triton"), ("plain", "closed", "triton", "separate")
CHANNELS_LAST, NCHW = "channels_last", "NCHW"
NEEDS_TRITON = ("triton", COMPILER)
SECONDS, SECONDS_WITH_COMPILING = 180.0, 300.0


def checks(setting: Setting) -> list[Check]:
    usual, large = size_of(setting).batches
    # As small as possible, what one check ran through others leave out.
    models, captured = (TINY_MODELS, CAPTURED[:2]) if setting.tiny else (MODELS, CAPTURED)
    forms = (FORMS[-1:], ()) if setting.tiny else (FORMS, TRITON)
    online_forms = (ONLINE_FORMS[-1:], ()) if setting.tiny else (ONLINE_FORMS, ONLINE_TRITON)
    return [
        *_by_form(models, f"eager {usual}", eager, (FORMS, TRITON), usual, CHANNELS_LAST),
        *_by_form(models, f"online {usual}", online, online_forms, usual, needs=("timm.task",)),
        *_by_form(models, f"eager {large}", eager, forms, large, CHANNELS_LAST),
        *(_captured(model, form, usual) for form in captured for model in models),
        *_by_form(models, f"NCHW {usual}", eager, forms, usual, NCHW),
        *_compiled(models, COMPILED[:2] if setting.tiny else COMPILED, usual, setting),  # last: each takes minutes
    ]


def _by_form(
    models: Sequence[str],
    name: str,
    run: Callable[..., Outcome],
    forms: tuple[Sequence[str], Sequence[str]],
    *arguments: object,
    needs: tuple[str, ...] = (),
) -> Iterable[Check]:
    """A check of each model with the first forms, then those with the second, which need Triton, if there are any."""
    without, with_triton = forms
    for model in models:
        yield Check(f"{model} {name}", _told(run, model, without, *arguments), needs, SECONDS)
    for model in models if with_triton else ():
        told = _told(run, model, with_triton, *arguments)
        yield Check(f"{model} {name} triton", told, (*needs, *NEEDS_TRITON), SECONDS_WITH_COMPILING)


def _compiled(models: Sequence[str], forms: Sequence[str], images: int, setting: Setting) -> Iterable[Check]:
    """On a CPU without inductor, which takes minutes there."""
    on_gpu = setting.device == "cuda"
    for form in forms:
        for model in models:
            told = _told(compiled, model, form, images, "inductor" if on_gpu else "eager")
            needs = NEEDS_TRITON if on_gpu else ()
            yield Check(f"{model} compiled {images} {form}", told, needs, SECONDS_WITH_COMPILING)


def _captured(model: str, form: str, images: int) -> Check:
    told, needs = _told(graphs, model, form, images), NEEDS_TRITON if form == "triton" else ()
    return Check(f"{model} graphs {images} {form}", told, needs, SECONDS_WITH_COMPILING if needs else SECONDS)


def _told(run: Callable[..., Outcome], *arguments: object) -> Callable[[Setting], Outcome]:
    return lambda setting: run(*arguments, setting)


def eager(model: str, forms: Sequence[str], images: int, layout: str, setting: Setting) -> Outcome:
    """Operation by operation, in each form; `times` is relative to the plain model."""
    outcome, sides = begin(model, images, layout, "eager", setting), Sides()

    def side(form: str) -> Figures:
        training = make_training(model, form, images, setting, layout == CHANNELS_LAST)
        found = layers_of(outcome, training, form, setting)
        return found | measure(outcome, form, training.step, images, setting)

    for form in forms:
        attempt(outcome, sides, form, lambda form=form: side(form), setting)
    relate(sides, "plain")
    outcome.figures["sides"] = sides
    return outcome
