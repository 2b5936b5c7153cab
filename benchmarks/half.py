"""Prune one model of every family to half of its MACs; print sizes and times as rows of a Markdown table.

    python benchmarks/half.py [NAME ...]

Weights are random and scored by L1, so no network and no data are needed; times are seconds on this machine. Each
model is saved, opened with isoprune_hf, and opened without it in a second process that blocks its import; all logits
must be bit-equal.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, ConvNextConfig, ResNetConfig, SwinConfig, ViTConfig

from isoprune_hf import PruneRecipe, load_base, prune_model

NAMES = [
    "timm/deit_small_distilled_patch16_224",
    "timm/swin_tiny_patch4_window7_224",
    "timm/convnext_tiny",
    "timm/resnet50",
    "transformers ViT (default config)",
    "transformers Swin (default config)",
    "transformers ConvNeXt (default config)",
    "transformers ResNet (default config)",
    "torchvision/mobilenet_v2",
]
CONFIGS = {"ViT": ViTConfig, "Swin": SwinConfig, "ConvNeXt": ConvNextConfig, "ResNet": ResNetConfig}
WITHOUT_PACKAGE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("isoprune_hf", "torch_pruning"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
case = load_file(sys.argv[1] + "/case.safetensors")
model = AutoModelForImageClassification.from_pretrained(sys.argv[1] + "/model", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(model(case["images"]).logits, case["logits"])
"""


def main(names: list[str]) -> None:
    """Print a row for each model."""
    print("| model | GMACs | cut to | of the target | params (M) | trace s | score s | solve s | cut s | reloaded |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---|")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            print(row(name, Path(folder)), flush=True)


def row(name: str, folder: Path) -> str:
    """Prune, save and reopen one model; return its row."""
    source = name
    if name.startswith("transformers "):
        source = str(folder / "config")
        CONFIGS[name.split()[1]](num_labels=1000).save_pretrained(source)
    base = load_base(source, pretrained=False)
    result = prune_model(base.model, PruneRecipe(criterion="l1", target_macs="50%"))
    result.save(folder / "model", base.processor)
    images = torch.randn(2, *base.model.config.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = result.model(images).logits
        again = AutoModelForImageClassification.from_pretrained(folder / "model").eval()(images).logits
    save_file({"images": images, "logits": logits}, folder / "case.safetensors")
    alone = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE, str(folder)], capture_output=True, check=False)
    equal = torch.equal(logits, again) and alone.returncode == 0
    before, after, seconds = result.base_cost, result.pruned_cost, result.seconds
    cells = [
        name,
        f"{before.macs / 1e9:.3f}",
        f"{after.macs / 1e9:.3f}",
        f"{100 * after.macs / (before.macs / 2):.2f} %",
        f"{before.params / 1e6:.2f} → {after.params / 1e6:.2f}",
        *(f"{seconds[stage]:.1f}" for stage in ("trace", "score", "solve", "cut")),
        "bit-equal" if equal else "DIFFERENT",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1:] or NAMES)
