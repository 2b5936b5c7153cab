"""Read the width of every layer before and after pruning (`layer_widths`) and draw them (`draw_widths`)."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TypeGuard

from torch import nn

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.checkpoint.structure import meta_copy
from isoprune_hf.reporting.figures import CLASS_COLORS, LIGHT, Theme, open_figure
from isoprune_hf.reporting.tables import shorten

PICTURE = "widths.png"
_KEPT_COLOR = CLASS_COLORS[0]
_DPI = 120
_MAX_NAMES = 60  # of layers below their bars; of more, every second or third is named
_MAX_LENGTH = 32  # characters of a name


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


def draw_widths(widths: Mapping[str, tuple[int, int]], path: Path, *, title: str, theme: Theme = LIGHT) -> None:
    """Draw a bar for each layer as a PNG: kept outputs in blue, removed ones in grey, with a sentence on the total.

    Args:
        widths: Layer -> (before, after), in the order of the network.
        path: File to write.
        title: Name of the model, before the sentence.
        theme: Colours of text and of removed outputs.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    step = -(-len(widths) // _MAX_NAMES) or 1
    with open_figure((10, 4.4), dpi=_DPI, layout="constrained", theme=theme) as figure:
        axes = figure.add_subplot(ylabel="outputs of the layer")
        axes.set_title(f"{title}: {describe_widths(widths)}", loc="left", fontsize=11)
        places = range(len(widths))
        axes.bar(places, [before for before, _ in widths.values()], color=theme.removed, width=0.85, label="removed")
        axes.bar(places, [after for _, after in widths.values()], color=_KEPT_COLOR, width=0.85, label="kept")
        axes.set_xlim(-0.75, len(widths) - 0.25)
        names = [shorten(name, _MAX_LENGTH) for name in widths]
        axes.set_xticks(places[::step], names[::step], rotation=90, fontsize=7)
        axes.legend(frameon=False)
        figure.savefig(path, format="png", metadata={"Software": None})


def describe_widths(widths: Mapping[str, tuple[int, int]]) -> str:
    """Return a sentence on the layers that became narrower, and on the one that lost the largest share."""
    cut = {name: after / before for name, (before, after) in widths.items() if after < before}
    if not cut:
        return "every layer keeps its width"
    narrowest = min(cut, key=lambda name: cut[name])
    before, after = widths[narrowest]
    verb = "is" if len(cut) == 1 else "are"
    return (
        f"{len(cut)} of {len(widths)} layers {verb} narrower, most of all {shorten(narrowest, _MAX_LENGTH)} "
        f"({after} of {before} outputs)"
    )


def can_draw() -> bool:
    """Return True if matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _is_layer(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv1d | nn.Conv2d]:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
