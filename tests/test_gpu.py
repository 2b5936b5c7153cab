"""Checks on a GPU: scores, cut and repair as on the CPU, and training in bf16, compiled and resumed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.command_line import read, succeed
from helpers.tiny_models import make_base, make_images

from isoprune_hf.models import load_base
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.pruning.score import score_model
from isoprune_hf.recipes import PruneRecipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FAMILIES = ["vit", "swin", "convnext", "resnet", "mobilenet_v2", "hf-vit"]


@pytest.fixture(autouse=True)
def exact_products():
    """Disable TF32, so that both devices compute in fp32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def batches_of(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(24, *model.config.image_size, generator=generator)
    return [(part, torch.randint(7, (8,), generator=generator)) for part in images.split(8)]


@pytest.mark.parametrize("criterion", ["gate_fisher_joint", "gate_fisher", "taylor", "hessian", "l1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_cpu(family: str, criterion: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    recipe = PruneRecipe(criterion=criterion)
    here = score_model(model, recipe, batches_of(model))
    there = score_model(model.cuda(), recipe, batches_of(model))
    for name, values in here.scores.items():
        found, highest = there.scores[name].cpu(), values.abs().max().item()
        if criterion == "gate_fisher_joint":  # two channels that cost the same may leave in the other order
            torch.testing.assert_close(found.sort()[0], values.sort()[0], rtol=0, atol=0.05 * highest)
            cheapest, expected = (set(scores.argsort()[: len(scores) // 2].tolist()) for scores in (found, values))
            assert len(cheapest & expected) >= 0.95 * len(expected)
        else:
            torch.testing.assert_close(found, values, rtol=1e-3, atol=1e-4 * highest)


@pytest.mark.parametrize("family", FAMILIES)
def test_best_preset_equals_cpu(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    images, recipe = make_images(model), PruneRecipe(preset="best", target_macs="60%", round_to=1, min_keep=1)
    here = prune_model(model, recipe, batches_of(model))
    there = prune_model(model.cuda(), recipe, batches_of(model))
    assert there.model.device.type == "cuda" and there.pruned_cost.macs <= 0.6 * there.base_cost.macs
    kept, expected = there.plan.kept, here.plan.kept
    same = sum(len(set(kept[name]) & set(expected[name])) for name in expected if name in kept)
    assert same >= 0.95 * sum(map(len, expected.values()))
    if kept == expected:
        with torch.no_grad():
            found, wanted = there.model(images.cuda()).logits.cpu(), here.model(images).logits
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max().item())


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"precision": "fp16", "channels_last": "true"},
        {"precision": "bf16", "torch_compile": "true", "teacher_precision": "bf16", "distillation": "soft"},
    ],
    ids=["bf16", "fp16-channels-last", "bf16-compiled"],
)
def test_the_whole_road_runs_and_learns(settings: dict[str, str], tmp_path: Path) -> None:
    flags = [text for name, value in settings.items() for text in (f"--finetune.{name}", value)]
    succeed(*flags, "--finetune.epochs", "3", "--output", tmp_path / "out")
    metrics = read(tmp_path / "out" / "model", "metrics.json")
    assert metrics["base"]["top1"] > 0.9 and metrics["pruned"]["top1"] > 0.85 and metrics["finetuned"]["top1"] > 0.9


def test_model_trained_on_gpu_gives_cpu_predictions(tmp_path: Path) -> None:
    succeed("--finetune.epochs", "1", "--output", tmp_path / "out")
    model = load_base(str(tmp_path / "out" / "model")).model
    images = make_images(model)
    with torch.no_grad():
        torch.testing.assert_close(
            model.cuda()(images.cuda()).logits.cpu(), model.cpu()(images).logits, rtol=1e-3, atol=1e-3
        )


def test_killed_training_resumes_to_equal_bytes(tmp_path: Path) -> None:
    succeed("--finetune.epochs", "1", "--output", tmp_path / "road")
    train = [sys.executable, "-m", "isoprune_hf", "finetune", "--model", tmp_path / "road" / "model"]
    train += ["--data.dataset", "digits", "--finetune.precision", "bf16", "--finetune.epochs", "4", "--output"]
    subprocess.run([*train, tmp_path / "whole"], check=True, capture_output=True, timeout=300)
    killed = subprocess.Popen([*train, tmp_path / "killed"], stdout=subprocess.PIPE, text=True)
    for line in killed.stdout:
        if line.startswith("epoch 2:"):
            killed.kill()
    assert killed.wait() == -9
    done = subprocess.run([*train, tmp_path / "killed"], check=True, capture_output=True, text=True, timeout=300)
    assert "resuming after update" in done.stdout + done.stderr
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
