"""Networks of object detection are pruned without labels, and open by the Auto class of their task."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from helpers.detectors import OTHERS, make_detr, make_rt_detr, make_timm_detr, make_yolos
from helpers.fresh_python import FreshPython
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from isoprune_hf import FinetuneRecipe, IsoPruneForObjectDetection, finetune, load_base, prune
from isoprune_hf.checkpoint.task_forms import TASK_FORMS
from isoprune_hf.errors import UnsupportedArchitectureError
from isoprune_hf.models.detection_loss import DetectionLoss
from isoprune_hf.models.nested import tensors_of

CUT = {"target_macs": "60%", "round_to": 1, "criterion": "gate_fisher"}
PLAIN = {"round_to": 1, "criterion": "l1", "reconstruct": "none", "rotate": False}
NETWORKS = {"DETR": make_detr, "DETR on timm": make_timm_detr, "RT-DETR": make_rt_detr, **OTHERS}
SCRIPT = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from PIL import Image
from transformers import AutoModelForObjectDetection, pipeline
folder, image = sys.argv[1:]
model = AutoModelForObjectDetection.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    out = model(load_file(f"{folder}/../pixels.safetensors")["pixels"])
save_file({key: out[key].contiguous() for key in ("logits", "pred_boxes")}, f"{folder}/../found.safetensors")
found = pipeline("object-detection", model=folder, trust_remote_code=True)(image, threshold=0.3)
print(json.dumps([found, bool(sys.modules.get("isoprune_hf"))]))
"""


def make_images(side: int) -> Tensor:
    return torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(1))


