"""Oracles for engines and cuts, independent of how the groups were found.

Permutation (`permutation_error`): reordering the channels of a group in all its members keeps the output. It detects
missing and misplaced ties for any weights, but no superfluous ties.
Mask (`mask_error`): the cut model equals the base with the removed elements at zero. It detects faults of the cut:
wrong kept positions and wrong attributes.
Both replace the kernels of convolutions that run along channels (ECA) by their centres: the result of such a kernel
depends on the neighbours of a channel, which change with the order and with a cut.
Axis counts (`axis_counts`): detect superfluous ties.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.models.held import HeldModel
from isoprune_hf.pruning.groups import CoupledGroup, Member
from isoprune_hf.pruning.plan import PruningPlan


def axis_counts(groups: Sequence[CoupledGroup]) -> dict[str, list[int]]:
    """Summarise groups: signature -> the channels of each, ascending."""
    counts: dict[str, list[int]] = {}
    for group in groups:
        counts.setdefault(group.signature, []).append(group.channels)
    return {signature: sorted(channels) for signature, channels in sorted(counts.items())}


def parts(group: CoupledGroup) -> dict[str, tuple[Member, ...]]:
    """Return the members of a group by the unit of their rows: channels, heads, or dims of every head."""
    return {
        "channels": group.members,
        "heads": group.head_members,
        "dims": getattr(group, "dim_members", ()),
    }


def prunable_share(model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup]) -> float:
    """Return the share of the parameters that groups could remove."""
    fixed = {name: [np.ones(size, dtype=bool) for size in p.shape] for name, p in model.model.named_parameters()}
    for group in groups:
        for member in (member for members in parts(group).values() for member in members):
            if member.parameter in fixed:
                fixed[member.parameter][member.dim][member.index.ravel()] = False
    stuck = sum(int(np.prod([int(dim.sum()) for dim in dims])) for dims in fixed.values())
    return 1 - stuck / sum(parameter.numel() for parameter in model.model.parameters())


@torch.no_grad()
def randomize(model: IsoPruneForImageClassification, seed: int = 1, *, images: torch.Tensor | None = None) -> None:
    """Draw, in place, weights that leave no part of the network idle: no zero biases, no tiny layer scales.

    Args:
        model: The model.
        seed: Seed of the weights.
        images: Images that statistics of BatchNorm are taken from; None draws some.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    for name, tensor in model.model.named_parameters():
        is_vector = tensor.numel() in (0, max(tensor.shape, default=0), 1)
        if name.endswith("bias") and is_vector:
            tensor.copy_(0.2 * draw(tensor))
        elif is_vector:  # scales of norms and of layers, temperatures, class tokens
            start = tensor if float(tensor.abs().mean()) > 0.05 else 0.5
            tensor.copy_(start * (1 + 0.2 * draw(tensor)) + 0.05 * draw(tensor))
        elif any(part in name for part in ("token", "pos", "latents")):
            tensor.copy_(0.3 * draw(tensor))
        else:
            tensor.copy_(draw(tensor) * tensor[0].numel() ** -0.5)
    _calibrate(model, make_images(model, seed=seed + 100) if images is None else images)


def _calibrate(model: IsoPruneForImageClassification, images: torch.Tensor) -> None:
    """Set, in place, the statistics of every BatchNorm to those of its inputs, so that logits depend on the image."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        norm.running_var.clamp_(min=0.05)


def make_images(model: IsoPruneForImageClassification, count: int = 2, seed: int = 2) -> torch.Tensor:
    """Draw normalised images of the model's size."""
    return torch.randn(count, *model.config.image_size, generator=torch.Generator().manual_seed(seed))


