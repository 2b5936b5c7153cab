"""The uniform layout: equal blocks with widths checked by hand, and folders that stock transformers opens."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command_line import refuse
from helpers.fresh_python import FreshPython
from helpers.marks import one_of_each
from helpers.tiny_models import TIMM, make_base, make_images
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig

from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor, IsoPruneForImageClassification
from isoprune_hf.checkpoint.stock import stock_processor
from isoprune_hf.errors import BudgetError, CheckpointError, RecipeError, UnsupportedArchitectureError
from isoprune_hf.models import load_base
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.cutting.replay import replay_plan
from isoprune_hf.pruning.cutting.uniform import to_stock
from isoprune_hf.pruning.doctor import check_model, check_replay
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.prune import PruneResult, prune_model
from isoprune_hf.recipes import FinetuneRecipe, PruneRecipe
from isoprune_hf.reporting.model_card import build_model_card
from isoprune_hf.training.regularisation import regularised

LABELS = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel", 5: "fox", 6: "gnu"}
CLASSES = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassificationWithTeacher",
    "hf-vit": "ViTForImageClassification",
    "hf-deit": "DeiTForImageClassificationWithTeacher",
}
FAMILIES = tuple(CLASSES)
RATIOS = {"ratio": 0.5, "head_ratio": 0.25, "head_dim_ratio": 0.25, "round_to": 1}


@dataclass(frozen=True, eq=False)
class Made:
    """A base, the result of its uniform cut, and the folder of the result."""

    base: IsoPruneForImageClassification
    result: PruneResult
    folder: Path
    images: torch.Tensor
    logits: torch.Tensor


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    root, known = tmp_path_factory.mktemp("uniform"), {}

    def give(family: str) -> Made:
        if family not in known:
            base = make_base(family, root, labels=len(LABELS))
            base.config.id2label = LABELS
            base.config.label2id = {name: index for index, name in LABELS.items()}
            name, args = TIMM.get(family, (str(root / family), None))
            result = prune_model(base, PruneRecipe(criterion="l1", layout="uniform", **RATIOS))
            folder = root / "folders" / family
            result.save(folder, load_base(name, False, model_args=args).processor)
            images = make_images(base)
            with torch.no_grad():
                known[family] = Made(base, result, folder, images, result.model(images).logits)
        return known[family]

    return give


def cut_by_hand(made: Made) -> torch.Tensor:
    """Return the logits of the base with removed elements at zero: no tensor becomes smaller."""
    base, plan = make_copy(made.base), made.result.plan
    with torch.no_grad():
        for name, kept in plan.kept.items():
            if not name.endswith("mlp.fc1"):
                continue
            gone = [c for c in range(base.model.get_submodule(name).out_features) if c not in kept]
            base.model.get_submodule(name.replace("fc1", "fc2")).weight[:, gone] = 0
        return base(made.images).logits


def make_copy(model: IsoPruneForImageClassification) -> IsoPruneForImageClassification:
    return type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_keeps_requested_widths(family: str, made) -> None:
    sample = made(family)
    config, mlp = sample.result.model.model.config, 128 if family in TIMM else 64
    # 32 channels, 4 heads of 8 dims, and the MLP: half of the channels, one head, and two dims of each head leave.
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (16, 3, 6)
    assert (config.intermediate_size, config.num_hidden_layers) == (mlp // 2, 2)
    plan = sample.result.plan
    assert sorted(len(kept) for kept in plan.kept.values()) == sorted([16, 18, 18, mlp // 2, mlp // 2])
    assert [len(heads) for heads in plan.heads.values()] == [3, 3]
    assert plan.settings["layout"] == "uniform"


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_channels_of_each_block_are_best_scored(family: str, made) -> None:
    sample = made(family)
    found = [(name, kept) for name, kept in sample.result.plan.kept.items() if name.endswith("mlp.fc1")]
    for name, kept in found:
        scores = sample.result.scores.scores[name]
        assert set(kept) == set(scores.topk(len(scores) // 2).indices.tolist())
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_model_equals_base_without_removed_channels(family: str, tmp_path: Path) -> None:
    base = make_base(family, tmp_path)
    recipe = PruneRecipe(criterion="l1", layout="uniform", include=["*.mlp.fc1"], round_to=1)
    result = prune_model(base, recipe)
    images = make_images(base)
    with torch.no_grad():
        found = result.model(images).logits
    expected = cut_by_hand(Made(base, result, tmp_path, images, found))
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [{"target_macs": "50%"}, {"target_params": "60%"}])
def test_equal_widths_meet_budget_from_below(family: str, budget: dict, tmp_path: Path) -> None:
    base = make_base(family, tmp_path)
    result = prune_model(base, PruneRecipe(criterion="l1", layout="uniform", round_to=1, **budget))
    key, share = next((name.removeprefix("target_"), int(text[:-1]) / 100) for name, text in budget.items())
    counted = getattr(count_cost(result.model), key)
    assert counted == getattr(result.pruned_cost, key)
    assert 0.985 * share < counted / getattr(count_cost(base), key) <= share
    assert len({len(k) for n, k in result.plan.kept.items() if n.endswith("fc1")}) == 1


def test_a_removed_block_makes_the_stock_model_shallower(made, tmp_path: Path) -> None:
    base = make_base("deit", tmp_path)
    name = "blocks.0"
    result = prune_model(base, PruneRecipe(criterion="l1", layout="uniform", remove_blocks=[name], round_to=1))
    assert result.model.model.config.num_hidden_layers == 1
    expected = base.model.blocks[1].norm1.weight[list(result.plan.kept["patch_embed.proj"])]
    assert torch.equal(result.model.model.deit.layers[0].layernorm_before.weight, expected)


OPEN_ELSEWHERE = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline
root, answers = Path(sys.argv[1]), {}
for folder in sorted((root / "folders").iterdir()):
    tensors = load_file(root / "expected" / f"{folder.name}.safetensors")
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        difference = (model(tensors["images"]).logits - tensors["logits"]).abs().max() / tensors["logits"].abs().max()
    classify = pipeline("image-classification", model=str(folder))
    model.save_pretrained(root / "again" / folder.name)
    again = AutoModelForImageClassification.from_pretrained(root / "again" / folder.name)
    answers[folder.name] = {
        "difference": difference.item(),
        "class": type(model).__name__,
        "module": type(model).__module__,
        "pipeline": classify(str(root / "picture.png"), top_k=7),
        "processor": type(AutoImageProcessor.from_pretrained(folder)).__name__,
        "again": all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items()),
        "python": [path.name for path in folder.glob("*.py")],
    }
PARTS = ("isoprune_hf", "timm")
answers["loaded"] = [name for name, module in sys.modules.items() if module and name.partition(".")[0] in PARTS]
(root / "answers.json").write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def elsewhere(
    made, fresh_python: FreshPython, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """Open the folders in one process that can import neither this package nor timm."""
    root = tmp_path_factory.mktemp("elsewhere")
    (root / "expected").mkdir()
    pixels = np.random.default_rng(3).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "picture.png")
    for family in FAMILIES:
        sample = made(family)
        (root / "folders").mkdir(exist_ok=True)
        (root / "folders" / family).symlink_to(sample.folder)
        save_file({"images": sample.images, "logits": sample.logits}, root / "expected" / f"{family}.safetensors")
    done = fresh_python.run(OPEN_ELSEWHERE, root, cwd=root, absent=["isoprune_hf", "timm", "torch_pruning"])
    assert done.returncode == 0, done.stderr
    return json.loads((root / "answers.json").read_text()), root


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_opens_folder_with_equal_logits(family: str, elsewhere) -> None:
    answers, _ = elsewhere
    assert answers["loaded"] == []
    answer = answers[family]
    assert answer["difference"] <= 1e-5
    assert answer["class"] == CLASSES[family] and answer["module"].startswith("transformers.models.")
    assert answer["python"] == [] and answer["again"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_pipeline_says_what_our_model_says(family: str, elsewhere) -> None:
    answers, root = elsewhere
    opened = load_base(str(root / "folders" / family))
    with torch.no_grad():
        pixels = opened.processor(Image.open(root / "picture.png"), return_tensors="pt").pixel_values
        expected = opened.model(pixels).logits.softmax(-1)[0]
    found = {answer["label"]: answer["score"] for answer in answers[family]["pipeline"]}
    assert found == pytest.approx({LABELS[i]: p.item() for i, p in enumerate(expected)}, abs=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("size", [{"shortest_edge": 36}, {"height": 36, "width": 36}])
def test_stock_processor_makes_equal_pixels_for_even_margins(mode: str, size: dict) -> None:
    ours = IsoImageProcessor(size=size, crop_size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6])
    stock = stock_processor(ours)
    assert type(stock).__module__.startswith("transformers.")
    rng = np.random.default_rng(0)
    for height, width in ((72, 72), (72, 80), (90, 36)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
        pixels = [processor(image, return_tensors="pt").pixel_values for processor in (ours, stock)]
        assert torch.equal(*pixels)


@pytest.mark.parametrize("array", [False, True])
def test_stock_processor_reads_grey_images(array: bool) -> None:
    ours = IsoImageProcessor(size={"shortest_edge": 32}, image_mean=[0.4], image_std=[0.2], do_center_crop=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 60), dtype=np.uint8))
    given = np.asarray(image)[None] if array else image
    expected = ours(image, return_tensors="pt").pixel_values
    assert torch.equal(stock_processor(ours)(given, return_tensors="pt").pixel_values, expected)


def test_uniform_layout_needs_grey_or_rgb_images(tmp_path: Path) -> None:
    ViTConfig(num_channels=4, image_size=16, patch_size=4).save_pretrained(tmp_path / "base")
    options = ["--prune.model", tmp_path / "base", "--prune.pretrained", "false", "--prune.layout", "uniform"]
    line = refuse("prune", *options, "--prune.criterion", "l1", "--prune.ratio", "0.5", "--output", tmp_path / "out")
    assert "prune.layout" in line and "4 channels" in line


def test_odd_margin_is_cropped_one_pixel_further() -> None:
    ours = IsoImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 35, 3), dtype=np.uint8))
    # (35 - 32) / 2 = 1.5: half to even is 2, rounded down it is 1.
    found = stock_processor(ours)(image, return_tensors="pt").pixel_values
    expected = torch.from_numpy(np.array(image)[:, 1:33]).permute(2, 0, 1)[None] / 255
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(ours(image, return_tensors="pt").pixel_values, expected, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_folder_opens_as_pruned_folder(family: str, made) -> None:
    sample = made(family)
    opened = load_base(str(sample.folder)).model
    assert (opened.config.layout, opened.config.stage, opened.config.structure) == ("uniform", "pruned", None)
    for name in ("cost", "source", "recipe"):
        assert getattr(opened.config, name) == getattr(sample.result.model.config, name)
    assert opened.config.id2label == LABELS
    with torch.no_grad():
        assert torch.allclose(opened(sample.images).logits, sample.logits, atol=1e-5)


@pytest.mark.parametrize("family", one_of_each(FAMILIES, "vit"))
def test_the_doctor_finds_nothing_and_replays_the_plan(family: str, made) -> None:
    sample = made(family)
    opened, plan = load_base(str(sample.folder)), PruningPlan.load(sample.folder)
    findings = [*check_model(opened.model, opened.processor, plan), check_replay(opened.model, sample.base, plan)]
    assert {finding.verdict for finding in findings} == {"ok"}, findings
    name = next(name for name in plan.kept if name.endswith("fc1"))
    other = replace(plan, kept={**plan.kept, name: plan.kept[name][1:]})
    found = {finding.check: finding for finding in check_model(opened.model, opened.processor, other)}
    assert found["structure"].verdict == "FAIL" and name in found["structure"].text
    name = next(iter(plan.heads))
    other = replace(plan, heads={**plan.heads, name: plan.heads[name][:2]}, kept={**plan.kept, name: tuple(range(12))})
    found = {finding.check: finding for finding in check_model(opened.model, opened.processor, other)}
    assert found["structure"].text.startswith(f"the plan keeps 2 heads of 6 dims in {name}, the config has (3, 6)")


def test_a_replayed_plan_gives_the_stock_tensors_again(made) -> None:
    sample = made("deit")
    again, plan = replay_plan(sample.base, sample.result.plan)
    assert plan == sample.result.plan and again.config.layout == "uniform"
    expected = sample.result.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_card_of_uniform_folder_needs_only_transformers(made) -> None:
    card = str(build_model_card(made("deit").folder))
    assert "standard transformers model" in card and "The layout is uniform" in card
    assert "images of 3 \N{MULTIPLICATION SIGN} 16 \N{MULTIPLICATION SIGN} 16" in card
    assert "trust_remote_code" not in card and "import isoprune_hf" not in card


def test_stochastic_depth_finds_both_branches_of_block(made) -> None:
    model = make_copy(made("hf-vit").result.model)
    with regularised(model, FinetuneRecipe(drop_path=0.2)):
        assert [layer.dropout.drop_prob for layer in model.model.vit.layers] == [0.0, 0.2]
    assert all(isinstance(layer.dropout, torch.nn.Dropout) for layer in model.model.vit.layers)


def test_uniform_model_cut_again_keeps_first_base(made) -> None:
    first = made("deit").result.model
    again = prune_model(first, PruneRecipe(criterion="l1", ratio=0.25, layout="uniform", round_to=1))
    assert (again.model.model.config.hidden_size, again.model.model.config.intermediate_size) == (12, 48)
    assert again.model.config.source == first.config.source
    assert again.model.config.cost["base"] == first.config.cost["base"]
    own = prune_model(first, PruneRecipe(criterion="l1", ratio=0.25, round_to=1))
    assert own.model.config.layout == "per-layer" and own.model.config.structure["shapes"]


def test_another_family_is_refused(tmp_path: Path) -> None:
    recipe = PruneRecipe(criterion="l1", layout="uniform")
    with pytest.raises(RecipeError, match=r"prune\.layout uniform .*ResNet"):
        prune_model(make_base("resnet", tmp_path), recipe)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ({"qk_norm": True}, "norms in its attention"),
        ({"reg_tokens": 2}, "register tokens"),
        ({"global_pool": "avg"}, "pooling 'avg'"),
        ({"pre_norm": True}, "a norm before the blocks"),
    ],
)
def test_vit_with_nonstandard_part_is_refused(args: dict, part: str) -> None:
    model = load_base("timm/vit_tiny_patch16_224", False, model_args={**TIMM["deit"][1], **args}).model
    with pytest.raises(RecipeError, match=f"this VisionTransformer has {part}"):
        prune_model(model, PruneRecipe(criterion="l1", layout="uniform"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"exclude": ["blocks.0.mlp.fc1"]}, "prune.include or prune.exclude treats blocks.0.mlp.fc1 and blocks.1.mlp"),
        ({"ratios": {"blocks.1.attn": 0.25}}, "prune.ratios treats blocks.0.attn and blocks.1.attn"),
        ({"scopes": {"blocks.1.mlp.fc1": "own"}}, "prune.scopes treats blocks.0.mlp.fc1 and blocks.1.mlp.fc1"),
    ],
)
def test_patterns_that_tell_blocks_apart_are_refused(settings: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        prune_model(make_base("deit", tmp_path), PruneRecipe(criterion="l1", layout="uniform", **settings))


def test_a_model_that_was_cut_unevenly_is_refused(tmp_path: Path) -> None:
    uneven = prune_model(make_base("deit", tmp_path), PruneRecipe(criterion="l1", ratio=0.4, round_to=1)).model
    with pytest.raises(RecipeError, match=r"prune\.layout uniform .*blocks\.0\.attn "):
        prune_model(uneven, PruneRecipe(criterion="l1", layout="uniform"))
    with pytest.raises(CheckpointError, match=r"layout uniform: .*head dims"):
        to_stock(uneven)


def test_budget_below_floors_is_refused_before_scoring(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="cannot be reached"):
        prune_model(make_base("deit", tmp_path), PruneRecipe(criterion="l1", layout="uniform", target_macs="1%"))


def test_stock_model_with_different_logits_is_refused(made, tmp_path: Path) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    model = make_base("deit", tmp_path)
    model.model.pos_drop = Doubled()
    with pytest.raises(UnsupportedArchitectureError, match="returns logits that differ by"):
        to_stock(model)


def test_random_weights_of_a_pruned_folder_are_refused(made) -> None:
    with pytest.raises(RecipeError, match="is pruned"):
        load_base(str(made("vit").folder), False)


def test_an_entry_that_is_no_mapping_is_refused(made, tmp_path: Path) -> None:
    for file in made("vit").folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    for entry, said in (([1], "config.isoprune"), ({"cost": 3}, "config.cost")):
        (tmp_path / "config.json").write_text(json.dumps({**values, "isoprune": entry}))
        with pytest.raises(CheckpointError, match=said):
            load_base(str(tmp_path))
