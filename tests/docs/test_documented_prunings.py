"""Every documented command that prunes keeps the accuracy of a small trained net, unless it asks for no repair."""

import re
import shlex
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import isoprune_hf
from isoprune_hf.cli.parser import parse
from isoprune_hf.recipes import PruneRecipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "isoprune_hf/cli/help_texts").glob("*.txt")]
COMMAND = re.compile(
    r"^ *(?:accelerate launch [^\n]*?(?:train_accelerate\.py|-m isoprune_hf)|isoprune) "
    r"((?:prune|run|frontier|--config) .+)$",
    re.M,
)
# Settings that name the model of the command or parts of it, and those of its sample and machine.
OF_THE_MODEL = ("model", "pretrained", "weights", "model_args", "num_labels", "scopes", "ratios", "include", "exclude")
OF_THE_RUN = ("remove_blocks", "layout", "interpolation", "calibration_batches", "batch_size", "target_params")
BUDGETS = ("target_macs", "target_latency")
FLOOR = 0.9  # of the accuracy of the dense net; ten classes


def documented() -> list[str]:
    """Return the commands of all pages and help texts, but for those that read a recipe of the reader."""
    found = [match[1] for page in PAGES for match in COMMAND.finditer(page.read_text().replace("\\\n", " "))]
    commands = [command for command in dict.fromkeys(found) if "[FLAGS]" not in command]
    assert len(commands) > 30
    return [command for command in commands if not re.search(r"--config (?!recipes/)", command)]


@cache
def trained_net() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Train a net on the first 1,400 digits; return it with all images and classes."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images)[:, None].float() / 16, torch.tensor(digits.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [
            nn.Sequential(nn.Conv2d(width, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()) for width in (1, 32, 32)
        ]
        net = nn.Sequential(*parts, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
        for _ in range(3):
            for batch in torch.randperm(1400).split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
                optimizer.step()
    return net.eval(), images, labels


def accuracy(net: nn.Module) -> float:
    _, images, labels = trained_net()
    with torch.no_grad():
        return float((net(images[1400:]).argmax(1) == labels[1400:]).double().mean())


def settings_of(recipe: PruneRecipe) -> dict[str, object]:
    """Return the settings that a command names, without those of its model; a budget becomes half of the MACs."""
    named = {item.name: getattr(recipe, item.name) for item in fields(recipe)}
    plain = PruneRecipe()
    named = {name: value for name, value in named.items() if value != getattr(plain, name)}
    has_budget = any(name in named for name in BUDGETS)
    kept = {name: value for name, value in named.items() if name not in (*OF_THE_MODEL, *OF_THE_RUN, *BUDGETS)}
    return {**kept, "round_to": 1} | ({"target_macs": "50%"} if has_budget else {})


@cache
def commands_by_settings() -> dict[str, tuple[dict[str, object], bool, str]]:
    """Return settings as text -> the settings, whether there are images, and the first command that names them."""
    found: dict[str, tuple[dict[str, object], bool, str]] = {}
    for command in documented():
        _, given = parse(shlex.split(command, comments=True))
        settings, has_images = settings_of(given.prune), given.data.dataset is not None
        found.setdefault(f"{settings}{has_images}", (settings, has_images, command))
    return found


def prune_as(settings: dict[str, object], *, has_images: bool) -> float:
    """Prune the trained net, and return the share of its accuracy that is left."""
    net, images, labels = trained_net()
    data = [*zip(images[:256].split(64), labels[:256].split(64), strict=True)] if has_images else images[:1]
    return accuracy(isoprune_hf.prune(net, data, **settings).model) / accuracy(net)


@pytest.mark.launch
def test_documented_prunings_keep_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert accuracy(trained_net()[0]) > 0.9
    left = {}
    for settings, has_images, command in commands_by_settings().values():
        if (
            has_images
            and settings.get("reconstruct") != "none"
            and settings.get("preset") not in ("paper", "reference")
        ):
            left[command] = prune_as(settings, has_images=True)
    assert len(left) >= 4
    assert {command: share for command, share in left.items() if share < FLOOR} == {}