class _Exact(TorchDispatchMode):
    """Runs in float64 the operations that a network casts to float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def _in_float64() -> Iterator[None]:
    before, is_fast = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    torch.set_default_dtype(torch.float64)
    torch.backends.mha.set_fastpath_enabled(False)  # one operation, which hides its softmax and scale from `follow`
    try:
        with torch.no_grad(), _Exact():
            yield
    finally:
        torch.set_default_dtype(before)
        torch.backends.mha.set_fastpath_enabled(is_fast)


def exact_logits(model: IsoPruneForImageClassification, images: torch.Tensor) -> torch.Tensor:
    """Run a fresh float64 copy of a model: (B, num_labels), or all outputs of another task, (B, N)."""
    model = fresh_copy(model).double().eval()
    with _in_float64():
        return _compared(model, images.double())


def _compared(model: IsoPruneForImageClassification, images: torch.Tensor) -> torch.Tensor:
    output = model(images)
    if isinstance(model, HeldModel):
        return torch.cat([value.flatten(1) for value in output.outputs], 1)
    return output.logits


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def permute_groups(
    model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup], seed: int = 0
) -> IsoPruneForImageClassification:
    """Return a copy of a model in which the channels of every group are permuted, in all members of the group.

    In attention, heads are permuted, and dims within heads: all heads alike if a parameter belongs to a dim of every
    head, and each head differently if not.
    """
    random, permuted = np.random.default_rng(seed), fresh_copy(model)
    tensors = dict([*permuted.model.named_parameters(), *permuted.model.named_buffers()])
    for group in groups:
        orders = _orders(group, random)
        for kind, members in parts(group).items():
            for member in members:
                tensor = tensors[member.parameter]
                positions = np.arange(tensor.shape[member.dim])
                positions[member.index] = member.index[orders[kind]]
                tensor.data = tensor.data.index_select(member.dim, torch.from_numpy(positions))
    return permuted


def _orders(group: CoupledGroup, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the permutation of each unit."""
    if not group.num_heads:
        return {"channels": _cycle(group.channels, random)}
    heads, dims = _cycle(group.num_heads, random), _cycle(group.head_dim, random)
    is_shared = bool(parts(group)["dims"])
    channels = [head * group.head_dim + (dims if is_shared else _cycle(group.head_dim, random)) for head in heads]
    return {"channels": np.concatenate(channels), "heads": heads, "dims": dims}


def _cycle(count: int, random: np.random.Generator) -> np.ndarray:
    """Draw a permutation without fixed points."""
    order, moved = random.permutation(count), np.empty(count, dtype=np.int64)
    moved[order] = np.roll(order, 1)
    return moved


def permutation_error(
    model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup], images: torch.Tensor, seed: int = 0
) -> float:
    """Return the relative change of the output when every group is permuted; at most 1e-9 if all ties are right."""
    model = without_neighbours(model, groups)
    return difference(exact_logits(permute_groups(model, groups, seed), images), exact_logits(model, images))


