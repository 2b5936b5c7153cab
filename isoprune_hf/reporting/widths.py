"""Read the width of every layer before and after pruning (`layer_widths`) and draw them (`draw_widths`)."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TypeGuard

from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.reporting.figures import CLASS_COLORS, REMOVED_COLOR, open_figure

PICTURE = "widths.png"
_KEPT_COLOR = CLASS_COLORS[0]
_DPI = 120


def layer_widths(model: IsoPruneForImageClassification) -> dict[str, tuple[int, int]]:
    """Return the number of outputs of each linear layer and convolution, before and after pruning.

    Returns:
        Layer -> (before, after), in the order of the network. A layer of a removed block has 0 outputs after pruning.
    """
    after = {name: module.weight.shape[0] for name, module in model.model.named_modules() if _is_layer(module)}
    dense = meta_copy(model, dense=True).model
    return {
        name: (module.weight.shape[0], after.get(name, 0))
        for name, module in dense.named_modules()
        if _is_layer(module)
    }


def draw_widths(widths: Mapping[str, tuple[int, int]], path: Path, *, title: str) -> None:
    """Draw a bar for each layer as a PNG: kept outputs in blue, removed ones in grey.

    Args:
        widths: Layer -> (before, after), in the order of the network.
        path: File to write.
        title: Line above the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with open_figure((10, 3.2), dpi=_DPI, layout="constrained") as figure:
        axes = figure.add_subplot(title=title, xlabel="layer, from input to output", ylabel="outputs")
        places = range(len(widths))
        axes.bar(places, [before for before, _ in widths.values()], color=REMOVED_COLOR, width=0.85, label="before")
        axes.bar(places, [after for _, after in widths.values()], color=_KEPT_COLOR, width=0.85, label="after")
        axes.set_xlim(-0.75, len(widths) - 0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
        figure.savefig(path, format="png", metadata={"Software": None})


def can_draw() -> bool:
    """Return True if matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _is_layer(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv1d | nn.Conv2d]:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
