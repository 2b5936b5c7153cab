"""The width of every layer before and after the cut, and a picture of them."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.extras import require_package

PICTURE = "widths.png"
_KEPT, _REMOVED, _DPI = "#3b6fb6", "#e3e6ea", 120


def layer_widths(model: IsoPruneForImageClassification) -> dict[str, tuple[int, int]]:
    """Give the outputs of each linear layer and convolution, in the order of the network: before, after the cut.

    A layer of a block that was removed has no outputs left.
    """
    now = {name: module.weight.shape[0] for name, module in model.model.named_modules() if _is_layer(module)}
    dense = meta_copy(model, dense=True).model
    return {
        name: (module.weight.shape[0], now.get(name, 0)) for name, module in dense.named_modules() if _is_layer(module)
    }


def draw_widths(widths: Mapping[str, tuple[int, int]], path: Path, *, title: str) -> None:
    """Draw a bar for each layer as a PNG: what stays of it in blue, what left in grey.

    Args:
        widths: Layer -> (before, after), in the order of the network.
        path: File to write.
        title: Line above the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_package("matplotlib", "drawing")
    figure = import_module("matplotlib.figure").Figure(
        figsize=(10, 3.2), dpi=_DPI, facecolor="white", layout="constrained"
    )
    axes = figure.add_subplot(title=title, xlabel="layer, from input to output", ylabel="outputs")
    places = range(len(widths))
    axes.bar(places, [before for before, _ in widths.values()], color=_REMOVED, width=0.85, label="before")
    axes.bar(places, [after for _, after in widths.values()], color=_KEPT, width=0.85, label="after")
    axes.set_xlim(-0.75, len(widths) - 0.25)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", metadata={"Software": None})


def can_draw() -> bool:
    """Say whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