@torch.no_grad()
def rounding_error(model: IsoPruneForImageClassification, images: torch.Tensor, seed: int = 0) -> float:
    """Return the relative change of the output when every weight changes in its last bit, in float64.

    It is what an order of summation can do: a network of random weights whose attention is sharp multiplies it in each
    block, and then no permutation leaves the output as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    copied = fresh_copy(model).double()
    for parameter in copied.parameters():
        noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.mul_(1 + torch.finfo(torch.float64).eps * (2 * noise - 1).sign())
    return difference(exact_logits(copied, images), exact_logits(model, images))


@torch.no_grad()
def without_neighbours(
    model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup]
) -> IsoPruneForImageClassification:
    """Return a copy of a model in which every kernel that runs along the channels of a group has only its centre."""
    copied = fresh_copy(model)
    for name in {name for group in groups for name in getattr(group, "sliding", ())}:
        kernel = copied.model.get_parameter(name)
        centre = kernel[..., kernel.shape[-1] // 2].clone()
        kernel.zero_()[..., kernel.shape[-1] // 2] = centre
    return copied


@torch.no_grad()
def zero_removed(
    model: IsoPruneForImageClassification, groups: Sequence[CoupledGroup], plan: PruningPlan
) -> IsoPruneForImageClassification:
    """Return a copy of a base in which every element that a plan removes is zero."""
    masked = fresh_copy(model)
    tensors = dict([*masked.model.named_parameters(), *masked.model.named_buffers()])
    for group in groups:
        if group.name not in plan.kept:
            continue
        kept = np.asarray(plan.kept[group.name])
        leaving = {"channels": np.setdiff1d(np.arange(group.channels), kept)}
        if group.num_heads:
            leaving["heads"] = np.setdiff1d(np.arange(group.num_heads), plan.heads[group.name])
            leaving["dims"] = np.setdiff1d(np.arange(group.head_dim), kept % group.head_dim)
        for kind, members in parts(group).items():
            for member in members:
                positions = torch.from_numpy(member.index[leaving[kind]].ravel())
                tensors[member.parameter].data.index_fill_(member.dim, positions, 0)
    return masked


class NotComparableError(Exception):
    """The mask oracle has no reference for this cut; the message names the operation."""


def mask_error(
    model: IsoPruneForImageClassification,
    pruned: IsoPruneForImageClassification,
    groups: Sequence[CoupledGroup],
    plan: PruningPlan,
    images: torch.Tensor,
) -> float:
    """Return the relative difference between the cut model and the base with the removed elements at zero.

    A zero adds nothing to a sum, but it counts in a mean. The base therefore follows the operations of the cut model:
    a statistic (norm, mean, variance, softmax, maximum, standardised weights) that has fewer elements in the cut model
    is computed in the base over the same number of elements, without the zeros. Numbers in the code, such as a scale
    of head_dim ** -0.5, are taken from the cut model; this oracle does not judge them.

    Raises:
        NotComparableError: The two models run different operations, or such a statistic is over a cut axis on which
            the removed elements are not zero.
    """
    images = images.double()
    pruned = without_neighbours(pruned, groups).double().eval()
    masked = zero_removed(without_neighbours(model, groups), groups, plan).double().eval()
    return difference(*follow(lambda: _compared(pruned, images), lambda: _compared(masked, images)))


def follow(
    run_cut: Callable[[], torch.Tensor], run_base: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a cut model, then its base with zeros as `mask_error` describes; return both outputs.

    Raises:
        NotComparableError: See `mask_error`.
    """
    recorder = _Recorder()
    with _in_float64(), recorder:
        found = run_cut()
    follower = _Follower(recorder.calls)
    with _in_float64(), follower:
        expected = run_base()
    if follower.position != len(recorder.calls):
        raise NotComparableError("the cut model runs more operations than the base")
    return found, expected


@dataclass(frozen=True)
class _Call:
    """An operation of the cut model whose result depends on the number of elements.

    Args:
        name: Its name.
        count: Elements that a statistic is over; 0 for no statistic.
        numbers: Plain numbers among its arguments: position or name -> value.
    """

    name: str
    count: int
    numbers: dict[int | str, float]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _read_call(func, args, kwargs or {})
        if call is not None:
            self.calls.append(call)
        return func(*args, **(kwargs or {}))


class _Follower(TorchDispatchMode):
    def __init__(self, calls: list[_Call]):
        super().__init__()
        self.calls, self.position = calls, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mine = _read_call(func, args, kwargs)
        if mine is None:
            return func(*args, **kwargs)
        theirs = self.calls[self.position] if self.position < len(self.calls) else None
        if theirs is None or theirs.name != mine.name:
            other = "nothing" if theirs is None else theirs.name
            raise NotComparableError(f"the base runs {mine.name} where the cut model runs {other}")
        self.position += 1
        args = tuple(theirs.numbers.get(place, value) for place, value in enumerate(args))
        kwargs = {name: theirs.numbers.get(name, value) for name, value in kwargs.items()}
        if theirs.count == mine.count:
            return func(*args, **kwargs)
        return _STATISTICS[func.overloadpacket][1](args, kwargs, theirs.count)


