"""Encoders are pruned for their features: no labels, outputs as wide as before, a folder that AutoModel opens."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
import transformers
from helpers.fresh_python import FreshPython
from helpers.marks import one_of_each
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, pipeline

from isoprune_hf import FinetuneRecipe, IsoPruneModel, evaluate_model, finetune, prune
from isoprune_hf.errors import CheckpointError, RecipeError

TOWER = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "Dinov2Model": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**TOWER)),
    "ViTModel": lambda: transformers.ViTModel(transformers.ViTConfig(**TOWER)),
    "SiglipVisionModel": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER)),
    "CLIPVisionModel": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER)),
    "ResNetModel": lambda: transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1])
    ),
    "timm": lambda: timm.create_model("test_resnet", num_classes=0),
}
SCRIPT = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, pipeline
folder, image = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
pixels = load_file(f"{folder}/../pixels.safetensors")["pixels"]
with torch.no_grad():
    out = model(pixels)
save_file({key: value.contiguous() for key, value in out.items()}, f"{folder}/../found.safetensors")
extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True)
print(json.dumps([len(extract(image)[0]), bool(sys.modules.get("isoprune_hf"))]))
"""


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    module = ENCODERS[name]().eval()
    side = 16 if "Model" in name and name != "ResNetModel" else 32
    return module, torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(1))


def outputs_of(module: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = module(images)
    return {"pooler_output": found} if isinstance(found, torch.Tensor) else dict(found)


@pytest.mark.parametrize("name", one_of_each(ENCODERS, "Dinov2Model", "SiglipVisionModel", "timm"))
def test_features_keep_their_widths_and_reload(name: str, tmp_path: Path) -> None:
    module, images = make(name)
    dense = outputs_of(module, images)
    pruned = prune(module, [(images, torch.zeros(8))], target_macs="60%", round_to=1, criterion="gate_fisher")
    assert type(pruned.model) is type(module) and pruned.pruned_cost.macs <= 0.6 * pruned.base_cost.macs
    cut = outputs_of(pruned.model, images)
    assert {key: value.shape for key, value in cut.items()} == {key: value.shape for key, value in dense.items()}
    pruned.save(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["base"]["task"] == "image-feature-extraction" and config["format_version"] == 3
    again = AutoModel.from_pretrained(tmp_path / "folder")
    assert type(again) is IsoPruneModel
    reopened = outputs_of(again, images)
    assert all(torch.equal(value, reopened[key]) for key, value in cut.items())
    assert outputs_of(module, images).keys() == dense.keys()
    assert all(torch.equal(value, dense[key]) for key, value in outputs_of(module, images).items())


def test_labels_are_not_looked_at() -> None:
    module, images = make("Dinov2Model")
    first, second = (
        prune(module, data, round_to=1, criterion="gate_fisher")
        for data in ([images], [(images, torch.full((8,), 99))])
    )
    assert first.plan == second.plan and first.loss == second.loss == "features with random signs"


def test_folder_opens_without_the_package(tmp_path: Path, fresh_python: FreshPython) -> None:
    module, images = make("Dinov2Model")
    pruned = prune(module, images, round_to=1, criterion="l1")
    processor = transformers.BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pruned.save(tmp_path / "folder", processor)
    save_file({"pixels": images}, tmp_path / "pixels.safetensors")
    Image.new("RGB", (20, 24), "red").save(tmp_path / "image.png")
    done = fresh_python.run(SCRIPT, tmp_path / "folder", tmp_path / "image.png", absent=["isoprune_hf"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [17, False]
    found = load_file(tmp_path / "found.safetensors")
    assert all(torch.equal(value, found[key]) for key, value in outputs_of(pruned.model, images).items())
    extract = pipeline("image-feature-extraction", model=str(tmp_path / "folder"))
    assert len(extract(str(tmp_path / "image.png"))[0]) == 17  # 16 patches and the class token
    text = (tmp_path / "folder" / "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction" in text and "AutoModel.from_pretrained" in text
    assert "ImageClassification" not in text and "classes" not in text.partition("## Pruning")[0]
    with pytest.raises(CheckpointError, match="AutoModel"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "folder")


def test_folder_is_pruned_further(tmp_path: Path) -> None:
    module, images = make("Dinov2Model")
    prune(module, images, target_macs="70%", round_to=1, criterion="l1").save(tmp_path / "folder")
    settings = {"target_macs": "70%", "round_to": 1, "criterion": "gate_fisher", "reconstruct": "none"}
    again = prune(AutoModel.from_pretrained(tmp_path / "folder"), [images], rotate=False, **settings)
    assert isinstance(again.model, IsoPruneModel) and again.loss == "features with random signs"
    again.save(tmp_path / "again")
    reopened = AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(reopened(images).last_hidden_state, again.model(images).last_hidden_state)


def test_evaluation_of_classes_is_refused() -> None:
    module, _ = make("Dinov2Model")
    with pytest.raises(RecipeError, match="Dinov2Model is for image-feature-extraction"):
        evaluate_model(module, [], transformers.BitImageProcessor())


def test_result_is_compared_with_its_base() -> None:
    module, images = make("Dinov2Model")
    pruned = prune(module, [images], target_macs="60%", round_to=1, criterion="l1", reconstruct="none", rotate=False)
    processor = transformers.BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(4)]
    split = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 0, 1]}).cast_column(
        "label", datasets.ClassLabel(names=["a", "b"])
    )
    figures = evaluate_model(pruned, split, processor)
    pixels = processor(pictures, return_tensors="pt").pixel_values
    found, wanted = (outputs_of(part, pixels)["pooler_output"].double() for part in (pruned.model, module))
    assert figures["images"] == 4 and set(figures) == {"images", "cosine", "position_cosine", "knn"}
    assert figures["cosine"] == pytest.approx(float(torch.cosine_similarity(found, wanted).mean()), abs=1e-6)


def test_finetuning_brings_features_nearer() -> None:
    module, images = make("Dinov2Model")
    pruned = prune(module, [images], target_macs="40%", round_to=1, criterion="l1", reconstruct="none", rotate=False)
    wanted = outputs_of(module, images)["last_hidden_state"]

    def distance() -> float:
        return float((outputs_of(pruned.model, images)["last_hidden_state"] - wanted).square().mean())

    before = distance()
    recipe = FinetuneRecipe(epochs=20, learning_rate=3e-3)
    finetune(pruned, [(images, torch.full((8,), 3))], recipe=recipe)  # the labels are not looked at
    assert distance() < 0.7 * before
