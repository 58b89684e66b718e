"""Find the convolution -> batch norm pairs of a model by running it once and watching who reads what.

The order in which a model registers its modules says little about the order in which it calls them (a search by
order finds wrong pairs in real models), so the pairs come from a run: the tensor that the batch norm receives is
the very tensor that the convolution returned, and nothing else reads it.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from softshard.trainer.students.branches import MultiBranchConv

ConvType = Literal["depthwise", "pointwise", "grouped", "dense"]
PlainModule = nn.Conv2d | nn.BatchNorm2d

# Exact types, not subclasses: a subclass may compute something else from its weight (weight standardization, a
# parametrization, statistics of splits), which the algebra of fold would not know.
_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
_BATCH_NORMS = (nn.BatchNorm2d, BatchNormAct2d)

# Methods by which timm and the authors of other models mark a module that re-parameterizes itself.
_OWN_REPARAMETERIZATION = ("reparameterize", "fuse", "switch_to_deploy")

# Functions that ask about a tensor without reading its values.
_METADATA = {
    torch.Tensor.dim,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.Tensor.numel,
    torch.Tensor.size,
    torch.Tensor.stride,
    torch.is_floating_point,
    torch.numel,
    *(getattr(torch.Tensor, name).__get__ for name in ("device", "dtype", "is_cuda", "layout", "ndim", "shape")),
}


# Why a convolution is in no pair; each goes on from "N convolutions ".
OWN_BRANCHES = "with a re-parameterization of their own"
OWN_ARITHMETIC = "that compute something of their own or pad with other values than zeros"
SEVERAL_NAMES = "known under several names"
NOT_RUN = "that did not run"
NO_BATCH_NORM = "without a batch norm that can be folded"
READ_MORE_THAN_ONCE = "whose weight, output or batch norm is read more than once"


@dataclass(frozen=True)
class Pair:
    """A convolution and the batch norm that alone reads its output, by their names in the model."""

    conv: str
    bn: str
    conv_type: ConvType


@dataclass(frozen=True)
class Unpaired:
    """A convolution, by its name in the model, that is in no pair, and the reason, one of those above."""

    conv: str
    conv_type: ConvType
    reason: str


class FoundPairs(NamedTuple):
    """The pairs, in the order of their execution, and every other convolution."""

    pairs: list[Pair]
    unpaired: list[Unpaired]


def find_pairs(model: nn.Module, example_input: Tensor) -> FoundPairs:
    """Find the convolution -> batch norm pairs that can be expanded and folded, and why other convolutions cannot.

    A pair counts when the batch norm's input is the tensor that the convolution returned, and when that tensor
    and both weights are read exactly once in the whole run. So shared modules, tied weights and outputs that
    something else reads are left out; so are modules known under two names, subclasses that compute something of their
    own, batch norms without affine parameters or running statistics, and everything inside a module
    that brings its own re-parameterization. What is already expanded is neither a pair nor unpaired.

    Args:
        model: modes, buffers and hooks are afterwards as they were, also when it raises.
        example_input: what the model takes, on its device and in its dtype; one image is enough. It is run once in
            evaluation mode without gradients.
    """
    candidates, reasons = _candidates(model)
    reads = _ReadCounter()
    joined = _run(model, example_input, candidates, reads)
    for conv in candidates:
        if isinstance(conv, nn.Conv2d):
            reasons[conv] = NO_BATCH_NORM if reads.count(conv.weight) else NOT_RUN
    pairs = []
    for conv, bn, output in joined:
        reasons[conv] = READ_MORE_THAN_ONCE
        if all(reads.count(tensor) == 1 for tensor in (output, conv.weight, bn.weight)):
            pairs.append(Pair(candidates[conv], candidates[bn], type_of(conv)))
            del reasons[conv]
    names = {module: name for name, module in model.named_modules()}
    return FoundPairs(pairs, [Unpaired(names[conv], type_of(conv), reason) for conv, reason in reasons.items()])


def type_of(conv: nn.Conv2d) -> ConvType:
    """Tell depthwise (one group for each input channel), pointwise (1 x 1 in one group), else grouped or dense."""
    if conv.groups == 1:
        return "pointwise" if conv.kernel_size == (1, 1) else "dense"
    return "depthwise" if conv.groups == conv.in_channels else "grouped"


def _candidates(model: nn.Module) -> tuple[dict[PlainModule, str], dict[nn.Conv2d, str]]:
    """Every convolution and batch norm that may be replaced, with its name; every other convolution, with a reason."""
    times_named = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    own_branches = _inside(model, lambda module: any(hasattr(module, name) for name in _OWN_REPARAMETERIZATION))
    expanded = _inside(model, lambda module: isinstance(module, MultiBranchConv))
    candidates: dict[PlainModule, str] = {}
    reasons: dict[nn.Conv2d, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, PlainModule) or module in expanded:
            continue
        if module in own_branches:
            reason = OWN_BRANCHES
        elif times_named[module] > 1:
            reason = SEVERAL_NAMES
        elif not _is_plain(module):
            reason = OWN_ARITHMETIC
        else:
            candidates[module] = name
            continue
        if isinstance(module, nn.Conv2d):
            reasons[module] = reason
    return candidates, reasons


def _inside(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> set[nn.Module]:
    """All modules in those parts of `model` that are as wanted; the whole model is no part of itself."""
    parts = (part for part in model.modules() if part is not model and wanted(part))
    return {module for part in parts for module in part.modules()}


def _is_plain(module: PlainModule) -> bool:
    if isinstance(module, nn.Conv2d):
        # Other paddings than zeros put values of the image where a 1 x 1 branch would have to put zeros; a weight that
        # a hook makes (spectral_norm) is no parameter.
        plain = type(module) in _CONVOLUTIONS and isinstance(module.weight, nn.Parameter)
        return plain and module.padding_mode == "zeros"
    return type(module) in _BATCH_NORMS and module.affine and module.track_running_stats


class _ReadCounter(TorchFunctionMode):
    """Counts the torch functions that read each watched tensor; those called inside another are not counted again."""

    def __init__(self) -> None:
        super().__init__()
        self._watched: dict[int, Tensor] = {}  # holding them keeps their ids from being used again
        self._reads: Counter[int] = Counter()

    def watch(self, tensor: Tensor) -> None:
        self._watched[id(tensor)] = tensor

    def read(self, values: Any) -> None:
        """Count one read of every watched tensor in a nest of tuples, lists and dicts."""
        self._reads.update(id(tensor) for tensor in _tensors_in(values) if id(tensor) in self._watched)

    def count(self, tensor: Tensor) -> int:
        return self._reads[id(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _METADATA:
            self.read((args, kwargs))
        return func(*args, **kwargs)


def _tensors_in(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors_in(list(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors_in(value)


def _run(
    model: nn.Module, example_input: Tensor, modules: Collection[PlainModule], reads: _ReadCounter
) -> list[tuple[nn.Conv2d, nn.BatchNorm2d, Tensor]]:
    """Run the model; return (conv, bn, tensor) where a bn among `modules` receives what a conv among them returned."""
    producer: dict[int, nn.Conv2d] = {}
    pairs = []

    def after_conv(conv: nn.Conv2d, _: Any, output: Tensor) -> None:
        producer[id(output)] = conv
        reads.watch(output)

    def before_bn(bn: nn.BatchNorm2d, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in producer:
            pairs.append((producer[id(args[0])], bn, args[0]))

    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, nn.Conv2d):
                hook = module.register_forward_hook(after_conv)
            else:
                hook = module.register_forward_pre_hook(before_bn)
            stack.callback(hook.remove)
            reads.watch(module.weight)
        stack.enter_context(_evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        with reads:
            output = model(example_input)
        reads.read(output)  # what the model returns, its caller reads
    return pairs


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then each module's own mode again: a frozen batch norm in a model in training stays frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
