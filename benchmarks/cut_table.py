"""Cut a trained network to shares of its MACs in several ways, and print a line of figures for each."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import isoprune_hf

WAYS = {
    "scores of weights (l1)": {"criterion": "l1", "reconstruct": "none", "rotate": False},
    "default, without repair": {"reconstruct": "none", "rotate": False},
    "default": {},
}
Measure = Callable[[nn.Module], list[str]]
Cut = tuple[str, float | None, nn.Module | str]
Peers = Callable[[float], Iterator[Cut]]


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    steps: int,
    scenes: int | None = None,
    shares: Sequence[int] = (70, 50),
    epochs: int = 10,
    learning_rate: float = 3e-4,
) -> argparse.ArgumentParser:
    """Add the arguments of a benchmark of a trained network to a parser, with its defaults.

    `--scenes` and `--weights` are those of a base that is trained on drawn scenes.
    """
    parser.add_argument("--shares", type=int, nargs="+", default=list(shares), help="per cent of the MACs")
    parser.add_argument("--steps", type=int, default=steps, help="updates of the base")
    parser.add_argument(
        "--epochs", type=int, default=epochs, help="passes of the finetuning over the calibration images"
    )
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="of the finetuning")
    if scenes is not None:
        parser.add_argument("--scenes", type=int, default=scenes, help="scenes that the base is trained on")
        parser.add_argument("--weights", type=Path, help="weights of the base: opened if they exist, written if not")
    return parser


def open_base(weights: Path | None, make: Callable[[], nn.Module], train: Callable[[], nn.Module]) -> nn.Module:
    """Open the trained network, or train it and save its weights."""
    if weights is not None and weights.exists():
        network = make()
        network.load_state_dict(load_file(weights))
        return network.eval()
    network = train()
    if weights is not None:
        save_file({name: value.contiguous().clone() for name, value in network.state_dict().items()}, weights)
    return network


def print_cuts(
    dense: nn.Module,
    batches: Sequence[Tensor],
    titles: Sequence[str],
    measure: Measure,
    peers: Peers,
    args: argparse.Namespace,
) -> None:
    """Print the table of a network and its cuts, by other tools, by weights, by default, and finetuned without labels.

    Args:
        dense: The network.
        batches: Images without labels, for the scores, the repair and the finetuning.
        titles: The figures.
        measure: Returns the figures of a network as cells.
        peers: Yields names of ways of other tools, the share of the MACs that is left, and the network or, without a
            share, why there is none, for a share of the MACs.
        args: Those of `add_arguments`.
    """
    print(f"| MACs | way | {' | '.join(titles)} |\n|---:|---|{'---:|' * len(titles)}")
    print(f"| 100 % | base | {' | '.join(measure(dense))} |", flush=True)
    for share in args.shares:
        for name, left, network in peers(share / 100):
            cells = [network, *"-" * (len(titles) - 1)] if left is None else measure(network)
            print(f"| {100 * (left or share / 100):.0f} % | {name} | {' | '.join(cells)} |", flush=True)
        for name, settings in WAYS.items():
            pruned = isoprune_hf.prune(dense, batches, target_macs=f"{share}%", round_to=1, **settings)
            left = f"{100 * pruned.pruned_cost.macs / pruned.base_cost.macs:.0f} %"
            print(f"| {left} | {name} | {' | '.join(measure(pruned.model))} |", flush=True)
        recipe = isoprune_hf.FinetuneRecipe(epochs=args.epochs, learning_rate=args.learning_rate)
        isoprune_hf.finetune(pruned, batches, recipe=recipe)
        print(f"| {left} | default, finetuned without labels | {' | '.join(measure(pruned.model))} |", flush=True)
