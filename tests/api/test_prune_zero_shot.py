"""The tower of images is pruned inside a network that compares images with texts; the tower of texts stays whole."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers.clip_networks import make_clip, make_processor, make_siglip
from helpers.fresh_python import FreshPython
from helpers.marks import one_of_each
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForZeroShotImageClassification, pipeline

from isoprune_hf import FinetuneRecipe, IsoPruneForZeroShotImageClassification, finetune, prune

NETWORKS = {"CLIP": make_clip, "SigLIP": make_siglip}
CUT = {"target_macs": "60%", "round_to": 1, "criterion": "gate_fisher"}
LABELS = ["animal", "object", "red"]
SCRIPT = """
import json, sys, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForZeroShotImageClassification, pipeline
folder, image = sys.argv[1:]
model = AutoModelForZeroShotImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
given = load_file(f"{folder}/../given.safetensors")
with torch.no_grad():
    out = model(**given)
names = ("image_embeds", "logits_per_image")
save_file({name: out[name].contiguous() for name in names}, f"{folder}/../found.safetensors")
match = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)
answers = match(Image.open(image), candidate_labels=["animal", "object", "red"])
print(json.dumps([answers, bool(sys.modules.get("isoprune_hf"))]))
"""


def inputs(side: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(3, 14, (3, 6), generator=generator)
    texts[:, -1] = 2  # the end of a text
    return {"pixel_values": torch.randn(8, 3, side, side, generator=generator), "input_ids": texts}


@pytest.mark.parametrize("name", one_of_each(NETWORKS, "CLIP"))
def test_logits_reload_and_texts_stay(name: str, tmp_path: Path) -> None:
    network, given = NETWORKS[name](), inputs()
    images = given["pixel_values"]
    with torch.no_grad():
        dense = network(**given)
    pruned = prune(network, [images], **CUT)
    assert pruned.loss == "features with random signs" and pruned.pruned_cost.macs <= 0.6 * pruned.base_cost.macs
    texts = [module for part, module in network.named_children() if part.startswith("text_")]
    count = sum(value.numel() for module in texts for value in module.parameters())
    assert [note for note in pruned.plan.notes if f"{count:,} of " in note and "text_model" in note]
    assert type(network).__name__ == type(pruned.model).__name__ and isinstance(pruned.model, type(network))
    with torch.no_grad():
        cut, alone = pruned.model(**given), pruned.model(images).image_embeds
        assert torch.equal(network(**given).logits_per_image, dense.logits_per_image)  # the caller's stays as it is
    assert torch.equal(cut.text_embeds, dense.text_embeds) and cut.image_embeds.shape == dense.image_embeds.shape
    torch.testing.assert_close(alone, cut.image_embeds)
    assert torch.equal(pruned.model.logit_scale, network.logit_scale)
    changed = {
        key for key, value in pruned.model.state_dict().items() if value.shape != network.state_dict()[key].shape
    }
    assert changed and all(key.startswith("vision_model.") for key in changed)
    pruned.save(tmp_path / "folder", make_processor())
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["base"]["task"] == "zero-shot-image-classification" and config["model_type"] == "isoprune"
    again, info = AutoModelForZeroShotImageClassification.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    with torch.no_grad():
        reopened = again.eval()(**given)
        features = again.get_image_features(images).pooler_output
    assert type(again) is IsoPruneForZeroShotImageClassification and not any(info.values())
    assert all(torch.equal(reopened[key], cut[key]) for key in ("image_embeds", "logits_per_image", "text_embeds"))
    torch.testing.assert_close(torch.nn.functional.normalize(features), cut.image_embeds)


@pytest.mark.parametrize("name", one_of_each(NETWORKS, "SigLIP"))
def test_pipeline_answers_as_that_of_the_base(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]()
    pruned = prune(network, inputs()["pixel_values"], **{**CUT, "criterion": "l1"})
    pruned.save(tmp_path / "folder", make_processor())
    processor = make_processor()
    stock = pipeline(
        "zero-shot-image-classification",
        model=pruned.model,  # whose config is that of the base, by which the pipeline reads texts
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
    )
    image = Image.new("RGB", (20, 24), "red")
    ours = pipeline("zero-shot-image-classification", model=str(tmp_path / "folder"))
    assert ours(image, candidate_labels=LABELS) == stock(image, candidate_labels=LABELS)


def test_folder_opens_without_the_package(tmp_path: Path, fresh_python: FreshPython) -> None:
    given = inputs()
    pruned = prune(make_clip(), given["pixel_values"], **{**CUT, "criterion": "l1"})
    pruned.save(tmp_path / "folder", make_processor())
    save_file(given, tmp_path / "given.safetensors")
    Image.new("RGB", (20, 24), "red").save(tmp_path / "image.png")
    done = fresh_python.run(SCRIPT, tmp_path / "folder", tmp_path / "image.png", absent=["isoprune_hf"])
    assert done.returncode == 0, done.stderr
    answers, has_package = json.loads(done.stdout.splitlines()[-1])
    ours = pipeline("zero-shot-image-classification", model=str(tmp_path / "folder"))
    assert not has_package and answers == ours(str(tmp_path / "image.png"), candidate_labels=LABELS)
    found = load_file(tmp_path / "found.safetensors")
    with torch.no_grad():
        cut = pruned.model(**given)
    assert all(torch.equal(value, cut[key]) for key, value in found.items())


def test_finetuning_brings_embeddings_nearer() -> None:
    network, images = make_clip(), inputs()["pixel_values"]
    pruned = prune(network, [images], **{**CUT, "criterion": "l1"}, reconstruct="none", rotate=False)
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(network.get_image_features(images).pooler_output)

    def distance() -> float:
        with torch.no_grad():
            return float((pruned.model(images).image_embeds - wanted).square().sum())

    before, texts = distance(), pruned.model.text_projection.weight.clone()
    finetune(pruned, [images], recipe=FinetuneRecipe(epochs=20, learning_rate=3e-3))
    assert distance() < 0.7 * before and torch.equal(pruned.model.text_projection.weight, texts)


@pytest.mark.families
@pytest.mark.parametrize("kind", ["ChineseCLIP", "AltCLIP", "MetaClip2", "CLIPSeg", "Blip"])
def test_other_networks_of_two_towers_reload(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {name: getattr(make_clip().config, name).to_dict() for name in ("vision_config", "text_config")}
    for part in settings.values():
        part.pop("model_type"), part.pop("projection_dim", None)
    config = getattr(transformers, f"{kind}Config")(**settings, projection_dim=24)
    network, given = getattr(transformers, f"{kind}Model")(config).eval(), inputs()
    pruned = prune(network, [given["pixel_values"]], **{**CUT, "criterion": "l1"})
    pruned.save(tmp_path / "folder")
    again = AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        assert torch.equal(again(**given).logits_per_image, pruned.model(**given).logits_per_image)