# Statistics over `count` elements; the other elements are zeros at removed positions.
# Each function takes (args, kwargs, count) of the operation in the base, and returns the result of the operation.


def _mean(args: tuple, kwargs: dict[str, Any], count: int) -> torch.Tensor:
    tensor, dims, keepdim = _reduction(args, kwargs)
    _check_zeros(tensor, dims, count, "a mean")
    return tensor.sum(dims, keepdim=keepdim) / count


def _variance(args: tuple, kwargs: dict[str, Any], count: int) -> torch.Tensor:
    tensor, dims, keepdim = _reduction(args, kwargs)
    _, variance = _moments(tensor, dims, count, "a variance")
    correction = kwargs.get("correction")
    variance = variance * count / (count - (1 if correction is None else correction))
    return variance if keepdim else variance.reshape(tensor.sum(dims).shape)


def _deviation(args: tuple, kwargs: dict[str, Any], count: int) -> torch.Tensor:
    return _variance(args, kwargs, count).sqrt()


def _variance_and_mean(args: tuple, kwargs: dict[str, Any], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _variance(args, kwargs, count), _mean(args, kwargs, count)


def _deviation_and_mean(args: tuple, kwargs: dict[str, Any], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _deviation(args, kwargs, count), _mean(args, kwargs, count)


def _layer_norm(args: tuple, kwargs: dict[str, Any], count: int) -> tuple[torch.Tensor, ...]:
    tensor, shape, weight, bias, eps = args
    dims = list(range(tensor.ndim - len(shape), tensor.ndim))
    mean, variance = _moments(tensor, dims, count, "a LayerNorm")
    output = (tensor - mean) * (variance + eps).rsqrt()
    # Without weights, removed elements are recognised by the zeros of the input.
    output = output * (~_dead(tensor, dims) if weight is None else weight)
    return output if bias is None else output + bias, mean, (variance + eps).rsqrt()


def _group_norm(args: tuple, kwargs: dict[str, Any], count: int) -> tuple[torch.Tensor, ...]:
    tensor, weight, bias, batch, channels, pixels, groups, eps = args
    grouped = tensor.reshape(batch, groups, -1)
    mean, variance = _moments(grouped, [2], count, "a GroupNorm")
    output = ((grouped - mean) * (variance + eps).rsqrt()).reshape(batch, channels, pixels)
    if weight is None:
        output = output * ~_dead(tensor.reshape(batch, channels, pixels), [1])
    else:
        output = output * weight[:, None]
    output = output if bias is None else output + bias[:, None]
    return output.reshape(tensor.shape), mean, (variance + eps).rsqrt()


def _batch_norm(args: tuple, kwargs: dict[str, Any], count: int) -> tuple[torch.Tensor, ...]:
    """Standardise weights; BatchNorm in eval mode computes no statistic."""
    tensor, weight, bias, eps = args[0], args[1], args[2], args[-1]
    dims = [dim for dim in range(tensor.ndim) if dim != 1]
    mean, variance = _moments(tensor, dims, count, "a standardised weight")
    shape = [1, -1] + [1] * (tensor.ndim - 2)
    output = (tensor - mean) * (variance + eps).rsqrt()
    output = output if weight is None else output * weight.reshape(shape)
    return output if bias is None else output + bias.reshape(shape), mean, variance


def _softmax(args: tuple, kwargs: dict[str, Any], count: int) -> torch.Tensor:
    tensor, dim, _ = args
    return tensor.masked_fill(_removed(tensor, [dim], count, "a softmax"), -torch.inf).softmax(dim)


def _largest(args: tuple, kwargs: dict[str, Any], count: int) -> torch.Tensor:
    tensor, dims, keepdim = _reduction(args, kwargs)
    return tensor.masked_fill(_removed(tensor, dims, count, "a maximum"), -torch.inf).amax(dims, keepdim=keepdim)


def _attention(args: tuple, kwargs: dict[str, Any], count: int) -> tuple[torch.Tensor, ...]:
    scale = count**-0.5 if kwargs.get("scale") is None else kwargs["scale"]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **{**kwargs, "scale": scale})


def _reduction(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, list[int], bool]:
    tensor = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    return tensor, list(dims or range(tensor.ndim)), keepdim


def _check_zeros(tensor: torch.Tensor, dims: Sequence[int], count: int, what: str) -> torch.Tensor:
    """Count the nonzero elements with `keepdim`; raise if fewer elements are zero than were removed."""
    alive = (tensor != 0).sum(list(dims), keepdim=True)
    if int(alive.max()) > count:
        raise NotComparableError(f"{what} is over a cut axis on which the removed elements are not zero")
    return alive


def _moments(tensor: torch.Tensor, dims: Sequence[int], count: int, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    alive = _check_zeros(tensor, dims, count, what)
    mean = tensor.sum(list(dims), keepdim=True) / count
    squares = ((tensor - mean).square() * (tensor != 0)).sum(list(dims), keepdim=True)
    return mean, (squares + (count - alive) * mean.square()) / count


def _dead(tensor: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Return the positions on `dims` at which a tensor is zero along all other dims."""
    inside = {dim % tensor.ndim for dim in dims}
    others = [dim for dim in range(tensor.ndim) if dim not in inside]
    return (tensor == 0).all(others, keepdim=True) if others else tensor == 0


def _removed(tensor: torch.Tensor, dims: Sequence[int], count: int, what: str) -> torch.Tensor:
    dead = _dead(tensor, dims)
    if int((~dead).sum()) != count:
        raise NotComparableError(f"{what} is over a cut axis on which the removed elements cannot be told by zeros")
    return dead


def _reduced(args: tuple, kwargs: dict[str, Any]) -> int:
    tensor, dims, _ = _reduction(args, kwargs)
    return math.prod(tensor.shape[dim] for dim in dims)


_aten = torch.ops.aten
# Operation -> (number of elements of its statistic, the statistic over fewer elements).
_STATISTICS: dict[Any, tuple[Callable[..., int], Callable[..., Any]]] = {
    _aten.mean: (_reduced, _mean),
    _aten.var: (_reduced, _variance),
    _aten.std: (_reduced, _deviation),
    _aten.var_mean: (_reduced, _variance_and_mean),
    _aten.std_mean: (_reduced, _deviation_and_mean),
    _aten.amax: (_reduced, _largest),
    _aten._softmax: (lambda args, _: args[0].shape[args[1]], _softmax),
    _aten.native_layer_norm: (lambda args, _: math.prod(args[1]), _layer_norm),
    _aten.native_group_norm: (lambda args, _: args[4] // args[6] * args[5], _group_norm),
    _aten.native_batch_norm: (lambda args, _: args[5] and args[0].numel() // args[0].shape[1], _batch_norm),
    _aten._scaled_dot_product_flash_attention_for_cpu: (lambda args, _: args[0].shape[-1], _attention),
}


def _read_call(func: Any, args: tuple, kwargs: dict[str, Any]) -> _Call | None:
    operation = func.overloadpacket
    if operation in _STATISTICS:
        scale = {} if kwargs.get("scale") is None else {"scale": kwargs["scale"]}
        return _Call(str(operation), int(_STATISTICS[operation][0](args, kwargs)), scale)
    if torch.Tag.pointwise not in func.tags:
        return None
    places: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
    numbers = {place: value for place, value in places.items() if type(value) in (int, float)}
    return _Call(str(operation), 0, numbers) if numbers else None


def fresh_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model without the tensors that its modules cache between passes."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        for name, value in vars(module).items():
            is_table = not name.startswith("_") and isinstance(value, dict) and value
            if is_table and all(isinstance(entry, torch.Tensor) for entry in value.values()):
                vars(module)[name] = {}
    return copied
