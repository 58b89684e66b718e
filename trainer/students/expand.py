"""Expand: give the plain convolutions of a student parallel branches for the time of its training."""

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from softshard.pipeline.runtime.errors import RecipeError, few
from softshard.trainer.students.branches import MultiBranchConv
from softshard.trainer.students.fused.conv_geometry import has_identity, has_scale
from softshard.trainer.students.fused.depthwise import runs_here
from softshard.trainer.students.fused.dispatch import Implementation, why_not_fused
from softshard.trainer.students.trace import READ_MORE_THAN_ONCE, ConvType, FoundPairs, Pair, Unpaired, find_pairs

Init = Literal["zero_gamma", "split_gamma"]

_logger = logging.getLogger(__name__)


def expand(
    model: nn.Module,
    example_input: Tensor,
    *,
    branches: int = 3,
    conv_types: Collection[str] = ("depthwise", "pointwise"),
    scale_branch: bool = True,
    identity: bool = True,
    init: str = "zero_gamma",
    implementation: str = "auto",
) -> nn.Module:
    """Replace convolution -> batch norm pairs by sums of parallel branches, for the time of training.

    Each of these convolutions gets `branches` parallel copies of its shape, with `scale_branch` a 1 x 1 branch (where
    its kernel is larger), with `identity` an identity branch (where input and output agree), each with its own batch
    norm (RepVGG, arXiv 2101.03697; MobileOne, 2206.04040; the recipe of GhostNetV3, 2404.11202). A pair that would get
    no second branch stays as it is.

    Right after expand the model computes what it computed before: with zero_gamma the same bit for bit in evaluation
    mode, and up to rounding in training, where branches may share one convolution; with split_gamma up to rounding.
    Random numbers come from torch's global generator.

    Expand before the model is wrapped (DDP), compiled or converted to SyncBatchNorm, and before its optimizer is made.
    Hooks on replaced modules no longer run. One line in the log of this module says what was expanded and which
    convolutions of these types were not: a warning where one of them is read more than once, otherwise at level INFO.

    Args:
        model: it is changed in place.
        example_input: one batch that the model takes, on its device and in its dtype (float [1, 3, H, W] for
            classifiers of images); see find_pairs for what is found with it.
        branches: how many copies of a convolution there are, the first of them the convolution itself.
        conv_types: some of depthwise (one group for each input channel), pointwise (1 x 1 in one group), dense (k x k
            in one group) and grouped.
        scale_branch: whether there are 1 x 1 branches.
        identity: whether there are identity branches.
        init: how branches start. With zero_gamma the first keeps what the pair has learned, the others have random
            weights and gamma 0. With split_gamma every copy has the pair's weights, a random part of its gamma and an
            equal part of its beta (Net2Net, arXiv 1511.05641), and the 1 x 1 and identity branches have gamma 0.
        implementation: how branches are computed in training, with the same results up to rounding. auto: through one
            convolution where that is cheaper (fused/dispatch.py). fused: through one convolution in every layer.
            separate: each by itself. triton: as auto, and on a GPU depthwise layers, too, through one convolution.
            The kernels in Triton have been run in its interpreter alone, on a CPU: measure before you use them.

    Returns:
        The same model.

    Raises:
        RecipeError: an argument is out of its range, Triton is asked for and not installed, a layer cannot be fused,
            the model rejects `example_input`, or there is nothing to expand. The model is unchanged.
    """
    _check_arguments(branches, conv_types, init, implementation)
    found = _find(model, example_input)
    chosen = [
        pair
        for pair in found.pairs
        if pair.conv_type in conv_types and _gains(model, pair, branches, scale_branch, identity)
    ]
    if not chosen:
        raise RecipeError(_nothing_to_expand(model, found, branches, conv_types, scale_branch, identity))
    if implementation == "fused":
        _check_fused(model, chosen)
    for pair in chosen:
        expanded = _expand_pair(model, pair, branches, scale_branch, identity, implementation)
        if init == "split_gamma":
            _split_gamma(expanded)
    _report(chosen, [conv for conv in found.unpaired if conv.conv_type in conv_types])
    return model


def _check_arguments(branches: int, conv_types: Collection[str], init: str, implementation: str) -> None:
    if branches < 1:
        raise RecipeError(f"student.expand.branches: expected at least 1, found {branches}")
    known = ", ".join(get_args(ConvType))
    if isinstance(conv_types, str) or not conv_types:
        raise RecipeError(f"student.expand.conv_types: expected a list with some of {known}, found {conv_types!r}")
    for conv_type in conv_types:
        if conv_type not in get_args(ConvType):
            raise RecipeError(f"student.expand.conv_types: expected some of {known}, found {conv_type!r}")
    for name, value, values in (
        ("init", init, get_args(Init)),
        ("implementation", implementation, get_args(Implementation)),
    ):
        if value not in values:
            raise RecipeError(f"student.expand.{name}: expected one of {', '.join(values)}, found {value!r}")
    if implementation == "triton" and find_spec("triton") is None:
        raise RecipeError(
            "student.expand.implementation: expected the package triton for 'triton', found that it is not installed; "
            "pip install triton, or set auto"
        )