def outputs_of(network: torch.nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        found = network(images)
    return found.logits, found.pred_boxes


def are_equal(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_objects_keep_their_shape_and_reload(tmp_path: Path) -> None:
    network, images = make_yolos(), make_images(32)
    dense = outputs_of(network, images)
    pruned = prune(network, [images], **CUT)
    assert type(pruned.model) is type(network) and pruned.pruned_cost.macs <= 0.6 * pruned.base_cost.macs
    assert pruned.loss == "objects drawn for queries"
    cut = outputs_of(pruned.model, images)
    assert cut[0].shape == (8, 5, 3) and cut[1].shape == (8, 5, 4) and are_equal(outputs_of(network, images), dense)
    assert float(DetectionLoss(2).distances(cut, dense).mean()) < 0.1
    assert any(group.name.startswith("vit.embeddings") for group in pruned.groups)  # hidden states are no outputs
    pruned.save(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["base"]["task"] == "object-detection" and config["format_version"] == 3
    again = AutoModelForObjectDetection.from_pretrained(tmp_path / "folder").eval()
    assert type(again) is IsoPruneForObjectDetection and are_equal(outputs_of(again, images), cut)
    assert again.config.id2label == network.config.id2label
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}] * 8
    own, base = (net(pixel_values=images, labels=labels).loss for net in (again, pruned.model))
    assert torch.equal(own, base) and own.requires_grad


@pytest.mark.launch
def test_folder_opens_without_the_package(tmp_path: Path, fresh_python: FreshPython) -> None:
    network, images = make_yolos(), make_images(32)
    pruned = prune(network, images, **{**PLAIN, "target_macs": "80%"})
    processor = transformers.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 48})
    pruned.save(tmp_path / "folder", processor)
    save_file({"pixels": images}, tmp_path / "pixels.safetensors")
    picture = torch.randint(0, 256, (40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(picture.numpy()).save(tmp_path / "image.png")
    done = fresh_python.run(SCRIPT, tmp_path / "folder", tmp_path / "image.png", absent=["isoprune_hf"])
    assert done.returncode == 0, done.stderr
    stored = load_file(tmp_path / "found.safetensors")
    assert are_equal((stored["logits"], stored["pred_boxes"]), outputs_of(pruned.model, images))
    found, has_package = json.loads(done.stdout.splitlines()[-1])
    again = AutoModelForObjectDetection.from_pretrained(tmp_path / "folder").eval()
    opened = AutoImageProcessor.from_pretrained(tmp_path / "folder")
    inputs = opened([Image.open(tmp_path / "image.png")], return_tensors="pt")
    assert set(inputs) == {"pixel_values", "pixel_mask"}
    (objects,) = opened.post_process_object_detection(again(**inputs), 0.3, target_sizes=[(40, 40)])
    assert not has_package and len(found) == len(objects["boxes"]) > 0
    assert [one["label"] for one in found] == [again.config.id2label[int(kind)] for kind in objects["labels"]]
    assert [[*one["box"].values()] for one in found] == objects["boxes"].int().tolist()
    text = (tmp_path / "folder" / "README.md").read_text()
    assert "pipeline_tag: object-detection" in text and "AutoModelForObjectDetection.from_pretrained" in text


@pytest.mark.families
@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_keep_objects_and_reload(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = NETWORKS[name](), make_images(64)[:4]
    dense = outputs_of(network, images)
    pruned = prune(network, images, **{**PLAIN, "target_macs": "80%"})
    cut = outputs_of(pruned.model, images)
    assert [value.shape for value in cut] == [value.shape for value in dense]
    assert pruned.pruned_cost.macs <= 0.8 * pruned.base_cost.macs and not are_equal(cut, dense)
    pruned.save(tmp_path / "folder")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("contacted"))
    again = AutoModelForObjectDetection.from_pretrained(tmp_path / "folder").eval()
    assert are_equal(outputs_of(again, images), cut)
    mask = torch.ones(4, 64, 64, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(again(pixel_values=images, pixel_mask=mask).logits, cut[0])


@pytest.mark.families
@pytest.mark.parametrize("make", [make_detr, make_rt_detr])
def test_repair_brings_objects_nearer(make: Callable[[], transformers.PreTrainedModel]) -> None:
    network, random = make(), torch.Generator().manual_seed(1)
    images = torch.nn.functional.interpolate(torch.randn(48, 3, 8, 8, generator=random), size=64, mode="bilinear")
    settings = {"target_macs": "70%", "round_to": 1, "criterion": "l1"}
    wanted = outputs_of(network, images[32:])
    distances = [
        float(DetectionLoss(2).distances(outputs_of(pruned.model, images[32:]), wanted).mean())
        for pruned in (
            prune(network, images[:32].split(8), **settings, **ways) for ways in ({"reconstruct": "none"}, {})
        )
    ]
    assert distances[1] < 0.8 * distances[0]


def test_network_without_boxes_is_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="returns logits, and no pred_boxes"):
        tensors_of({"logits": torch.zeros(1, 2, 3)}, ("logits", "pred_boxes"))


@pytest.mark.families
def test_folder_is_pruned_further(tmp_path: Path) -> None:
    network, images = make_yolos(), make_images(32)
    settings = {**PLAIN, "target_macs": "80%"}
    prune(network, images, **settings).save(tmp_path / "folder")
    again = prune(AutoModelForObjectDetection.from_pretrained(tmp_path / "folder"), [images], **settings)
    assert isinstance(again.model, IsoPruneForObjectDetection)
    again.save(tmp_path / "again")
    reopened = AutoModelForObjectDetection.from_pretrained(tmp_path / "again").eval()
    assert are_equal(outputs_of(reopened, images), outputs_of(again.model, images))


@pytest.mark.families
def test_finetuning_brings_objects_nearer() -> None:
    network, images = make_yolos(), make_images(32)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}] * 8
    batches = [{"pixel_values": images, "labels": labels}]  # which are not looked at
    pruned = prune(network, batches, **{**PLAIN, "target_macs": "50%"})
    wanted = outputs_of(network, images)

    def distance() -> float:
        return float(DetectionLoss(2).distances(outputs_of(pruned.model, images), wanted).mean())

    before = distance()
    finetune(pruned, batches, recipe=FinetuneRecipe(epochs=60, learning_rate=3e-3))
    assert distance() < before / 2


@pytest.mark.families
@pytest.mark.parametrize(("make", "side"), [(make_yolos, 32), (make_timm_detr, 64)])
def test_folder_of_transformers_opens_by_its_task(
    make: Callable[[], transformers.PreTrainedModel], side: int, tmp_path: Path
) -> None:
    network, images = make(), make_images(side)
    network.save_pretrained(tmp_path / "base")
    transformers.DetrImageProcessor(size={"height": side, "width": side}).save_pretrained(tmp_path / "base")
    opened = load_base(str(tmp_path / "base"), tasks=TASK_FORMS).model
    with torch.no_grad():
        assert are_equal(opened(images).outputs, outputs_of(network, images))
