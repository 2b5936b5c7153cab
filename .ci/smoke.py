"""Import every module of the package, open a pruned folder and prune a small model: `python .ci/smoke.py FOLDER`.

Continuous integration runs it on Linux, macOS and Windows; it needs `pip install .[prune]` and no network.
"""

import importlib
import pkgutil
import sys
import tempfile
from pathlib import Path

import torch

import isoprune_hf

# Modules that need a package of another extra than `prune`.
OTHER_EXTRAS = (
    "ai_edge_litert",
    "executorch",
    "litert_torch",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "openvino",
    "sklearn",
)


def import_all() -> int:
    """Import every module of the package; return how many they are."""
    count = 0
    for module in pkgutil.walk_packages(isoprune_hf.__path__, "isoprune_hf."):
        if module.name == "isoprune_hf.__main__":
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in OTHER_EXTRAS:
                raise
            print(f"{module.name} is left out: no {error.name}")
        count += 1
    return count


def answer(model: torch.nn.Module, size: int) -> torch.Tensor:
    """Return the logits of one seeded image."""
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(image).logits


def main(folder: str) -> None:
    """Import, open, prune, save and open again."""
    print(f"{import_all()} modules on {sys.platform}")
    opened = isoprune_hf.load_base(folder)
    assert answer(opened.model, opened.model.config.image_size[-1]).isfinite().all()
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    base = isoprune_hf.load_base("timm/vit_tiny_patch16_224", False, model_args=args, num_labels=5)
    recipe = isoprune_hf.PruneRecipe(criterion="l1", target_macs="50%", round_to=1)
    pruned = isoprune_hf.prune_model(base.model, recipe)
    with tempfile.TemporaryDirectory() as place:
        pruned.save(Path(place, "model"), base.processor)
        again = isoprune_hf.load_base(str(Path(place, "model")))
        assert torch.equal(answer(again.model, 16), answer(pruned.model, 16))
    print(f"{pruned.pruned_cost.macs} of {pruned.base_cost.macs} MACs; saved and opened again with the same answer")


if __name__ == "__main__":
    main(sys.argv[1])
