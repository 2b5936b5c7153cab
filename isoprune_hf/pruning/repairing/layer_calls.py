"""Find the layers of a network that can be fitted (`find_layers`), and observe their calls (`observe_calls`)."""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import image_size_of
from isoprune_hf.pruning.calibration.inputs import first_tensor, read_tensor
from isoprune_hf.pruning.graph.layers import BatchNorm, ConvNd
from isoprune_hf.pruning.graph.output_masks import OutputMasks
from isoprune_hf.pruning.partial_passes.observation import PassStopped
from isoprune_hf.pruning.repairing.fitted_rows import FittedModule
from isoprune_hf.pruning.repairing.functional_calls import FunctionalProbe, Window
from isoprune_hf.pruning.repairing.residual_stream import ResidualProbe

# Number of images from whose outputs the places of channels are found: a dim that joins images has another size.
_SHAPE_IMAGES = 3
_OTHER_TYPE = "they are of types that it cannot fit"
_SELECTED_ROWS = "the code selects by values what they read"
_SHARED_WEIGHTS = "other layers use the same weights"
_UNKNOWN_ROWS = "channels lie among their rows, and which ones were kept is not known"


class FittedLayer(NamedTuple):
    """A layer to fit.

    Args:
        name: Its path, the same in both networks.
        module: The layer in the cut network.
        window: Settings of a convolution; None for other layers.
        calls: Number of its calls in a forward pass.
        positions: Number of positions of all its calls for each image.
        dim: Dim of its outputs on which the channels lie.
        kept: Indices of the dense layer's outputs that were kept; None if none was removed.
        rows: Another dim of its outputs -> indices that were kept there, as of a linear that runs over tokens.
        factor: Factors for the dense outputs: one number for each that was kept.
        norm: Path of the BatchNorm after a layer without a bias.
        is_added: Its output is added to another tensor, as that of a residual branch.
    """

    name: str
    module: FittedModule
    window: Window | None
    calls: int
    positions: int
    dim: int
    kept: torch.Tensor | None
    rows: Mapping[int, torch.Tensor]
    factor: torch.Tensor | None
    norm: str | None
    is_added: bool

    @property
    def has_shift(self) -> bool:
        """Return whether the mean of the outputs can be changed."""
        return self.module.bias is not None or self.norm is not None

    def in_network(self, network: IsoPruneForImageClassification) -> "FittedLayer":
        """Return the same layer of a copy of the cut network."""
        return self._replace(module=network.model.get_submodule(self.name))


class LayerCall(NamedTuple):
    """One call of a layer.

    Args:
        inputs: Its input; of a linear or a convolution the tensor that the function of torch reads.
        output: Its output.
        stream: The tensor that the output is added to, in the layout and scale of the output.
    """

    inputs: torch.Tensor
    output: torch.Tensor
    stream: torch.Tensor | None = None


def find_layers(
    dense: IsoPruneForImageClassification,
    pruned: IsoPruneForImageClassification,
    masks: Mapping[tuple[str, int], np.ndarray],
    outputs: OutputMasks,
    factors: Mapping[str, torch.Tensor],
    selecting: Collection[str] = (),
) -> tuple[list[FittedLayer], dict[str, list[str]]]:
    """Find the layers to fit in the order of execution, and for each reason the layers that cannot be fitted.

    Args:
        dense: The network before the cut.
        pruned: The cut network.
        masks: (parameter, dim) -> which of its elements were kept.
        outputs: Layer -> for each call, dim of its output -> which of its elements were kept.
        factors: Weight -> factors for the dense outputs.
        selecting: Modules whose code selects by values.
    """
    blank = torch.zeros(_SHAPE_IMAGES, *image_size_of(pruned), device=pruned.device)
    wanted = _watch_calls(dense, blank).shapes
    found, windows, norms, added = _watch_calls(pruned, blank)
    shared = _layers_that_share(pruned)
    layers = []
    left: dict[str, list[str]] = {}
    for name, shapes in found.items():
        module = pruned.model.get_submodule(name)
        weight = f"{name}.weight"
        mask = masks.get((weight, 0))
        if isinstance(module, nn.LayerNorm) and (mask is None or not module.elementwise_affine):
            continue  # all its channels were kept
        if not _is_fitted_type(module) or name not in windows:
            left.setdefault(_OTHER_TYPE, []).append(name)
            continue
        if any(name.startswith(f"{other}.") for other in selecting):
            left.setdefault(_SELECTED_ROWS, []).append(name)
            continue
        if module in shared:
            left.setdefault(_SHARED_WEIGHTS, []).append(name)
            continue
        places = _find_places(module, mask, wanted.get(name, []), shapes, outputs.get(name, []))
        if places is None:
            left.setdefault(_UNKNOWN_ROWS, []).append(name)
            continue
        dim, rows = places[0], {at: _indices(kept, pruned.device) for at, kept in places[1].items()}
        norm = norms.get(name) if module.bias is None else None
        kept = None if mask is None else _indices(mask, pruned.device)
        is_added = len(shapes) == 1 and name in added
        factor = factors.get(weight)
        positions = math.ceil(sum(shape.numel() // shape[dim] for shape in shapes) / _SHAPE_IMAGES)
        layers.append(
            FittedLayer(name, module, windows[name], len(shapes), positions, dim, kept, rows, factor, norm, is_added)
        )
    return layers, left


def observe_calls(model: IsoPruneForImageClassification, layer: FittedLayer, images: torch.Tensor) -> list[LayerCall]:
    """Run a forward pass and return all calls of a layer; the pass stops after the last one, or after its sum."""
    calls: list[LayerCall] = []

    def on_start(*_: Any) -> None:
        within.enter_context(functions)  # slows down the functions of other modules

    def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: torch.Tensor) -> None:
        within.close()
        call = functions.call_of(module, output)
        inputs = read_tensor(args, kwargs) if call is None else call.inputs
        calls.append(LayerCall(inputs, output.clone() if layer.is_added else output))
        if layer.is_added:
            probe.follow(output, on_sum)
        elif len(calls) == layer.calls:
            raise PassStopped

    def on_sum(other: torch.Tensor) -> None:
        calls[0] = calls[0]._replace(stream=other)
        raise PassStopped

    probe = ResidualProbe()
    module = model.model.get_submodule(layer.name)
    functions = FunctionalProbe([module])
    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(on_start).remove)
        stack.callback(module.register_forward_hook(on_call, with_kwargs=True).remove)
        if layer.is_added:
            stack.enter_context(probe)
        within = stack.enter_context(ExitStack())
        with suppress(PassStopped):
            model(pixel_values=images)
    return calls


