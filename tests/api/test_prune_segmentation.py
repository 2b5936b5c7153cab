"""Networks of semantic segmentation are pruned without labels, and open by the Auto class of their task."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers.fresh_python import FreshPython
from helpers.segmenters import make_beit, make_dpt, make_segformer, make_upernet
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)

from isoprune_hf import FinetuneRecipe, IsoPruneForSemanticSegmentation, evaluate_model, finetune, load_base, prune
from isoprune_hf.checkpoint.task_forms import TASK_FORMS
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.models.pixel_loss import PIXEL_CLASSES

OTHERS = {"UperNet": make_upernet, "BEiT": make_beit, "DPT": make_dpt}
CUT = {"target_macs": "60%", "round_to": 1, "criterion": "gate_fisher"}
SCRIPT = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline
folder, image = sys.argv[1:]
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    out = model(load_file(f"{folder}/../pixels.safetensors")["pixels"])
save_file({key: value.contiguous() for key, value in out.items()}, f"{folder}/../found.safetensors")
segments = pipeline("image-segmentation", model=folder, trust_remote_code=True)(image)
print(json.dumps([sorted(part["label"] for part in segments), segments[0]["mask"].size,
                  bool(sys.modules.get("isoprune_hf"))]))
"""


def make() -> tuple[transformers.PreTrainedModel, torch.Tensor]:
    return make_segformer(), torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def logits_of(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network(images).logits


def test_maps_keep_their_shape_and_reload(tmp_path: Path) -> None:
    network, images = make()
    dense = logits_of(network, images)
    pruned = prune(network, [images], **CUT)
    assert type(pruned.model) is type(network) and pruned.pruned_cost.macs <= 0.6 * pruned.base_cost.macs
    assert pruned.loss == "classes drawn for pixels"
    cut = logits_of(pruned.model, images)
    assert cut.shape == dense.shape == (8, 3, 8, 8) and torch.equal(logits_of(network, images), dense)
    assert float(PIXEL_CLASSES.distances([cut], [dense]).mean()) < 0.01
    pruned.save(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["base"]["task"] == "semantic-segmentation" and config["format_version"] == 3
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "folder").eval()
    assert type(again) is IsoPruneForSemanticSegmentation and torch.equal(logits_of(again, images), cut)
    assert again.config.id2label == network.config.id2label
    masks = torch.randint(0, 3, (8, 16, 16), generator=torch.Generator().manual_seed(2))
    masks[0] = 255  # is left out
    own, base = (net(pixel_values=images, labels=masks).loss for net in (again, pruned.model))
    assert torch.equal(own, base) and own.requires_grad
    features = AutoModel.from_pretrained(tmp_path / "folder")(images).last_hidden_state
    assert features.shape[:2] == network.segformer(images).last_hidden_state.shape[:2]


def test_folder_opens_without_the_package(tmp_path: Path, fresh_python: FreshPython) -> None:
    network, images = make()
    pruned = prune(network, images, round_to=1, criterion="l1")
    processor = transformers.SegformerImageProcessor(size={"height": 16, "width": 16})
    pruned.save(tmp_path / "folder", processor)
    save_file({"pixels": images}, tmp_path / "pixels.safetensors")
    Image.new("RGB", (20, 24), "red").save(tmp_path / "image.png")
    done = fresh_python.run(SCRIPT, tmp_path / "folder", tmp_path / "image.png", absent=["isoprune_hf"])
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")["logits"]
    assert torch.equal(found, logits_of(pruned.model, images))
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "folder").eval()
    opened = AutoImageProcessor.from_pretrained(tmp_path / "folder")
    outputs = again(**opened(Image.open(tmp_path / "image.png"), return_tensors="pt"))
    (classes,) = opened.post_process_semantic_segmentation(outputs, target_sizes=[(24, 20)])
    names = sorted(again.config.id2label[int(index)] for index in classes.unique())
    assert json.loads(done.stdout.splitlines()[-1]) == [names, [20, 24], False]
    text = (tmp_path / "folder" / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in text and "AutoModelForSemanticSegmentation.from_pretrained" in text
    assert "3 classes, of which every pixel has one" in text and "ImageClassification" not in text
    with pytest.raises(CheckpointError, match="open it with AutoModelForSemanticSegmentation"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "folder")


@pytest.mark.families
def test_folder_is_pruned_further(tmp_path: Path) -> None:
    network, images = make()
    settings = {"target_macs": "80%", "round_to": 1, "criterion": "l1", "reconstruct": "none", "rotate": False}
    prune(network, images, **settings).save(tmp_path / "folder")
    again = prune(AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "folder"), [images], **settings)
    assert isinstance(again.model, IsoPruneForSemanticSegmentation)
    again.save(tmp_path / "again")
    reopened = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(reopened.eval(), images), logits_of(again.model, images))


@pytest.mark.families
@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_keep_maps_and_reload(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = OTHERS[name]().eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    dense = logits_of(network, images)
    pruned = prune(network, [images], **CUT)
    cut = logits_of(pruned.model, images)
    assert cut.shape == dense.shape and pruned.pruned_cost.macs <= 0.6 * pruned.base_cost.macs
    pruned.save(tmp_path / "folder")
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "folder").eval()
    assert torch.equal(logits_of(again, images), cut)
    network.save_pretrained(tmp_path / "base")
    transformers.SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "base")
    opened = load_base(str(tmp_path / "base"), tasks=TASK_FORMS).model
    with torch.no_grad():
        assert torch.equal(opened(images).outputs[0], dense)


@pytest.mark.families
def test_masks_of_batches_are_the_targets() -> None:
    network, images = make()
    masks = torch.randint(0, 3, (8, 8, 8), generator=torch.Generator().manual_seed(2))
    assert prune(network, [(images, masks)], round_to=1, criterion="gate_fisher").loss == "cross_entropy"


@pytest.mark.families
def test_finetuning_brings_maps_nearer() -> None:
    network, images = make()
    pruned = prune(network, [images], target_macs="50%", round_to=1, criterion="l1", reconstruct="none", rotate=False)
    wanted = logits_of(network, images)

    def distance() -> float:
        return float(PIXEL_CLASSES.distances([logits_of(pruned.model, images)], [wanted]).mean())

    before = distance()
    finetune(pruned, [images], recipe=FinetuneRecipe(epochs=100, learning_rate=3e-3))
    assert distance() < before / 2


def test_evaluation_of_classes_is_refused() -> None:
    with pytest.raises(RecipeError, match="SegformerForSemanticSegmentation is for semantic-segmentation"):
        evaluate_model(make()[0], [], transformers.SegformerImageProcessor())
