"""What a user sees on the terminal while a model is pruned by the default preset."""

import io
import sys
import weakref
from pathlib import Path

import pytest
from helpers.plain_scores import batches_of
from helpers.tiny_models import make_base
from tqdm import tqdm

from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import PruneRecipe


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_every_long_stage_shows_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_base("vit", tmp_path)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(tqdm, "_instances", weakref.WeakSet(), raising=False)  # bars that other tests left open
    monkeypatch.setattr(sys, "stderr", Terminal())
    recipe = PruneRecipe(target_macs="70%", round_to=1)
    prune_model(model, recipe, batches_of(model, [2, 2, 2]))
    shown = sys.stderr.getvalue()
    layers = {text.partition("/")[2].partition(" ")[0] for text in shown.split("\r") if text.startswith("repair:")}
    for stage in ("rotate", "score", "repair, images", "repair, comparison"):
        assert any(text.startswith(stage) and " 0/3 " in text for text in shown.split("\r")), stage
    assert len(layers) == 1