class _Watched(NamedTuple):
    """Observations of the layers of a network in one forward pass.

    Args:
        shapes: Layer -> shapes of its outputs, in the order of its calls.
        windows: Layer whose outputs are those of `linear` or `conv2d` with its own weight, or that is a LayerNorm ->
            settings of the convolution.
        norms: Layer -> path of the BatchNorm that reads its output.
        added: Layers of which the output of a call is added to another tensor.
    """

    shapes: dict[str, list[torch.Size]]
    windows: dict[str, Window | None]
    norms: dict[str, str]
    added: set[str]


def _watch_calls(network: IsoPruneForImageClassification, images: torch.Tensor) -> _Watched:
    """Run a forward pass and watch the layers."""
    watched = _Watched({}, {}, {}, set())
    others: set[str] = set()
    # Outputs by id. The tensors are kept, too, so that no other tensor gets the id of one of them.
    written: dict[int, tuple[torch.Tensor, str]] = {}

    def after(name: str, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        watched.shapes.setdefault(name, []).append(output.shape)
        written[id(output)] = output, name
        call = functions.call_of(module, output)
        window = None if call is None else call.window
        is_known = call is not None or isinstance(module, nn.LayerNorm)
        if not is_known or watched.windows.setdefault(name, window) != window:
            others.add(name)
        probe.follow(output, lambda _: watched.added.add(name))

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        if id(x) in written:
            watched.norms[written[id(x)][1]] = name

    handles = []
    layers = []
    for name, module in network.model.named_modules():
        if isinstance(module, BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
        elif isinstance(module, (nn.Linear, ConvNd, nn.LayerNorm)):
            layers.append(module)
            handles.append(module.register_forward_hook(partial(after, name)))
    functions, probe = FunctionalProbe(layers), ResidualProbe()
    try:
        with functions, probe:
            network(pixel_values=images)
    finally:
        for handle in handles:
            handle.remove()
    for name in others & watched.windows.keys():
        del watched.windows[name]
    return watched


def _layers_that_share(network: IsoPruneForImageClassification) -> set[nn.Module]:
    """Return the modules that own a parameter that another module owns, too."""
    owners: dict[int, list[nn.Module]] = {}
    for module in network.modules():
        for parameter in dict.fromkeys(module.parameters(recurse=False)):
            owners.setdefault(id(parameter), []).append(module)
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}


def _find_places(
    module: nn.Module,
    mask: np.ndarray | None,
    wanted: Sequence[torch.Size],
    found: Sequence[torch.Size],
    outputs: Sequence[Mapping[int, np.ndarray]],
) -> tuple[int, dict[int, np.ndarray]] | None:
    """Find the dim of a layer's channels, and masks of the other dims of its outputs that became smaller.

    Args:
        module: The layer.
        mask: Channels that were kept; None if none was removed.
        wanted: Shapes of the outputs of its calls in the dense network, for `_SHAPE_IMAGES` images.
        found: The same in the cut network.
        outputs: Dim of the output of each call -> which of its elements were kept.

    Returns:
        None if the outputs of the two networks cannot be matched.
    """
    if len(wanted) != len(found):
        return None
    matched: list[tuple[int, dict[int, np.ndarray]]] = []
    known = outputs if len(outputs) == len(found) else [{}] * len(found)
    for before, after, kept in zip(wanted, found, known, strict=True):
        if len(before) != len(after):
            return None
        changed = [dim for dim in range(len(after)) if before[dim] != after[dim]]
        channel = 1 if isinstance(module, nn.Conv2d) else len(after) - 1
        if isinstance(module, nn.LayerNorm) and mask is not None:
            fits = [dim for dim in changed if (before[dim], after[dim]) == (len(mask), mask.sum())]
            channel = fits[0] if fits else channel
        expected = after[channel] if mask is None else len(mask)
        if before[channel] != expected or 0 in changed:
            return None
        rows = {dim: kept[dim] for dim in changed if dim != channel and dim in kept}
        if rows.keys() != set(changed) - {channel}:
            return None
        if any((len(row), row.sum()) != (before[dim], after[dim]) for dim, row in rows.items()):
            return None
        matched.append((channel, rows))
    first = matched[0]
    is_same = all(
        channel == first[0]
        and rows.keys() == first[1].keys()
        and all(np.array_equal(rows[dim], first[1][dim]) for dim in rows)
        for channel, rows in matched
    )
    return first if is_same else None


def _indices(mask: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(mask)).to(device)


def _is_fitted_type(module: nn.Module) -> TypeGuard[FittedModule]:
    """Check whether a layer is a linear, a 2d convolution or a LayerNorm without activation."""
    if isinstance(module, nn.LayerNorm):
        return all(isinstance(child, nn.Identity) for child in module.children())
    return isinstance(module, (nn.Linear, nn.Conv2d))
