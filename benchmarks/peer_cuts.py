"""Cut networks of tasks beyond classification by torch-pruning, for their benchmarks.

torch-pruning ranks within isomorphic classes, by the norms of weights (l2) or by Taylor importance, for which it gets
the network's own loss with labels. Heads of attention are kept, their dims are cut, and layers that the caller names
keep their outputs.
"""

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
import torch_pruning
from pruned_accuracy_methods import PRUNING_ERRORS, reach_budget, recalibrate_batchnorm
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

IMPORTANCES = {
    "torch-pruning, isomorphic, l2": torch_pruning.importance.GroupMagnitudeImportance(p=2),
    "torch-pruning, isomorphic, Taylor with labels": torch_pruning.importance.GroupTaylorImportance(),
}
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))


def peer_cuts(
    dense: nn.Module,
    batches: list[Tensor],
    losses: Iterable[Callable[[nn.Module], Tensor]],
    share: float,
    *,
    is_kept: Callable[[str], bool],
    output: Callable[[nn.Module, Tensor], Tensor],
) -> Iterator[tuple[str, float | None, nn.Module | str]]:
    """Cut copies of a network to a share of its MACs.

    Args:
        dense: The network.
        batches: Images (B, 3, H, W), with which BatchNorm is recalibrated.
        losses: Loss of the network for each batch of images with labels.
        share: Of the MACs.
        is_kept: Whether the layer of a name keeps its outputs.
        output: Makes a number of the outputs of a network for images; MACs are those of this call.

    Yields:
        Name of the way, share of the MACs that are left, and the network; or why there is none.
    """
    scored = copy.deepcopy(dense)
    for parameter in scored.parameters():
        parameter.grad = torch.zeros_like(parameter)  # of layers that no loss reaches
    for loss in losses:
        loss(scored).backward()
    whole = macs_of(dense, batches[0][:1], output)
    has_batchnorm = any(isinstance(module, nn.BatchNorm2d) for module in dense.modules())
    for name, importance in IMPORTANCES.items():
        trials: list[tuple[float, nn.Module]] = []

        def try_ratio(ratio: float, importance=importance, trials=trials) -> float:
            trial = cut(scored, batches[0][:1], ratio, importance, is_kept, output)
            left = macs_of(trial, batches[0][:1], output) / whole
            trials.append((left, trial))
            trials.sort(key=lambda found: abs(found[0] - share))
            del trials[1:]
            return left

        try:
            reach_budget(try_ratio, share)
        except PRUNING_ERRORS as error:
            if not trials:
                yield name, None, f"fails: {' '.join(str(error).split())[:80]}"
                continue
        left, network = trials[0]
        yield name, left, network
        if has_batchnorm:
            recalibrate_batchnorm(network, batches)
            yield f"{name}, BatchNorm anew", left, network


def cut(
    scored: nn.Module,
    example: Tensor,
    ratio: float,
    importance: torch_pruning.importance.Importance,
    is_kept: Callable[[str], bool],
    output: Callable[[nn.Module, Tensor], Tensor],
) -> nn.Module:
    """Return a copy of a network with gradients, cut at a ratio."""
    network = copy.deepcopy(scored)
    for parameter, given in zip(network.parameters(), scored.parameters(), strict=True):
        parameter.grad = given.grad.clone()
    modules = dict(network.named_modules())
    attentions = [
        (module, names, getattr(module, names[0]).out_features // head_dim_of(module))
        for module in modules.values()
        for names in PROJECTIONS
        if all(hasattr(module, name) for name in names)
    ]
    heads = {getattr(module, name): number for module, names, number in attentions for name in names}
    heads |= {module.value_proj: module.n_heads for module in modules.values() if hasattr(module, "value_proj")}
    pruner = torch_pruning.pruner.BasePruner(
        network,
        example,
        importance=importance,
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=ratio,
        ignored_layers=[m for name, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d) and is_kept(name)],
        num_heads=heads,
        forward_fn=output,
        # Explicit, because the mutable defaults are shared by all pruners of a process.
        in_channel_groups={},
        out_channel_groups={},
        channel_groups={},
    )
    pruner.step()
    for module, names, number in attentions:  # as torch-pruning's examples do
        width = getattr(module, names[0]).out_features
        size, scale = width // number, (width // number) ** -0.5
        sizes = {"head_dim": size, "attention_head_size": size, "all_head_size": width}
        for name, value in {**sizes, "scaling": scale, "scale": scale}.items():
            if hasattr(module, name):
                setattr(module, name, value)
    network.zero_grad()
    return network.eval()


def head_dim_of(module: nn.Module) -> int:
    """Return the head_dim of an attention, by either of its names in transformers."""
    return module.head_dim if hasattr(module, "head_dim") else module.attention_head_size


@torch.no_grad()
def macs_of(network: nn.Module, example: Tensor, output: Callable[[nn.Module, Tensor], Tensor]) -> float:
    """Return the MACs of an image."""
    with FlopCounterMode(display=False) as counter:
        output(network, example)
    return counter.get_total_flops() / 2
