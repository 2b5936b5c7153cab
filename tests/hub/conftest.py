"""A folder to push, and a Hub in this process."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers.hub_server import TOKEN, Hub, serve_hub
from safetensors.torch import save_file

from isoprune_hf.checkpoint.modeling_isoprune import code_that_ships


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    cost = {"base": {"macs": 4_000_000, "params": 2_000}, "pruned": {"macs": 1_000_000, "params": 500}}
    config = {"model_type": "isoprune", "stage": "pruned", "cost": cost, "id2label": {"0": "cat", "1": "dog"}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.arange(6.0).reshape(2, 3)}, folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "pruning_plan.json").write_text('{"kept": {}}')
    (folder / "metrics.json").write_text('{"pruned": {"top1": 0.5}}')
    (folder / "modeling_isoprune.py").write_text(code_that_ships())
    (folder / "classes.png").write_bytes(b"\x89PNG\r\n")
    (folder / "checkpoints" / "state.json").write_text("{}")
    for name in ("optimizer.pt", ".env", ".hidden.json", "model.tmp.safetensors", "notes.txt"):
        (folder / name).write_text("stays here")
    return folder


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited between attempts, without waiting."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def hub(waits: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_hub() as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(huggingface_hub.constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"))
        yield hub
