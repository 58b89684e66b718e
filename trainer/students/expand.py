"""Expand: give the plain convolutions of a student parallel branches for the time of its training."""

from collections import Counter
from collections.abc import Collection

from torch import Tensor, nn

from pipeline.errors import RecipeError
from trainer.students.branches import MultiBranchConv, has_identity, has_scale
from trainer.students.trace import Kind, Pair, find_pairs

KINDS: tuple[Kind, ...] = ("depthwise", "pointwise")


def expand(
    model: nn.Module,
    example_input: Tensor,
    *,
    branches: int = 3,
    kinds: Collection[str] = KINDS,
    scale: bool = True,
    identity: bool = True,
) -> nn.Module:
    """Replace the convolution -> batch norm pairs of the given kinds by sums of branches; return the same model.

    Each of these convolutions gets `branches` parallel copies of its shape, with `scale` a 1 x 1 branch (where its
    kernel is larger), with `identity` an identity branch (where input and output agree), each with its
    own batch norm (RepVGG, arXiv 2101.03697; MobileOne, 2206.04040; the recipe of GhostNetV3, 2404.11202).
    A pair that would get no second branch stays as it is. Branch 0 keeps what the pair has learnt, the others start
    with gamma 0: right after expand the model computes exactly what it computed before, in both modes.
    The weights of the new branches come from torch's global random generator.

    `example_input` is one batch that the model takes, on its device and in its dtype (float [1, 3, H, W] for
    classifiers of images); see find_pairs for what is found with it. Expand before the model is wrapped (DDP),
    compiled or converted to SyncBatchNorm, and before its optimizer is made. Hooks on replaced modules no longer run.

    Raises RecipeError, with the model unchanged, when branches is below 1, a kind is unknown, the model rejects
    `example_input`, or there is nothing to expand.
    """
    _check_arguments(branches, kinds)
    pairs = _pairs_of(model, example_input)
    chosen = [pair for pair in pairs if pair.kind in kinds and _gains(model, pair, branches, scale, identity)]
    if not chosen:
        raise RecipeError(_nothing_to_expand(model, pairs, branches, kinds, scale, identity))
    for pair in chosen:
        _expand_pair(model, pair, branches, scale, identity)
    return model


def _check_arguments(branches: int, kinds: Collection[str]) -> None:
    if branches < 1:
        raise RecipeError(f"student.expand.branches: expected at least 1, found {branches}")
    known = ", ".join(KINDS)
    if isinstance(kinds, str) or not kinds:
        raise RecipeError(f"student.expand.kinds: expected a list with some of {known}, found {kinds!r}")
    for kind in kinds:
        if kind not in KINDS:
            raise RecipeError(f"student.expand.kinds: expected some of {known}, found {kind!r}")


def _pairs_of(model: nn.Module, example_input: Tensor) -> list[Pair]:
    try:
        return find_pairs(model, example_input)
    except Exception as error:  # a model may raise anything for an input that it does not take
        found = f"{example_input.dtype} {tuple(example_input.shape)} on {example_input.device}"
        raise RecipeError(
            f"student.expand: expected an example input that {type(model).__name__} takes, found {found}, "
            f"for which it raises {type(error).__name__}: {error}"
        ) from error


def _gains(model: nn.Module, pair: Pair, branches: int, scale: bool, identity: bool) -> bool:
    conv = model.get_submodule(pair.conv)
    assert isinstance(conv, nn.Conv2d)
    return branches > 1 or (scale and has_scale(conv)) or (identity and has_identity(conv))


def _expand_pair(model: nn.Module, pair: Pair, branches: int, scale: bool, identity: bool) -> None:
    conv, bn = model.get_submodule(pair.conv), model.get_submodule(pair.bn)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(bn, nn.BatchNorm2d)
    expanded = MultiBranchConv(conv, bn, branches=branches, scale=scale, identity=identity)
    model.set_submodule(pair.conv, expanded)
    model.set_submodule(pair.bn, expanded.plain.after)


def _nothing_to_expand(
    model: nn.Module, pairs: list[Pair], branches: int, kinds: Collection[str], scale: bool, identity: bool
) -> str:
    counts = Counter(pair.kind for pair in pairs)
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
    return (
        f"student.expand: expected convolution -> batch norm pairs of kind {' or '.join(kinds)} in "
        f"{type(model).__name__} that gain from branches={branches}, scale={scale}, identity={identity}; "
        f"found pairs: {found} (without shared, already expanded and self-re-parameterising modules); "
        "change kinds or branches, or set student.expand to null"
    )
