"""Cut a trained network to shares of its MACs in several ways, and print a line of figures for each."""

import argparse
from collections.abc import Callable, Sequence

from segmentation import WAYS
from torch import Tensor, nn

import isoprune_hf

Measure = Callable[[nn.Module], list[str]]


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, scenes: int) -> None:
    """Add the arguments of a benchmark of a trained network, with its defaults."""
    parser.add_argument("--shares", type=int, nargs="+", default=[70, 50], help="per cent of the MACs")
    parser.add_argument("--steps", type=int, default=steps, help="updates of the base")
    parser.add_argument("--scenes", type=int, default=scenes, help="scenes that the base is trained on")
    parser.add_argument("--epochs", type=int, default=10, help="passes of the finetuning over 512 scenes")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the finetuning")


def print_cuts(
    dense: nn.Module, batches: Sequence[Tensor], titles: Sequence[str], measure: Measure, args: argparse.Namespace
) -> None:
    """Print the table of a network and its cuts, by weights, by default, and finetuned by its own outputs.

    Args:
        dense: The network.
        batches: Images without labels, for the scores, the repair and the finetuning.
        titles: The figures.
        measure: Returns the figures of a network as cells.
        args: Those of `add_arguments`.
    """
    print(f"| MACs | way | {' | '.join(titles)} |\n|---:|---|{'---:|' * len(titles)}")
    print(f"| 100 % | base | {' | '.join(measure(dense))} |", flush=True)
    for share in args.shares:
        for name, settings in WAYS.items():
            pruned = isoprune_hf.prune(dense, batches, target_macs=f"{share}%", round_to=1, **settings)
            left = f"{100 * pruned.pruned_cost.macs / pruned.base_cost.macs:.0f} %"
            print(f"| {left} | {name} | {' | '.join(measure(pruned.model))} |", flush=True)
        recipe = isoprune_hf.FinetuneRecipe(epochs=args.epochs, learning_rate=args.learning_rate)
        isoprune_hf.finetune(pruned, batches, recipe=recipe)
        print(f"| {left} | default, finetuned without labels | {' | '.join(measure(pruned.model))} |", flush=True)
