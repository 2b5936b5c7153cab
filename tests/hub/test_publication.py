"""What is sent: no path of this machine, a card for the repository, figures for leaderboards."""

import hashlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from helpers.hub_server import Hub
from huggingface_hub import ModelCard

from isoprune_hf.hub.base_license import find_base_license
from isoprune_hf.hub.push import describe_push, push_folder
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.reporting.card_metadata import License
from isoprune_hf.reporting.model_card import build_model_card

SECRET = "/home/alice/private"


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_unedited_card_is_built_for_the_repository(folder: Path, hub: Hub) -> None:
    (folder / "README.md").write_text(str(build_model_card(folder)))
    push_folder(folder, "user/tiny")
    sent = hub.files["user/tiny"]["README.md"].decode()
    assert sent == str(build_model_card(folder, repo="user/tiny"))
    assert 'model="user/tiny"' in sent and 'model="tiny"' not in sent
    edited = (folder / "README.md").read_text() + "mine\n"
    (folder / "README.md").write_text(edited)
    assert "README.md was edited" in describe_push(folder, "user/tiny")
    push_folder(folder, "user/tiny")
    assert hub.files["user/tiny"]["README.md"].decode() == edited


@pytest.mark.parametrize("is_stock", [False, True])
def test_no_pushed_file_holds_a_path(folder: Path, hub: Hub, is_stock: bool) -> None:
    fields = {
        "source": {"name": f"{SECRET}/base", "pretrained": True, "weights": f"{SECRET}/mine.pt"},
        "recipe": {"prune": {"model": f"{SECRET}/base"}, "data": {"dataset": f"{SECRET}/photos"}},
    }
    labels = {"0": "hamster/gerbil cage", "1": "/m/01g317"}
    change(
        folder,
        id2label=labels,
        image_size=[3, 8, 8],
        _name_or_path=f"{SECRET}/base",
        **({"isoprune": fields} if is_stock else fields),
    )
    if is_stock:
        change(folder, model_type="vit")
    plan = PruningPlan({}, {}, notes=(f"left whole: {SECRET}/net.py",), settings={"scores": f"{SECRET}/scores"})
    (folder / "pruning_plan.json").write_text(plan.to_json())
    times = {"milliseconds": {"pruned": 3.0}, "device": "chip 1/2", "log": f"see {SECRET}/log", "batch_size": 1}
    (folder / "speed.json").write_text(json.dumps(times))
    (folder / "preprocessor_config.json").write_text(json.dumps({"place": f"{SECRET}/base"}))
    before = contents(folder)
    push_folder(folder, "user/tiny")
    assert contents(folder) == before
    sent = hub.files["user/tiny"]
    assert not [name for name, content in sent.items() if b"alice" in content]
    config = json.loads(sent["config.json"])
    assert (config["id2label"], config["_name_or_path"]) == (labels, "./base")
    assert (config["isoprune"] if is_stock else config)["recipe"]["data"]["dataset"] == "./photos"
    assert json.loads(sent["speed.json"])["device"] == "chip 1/2"
    assert PruningPlan.from_json(sent["pruning_plan.json"].decode()).settings == {"scores": "./scores"}
    card = sent["README.md"].decode()
    digest = hashlib.sha256(sent["pruning_plan.json"]).hexdigest()
    assert digest in card and "hamster/gerbil cage" in card


def test_files_without_paths_are_sent_as_they_are(folder: Path, hub: Hub) -> None:
    change(folder, source={"name": "timm/resnet50.a1_in1k", "pretrained": True})
    push_folder(folder, "user/tiny")
    assert hub.files["user/tiny"]["config.json"] == (folder / "config.json").read_bytes()


def test_figures_are_sent_for_the_leaderboard(folder: Path, hub: Hub) -> None:
    change(folder, recipe={"data": {"dataset": "own/flowers", "eval_split": "test"}})
    push_folder(folder, "user/tiny")
    (entry,) = yaml.safe_load(hub.files["user/tiny"][".eval_results/flowers.yaml"])
    assert (entry["dataset"], entry["value"]) == ({"id": "own/flowers", "task_id": "default"}, 50.0)
    assert ".eval_results/flowers.yaml" in describe_push(folder, "user/tiny")


def put_base(hub: Hub, card: str) -> dict[str, Any]:
    hub.files["own/base"], hub.heads["own/base", "main"] = {"README.md": card.encode()}, "0" * 40
    return {"source": {"name": "own/base", "pretrained": True}, "base": {"library": "transformers"}}


def test_license_is_that_of_the_base(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    config = put_base(hub, "---\nlicense: other\nlicense_name: terms\nlicense_link: LICENSE\n---\n# base\n")
    change(folder, **config)
    assert "license: " not in describe_push(folder, "user/tiny")  # a dry run asks nobody
    push_folder(folder, "user/tiny")
    data = ModelCard(hub.files["user/tiny"]["README.md"].decode()).data
    assert (data.license, data.license_name, data.base_model) == ("other", "terms", "own/base")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_base_license(config) == License("other", "terms", "LICENSE")
    assert "license: other" in describe_push(folder, "user/tiny")


@pytest.mark.parametrize("card", ["no metadata", "---\nlicense: [mit]\n---\n", "---\n{\n---\n", None])
def test_unreadable_license_is_left_out(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: str | None
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    config = put_base(hub, card or "")
    if card is None:
        hub.files["own/base"].clear()
    assert find_base_license(config) is None