def _check_fused(model: nn.Module, pairs: Sequence[Pair]) -> None:
    """Every layer must have one convolution for all of its branches, and this machine the kernels for it."""
    found = [f"{pair.conv}, which {why}" for pair in pairs if (why := _why_not_fused(model, pair))]
    if found:
        raise RecipeError(
            "student.expand.implementation: expected layers whose branches are one convolution for 'fused', found "
            f"{few(found)}; set auto, or leave their type out of conv_types"
        )


def _why_not_fused(model: nn.Module, pair: Pair) -> str:
    conv = model.get_submodule(pair.conv)
    assert isinstance(conv, nn.Conv2d)
    why = why_not_fused(conv)
    if why or pair.conv_type != "depthwise":
        return why
    if torch.cuda.is_available():
        return "" if find_spec("triton") else "needs the package triton on this machine"
    return "" if runs_here() else "needs compiled kernels that run on this CPU"


def _find(model: nn.Module, example_input: Tensor) -> FoundPairs:
    try:
        return find_pairs(model, example_input)
    except Exception as error:  # a model may raise anything for an input that it does not take
        found = f"{example_input.dtype} {tuple(example_input.shape)} on {example_input.device}"
        raise RecipeError(
            f"student.expand: expected an example input that {type(model).__name__} takes, found {found}, "
            f"for which it raises {type(error).__name__}: {error}"
        ) from error


def _gains(model: nn.Module, pair: Pair, branches: int, scale_branch: bool, identity: bool) -> bool:
    conv = model.get_submodule(pair.conv)
    assert isinstance(conv, nn.Conv2d)
    return branches > 1 or (scale_branch and has_scale(conv)) or (identity and has_identity(conv))


def _expand_pair(
    model: nn.Module, pair: Pair, branches: int, scale_branch: bool, identity: bool, implementation: str
) -> MultiBranchConv:
    conv, bn = model.get_submodule(pair.conv), model.get_submodule(pair.bn)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(bn, nn.BatchNorm2d)
    expanded = MultiBranchConv(
        conv, bn, branches=branches, scale_branch=scale_branch, identity=identity, implementation=implementation
    )
    model.set_submodule(pair.conv, expanded)
    model.set_submodule(pair.bn, expanded.plain.after)
    return expanded


@torch.no_grad()
def _split_gamma(expanded: MultiBranchConv) -> None:
    """Make every k x k branch a copy of the first, with an equal part of its gamma and beta.

    Then shift the gammas by random numbers that cancel out: copies with equal gammas would stay copies, as those at
    gamma 0 would.
    """
    first, *others = expanded.conv_bns()
    count, gamma, beta = 1 + len(others), first.bn.weight.clone(), first.bn.bias.clone()
    shifts = (torch.rand(count, len(gamma)).to(gamma) - 0.5) / count
    shifts = shifts - shifts.mean(0)
    for branch in others:
        branch.conv.weight.copy_(first.conv.weight)
        branch.bn.load_state_dict(first.bn.state_dict())
        if first.conv.bias is not None:  # the others have none: only their running means know it
            assert branch.bn.running_mean is not None
            branch.bn.running_mean.sub_(first.conv.bias)
    for branch, shift in zip((first, *others), shifts, strict=True):
        branch.bn.weight.copy_(gamma / count + shift)
        branch.bn.bias.copy_(beta / count)


def _report(chosen: Sequence[Pair], unpaired: Sequence[Unpaired]) -> None:
    level = logging.WARNING if any(conv.reason == READ_MORE_THAN_ONCE for conv in unpaired) else logging.INFO
    text = "student.expand: convolutions with branches: %s; left alone: %s"
    _logger.log(level, text, _counts(chosen), _listing(unpaired))
    if not runs_here() and any(pair.conv_type == "depthwise" for pair in chosen):
        _logger.info("student.expand: depthwise branches train separately on this CPU: it has no compiled kernels")


def _counts(convs: Sequence[Pair | Unpaired]) -> str:
    """'17 depthwise, 34 pointwise' or 'none'."""
    counts = Counter(conv.conv_type for conv in convs)
    return ", ".join(f"{count} {conv_type}" for conv_type, count in sorted(counts.items())) or "none"


def _listing(unpaired: Sequence[Unpaired]) -> str:
    """What was left alone, by reason."""
    names: dict[str, list[str]] = {}
    for conv in unpaired:
        names.setdefault(conv.reason, []).append(conv.conv)
    return ", ".join(f"{len(convs)} {reason} ({few(convs)})" for reason, convs in names.items()) or "none"


def _nothing_to_expand(
    model: nn.Module, found: FoundPairs, branches: int, conv_types: Collection[str], scale_branch: bool, identity: bool
) -> str:
    return (
        f"student.expand: expected convolution -> batch norm pairs of type {' or '.join(conv_types)} in "
        f"{type(model).__name__} that gain from branches={branches}, scale_branch={scale_branch}, identity={identity}; "
        f"found: {_counts(found.pairs)}; convolutions left alone: {_listing(found.unpaired)}; "
        "change conv_types or branches, or set student.expand to null"
    )
