"""Widths of layers before and after pruning, and their picture."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.pruned_models import Pruned
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from isoprune_hf.errors import MissingExtraError
from isoprune_hf.reporting import widths
from isoprune_hf.reporting.figures import REMOVED_COLOR
from isoprune_hf.reporting.widths import describe_widths, draw_widths, layer_widths


def test_widths_are_those_of_base_and_pruned_model(pruned: Callable[[str], Pruned]) -> None:
    model = pruned("vit").model
    found = layer_widths(model)
    # By hand: a stream of 32, queries, keys and values of 32 each, an MLP of 128, 7 classes.
    before = {name: first for name, (first, _) in found.items()}
    block = {"attn.qkv": 96, "attn.proj": 32, "mlp.fc1": 128, "mlp.fc2": 32}
    blocks = {f"blocks.{index}.{name}": width for index in (0, 1) for name, width in block.items()}
    assert before == {"patch_embed.proj": 32, **blocks, "head": 7}
    shapes = {name: list(tensor.shape) for name, tensor in model.model.state_dict().items()}
    assert {name: last for name, (_, last) in found.items()} == {name: shapes[f"{name}.weight"][0] for name in found}
    assert found["blocks.0.mlp.fc1"][1] < 128 and found["head"] == (7, 7)


def test_kept_part_of_a_bar_is_blue(tmp_path: Path) -> None:
    draw_widths({"a": (100, 100), "b": (100, 25), "c": (100, 0)}, tmp_path / "w.png", title="cut")
    pixels = imread(tmp_path / "w.png")[..., :3]
    blue, grey = (
        float((abs(pixels - to_rgb(c)).max(axis=2) < 0.02).sum()) for c in (widths._KEPT_COLOR, REMOVED_COLOR)
    )
    assert blue / (blue + grey) == pytest.approx(125 / 300, abs=0.04)


def test_missing_matplotlib_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not widths.can_draw()
    with pytest.raises(MissingExtraError, match=r"matplotlib.*isoprune-hf\[publish\]"):
        draw_widths({}, tmp_path / "none.png", title="none")


def test_sentence_names_the_narrowest_layer() -> None:
    widths_of = {"a": (10, 10), "b": (10, 4), "c": (8, 0)}
    assert describe_widths(widths_of) == "2 of 3 layers are narrower, most of all c (0 of 8 outputs)"
    assert describe_widths({"a": (10, 10)}) == "every layer keeps its width"


def test_wide_network_can_be_drawn(tmp_path: Path) -> None:
    draw_widths({f"stage.{n}.conv": (8, n % 8 + 1) for n in range(130)}, tmp_path / "w.png", title="deep")
    assert imread(tmp_path / "w.png").shape[1] == 1200
