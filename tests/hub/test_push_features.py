"""An encoder on the Hub: its card is true, and its lines of code run."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from helpers.command_line import succeed
from helpers.hub_server import Hub
from helpers.stage_commands import write_four_classes
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel

TOWER = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder of an encoder that was pruned and evaluated on images of four classes."""
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**TOWER)).save_pretrained(tmp_path / "encoder")
    processor = transformers.BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "encoder")
    images = write_four_classes(tmp_path / "images")
    settings = ["--target-macs", "60%", "--prune.round_to", "1", "--prune.criterion", "l1", "--data", images]
    succeed("prune", tmp_path / "encoder", *settings, "--output", tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.mark.families
def test_pushed_encoder_has_a_true_card(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    succeed("push", folder, "--repo", "user/tiny")
    text = hub.files["user/tiny"]["README.md"].decode()
    card = ModelCard(text)
    assert card.data.pipeline_tag == "image-feature-extraction" and card.data.library_name == "transformers"
    results = {(result.metric_type, result.task_type): result.metric_value for result in card.data.eval_results}
    measured = json.loads((folder / "metrics.json").read_text())["pruned"]
    assert results["cosine_similarity", "image-feature-extraction"] == measured["cosine"]
    assert results["accuracy", "image-feature-extraction"] == measured["knn"]
    assert "likeness of the features was measured only on the data above" in text and "labelled images" not in text
    found = AutoModel.from_pretrained("user/tiny", cache_dir=tmp_path / "cache")
    pixels = torch.randn(2, 3, 16, 16)
    expected = AutoModel.from_pretrained(folder)(pixels).last_hidden_state
    assert torch.equal(found(pixels).last_hidden_state, expected)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 24), "red").save("image.png")
    capsys.readouterr()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks[1:]:  # the first one trusts remote code
        exec(block, {})
    assert len(blocks) == 3 and capsys.readouterr().out == "torch.Size([1, 17, 32])\n"
