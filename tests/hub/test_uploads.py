"""Uploads of stages during training and at its end, to a Hub in this process."""

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers.command_line import isoprune, leftovers, refuse, succeed
from helpers.hub_server import COMMIT, TOKEN, Fault, Hub
from helpers.pruned_models import LABELS, Pruned
from PIL import Image

from isoprune_hf.errors import HubError
from isoprune_hf.hub.push import push_folder
from isoprune_hf.hub.uploads import Uploads

FILES = ["README.md", "config.json", "model.safetensors", "modeling_isoprune.py", "preprocessor_config.json"]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for label in LABELS.values():
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / label / f"{number}.png")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield tmp_path / "images"
    datasets.enable_progress_bars()


@pytest.mark.families
def test_training_uploads_checkpoints_and_result_without_changing_weights(
    pruned: Callable[[str], Pruned],
    images: Path,
    hub: Hub,
    tmp_path: Path,
) -> None:
    command = ["finetune", "--model", pruned("vit").folder, "--data.dataset", images, "--finetune.epochs", "4"]
    command += ["--finetune.batch_size", "7", "--finetune.teacher", "none"]  # the base in memory was changed
    succeed(*command, "--output", tmp_path / "alone")
    assert hub.requests == []
    pushing = ["--push_to_hub", "user/tiny", "--push_every", "3"]
    said = succeed(*command, "--output", tmp_path / "out", *pushing)
    assert said.endswith(f"It is at {hub.url}/user/tiny/commit/{hub.heads['user/tiny', 'main']}\n")
    assert [(commit["branch"], commit["summary"]) for commit in hub.commits] == [
        ("training", "Upload the checkpoint of epoch 3"),
        ("main", "Upload pruned model"),
    ]
    assert sorted(hub.branches["user/tiny", "training"]) == FILES
    on_the_way = hub.branches["user/tiny", "training"]["model.safetensors"]
    assert len(on_the_way) == len(hub.files["user/tiny"]["model.safetensors"])
    assert on_the_way not in (hub.files["user/tiny"]["model.safetensors"], b"")
    for name in ("model.safetensors", "metrics.json"):
        assert hub.files["user/tiny"][name] == (tmp_path / "out" / name).read_bytes()
    texts = hub.files["user/tiny"]["config.json"].decode(), (tmp_path / "out" / "config.json").read_text()
    assert [str(tmp_path) in text for text in texts] == [False, True]
    sent, kept = map(json.loads, texts)
    assert [name for name in kept if kept[name] != sent[name]] == ["recipe"]
    assert (tmp_path / "alone" / "model.safetensors").read_bytes() == hub.files["user/tiny"]["model.safetensors"]
    assert leftovers(tmp_path) == []
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    # The same line again trains nothing, and sends what is not there yet.
    del hub.files["user/tiny"]["metrics.json"]
    succeed(*command, "--output", tmp_path / "out", *pushing)
    assert [commit["paths"] for commit in hub.commits[2:]] == [["metrics.json"]]


def test_pruned_model_is_uploaded(pruned: Callable[[str], Pruned], hub: Hub, tmp_path: Path) -> None:
    base = ["--prune.model", pruned("vit").folder, "--prune.criterion", "l1", "--prune.ratio", "0.2"]
    succeed("prune", *base, "--output", tmp_path / "out", "--push_to_hub", "user/tiny")
    assert hub.files["user/tiny"]["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    hub.faults.append(Fault("POST", COMMIT, 403))
    line = refuse("prune", *base, "--output", tmp_path / "two", "--push_to_hub", "user/tiny")
    assert f"`isoprune push {tmp_path / 'two'} --repo user/tiny`" in line
    assert (tmp_path / "two" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--push_to_hub", "tiny"], "user/name, got 'tiny'"),
        (["--push_every", "1"], "push_every"),
        (["--push_to_hub", "user/tiny", "--push_every", "0"], "push_every"),
    ],
)
def test_contradicting_push_options_are_refused_before_work(
    hub: Hub,
    tmp_path: Path,
    flags: list[str],
    words: str,
) -> None:
    line = refuse("finetune", "--model", "nowhere", "--data.dataset", "digits", "--output", tmp_path / "out", *flags)
    assert words in line
    assert (hub.requests, list(tmp_path.iterdir())) == ([], [])


def test_missing_login_is_reported_before_training(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    command = ["finetune", "--model", "nowhere", "--data.dataset", "digits", "--output", tmp_path / "out"]
    assert "hf auth login" in refuse(*command, "--push_to_hub", "user/tiny")
    assert list(tmp_path.iterdir()) == []


def test_upload_runs_in_background_with_offered_files(
    folder: Path,
    hub: Hub,
    caplog: pytest.LogCaptureFixture,
) -> None:
    uploads, offered = Uploads("user/tiny", 1), (folder / "model.safetensors").read_bytes()
    hub.gate.clear()  # the Hub accepts no file until it is set
    uploads.offer(folder, 1)
    assert threading.active_count() > 1 and hub.commits == []
    uploads.offer(folder, 2)
    assert "user/tiny: epoch 2 is not uploaded" in caplog.text
    (folder / "model.safetensors").rename(folder / "old")  # as when a folder is replaced
    (folder / "model.safetensors").write_bytes(b"of epoch 2")
    hub.gate.set()
    (folder / "model.safetensors").write_bytes(offered)
    uploads.finish(folder)
    assert [commit["summary"] for commit in hub.commits] == ["Upload the checkpoint of epoch 1", "Upload pruned model"]
    assert hub.branches["user/tiny", "training"]["model.safetensors"] == offered
    assert leftovers(folder.parent) == []


def test_failed_upload_is_a_warning(folder: Path, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    uploads = Uploads("user/tiny", 2)
    hub.faults.append(Fault("POST", "/api/models/user/tiny/commit/training", 403))
    uploads.offer(folder, 1)  # not due
    uploads.offer(folder, 2)
    uploads.finish(folder)
    assert "epoch 2 was not uploaded" in caplog.text and caplog.text.count("was not uploaded") == 1
    assert [commit["branch"] for commit in hub.commits] == ["main"]


# Log lines and collections


def test_each_retry_is_logged(folder: Path, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.faults += [
        Fault("POST", COMMIT, 429, headers={"Retry_After": "17"}),
        Fault("POST", "/api/repos/create", "drop"),
    ]
    caplog.set_level(logging.WARNING)
    push_folder(folder, "user/tiny")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("isoprune_hf")] == [
        "the Hub cannot be reached (RemoteProtocolError): retrying in 1 s",
        "the Hub returned status 429: retrying in 17 s",
    ]


def test_model_is_added_to_collection_once(folder: Path, hub: Hub) -> None:
    slug = "user/small-models-64f9a55bb3115b4f513ec026"
    hub.collections[slug] = ["user/other"]
    for _ in range(2):
        push_folder(folder, "user/tiny", collection=slug)
    assert hub.collections == {slug: ["user/other", "user/tiny"]}
    with pytest.raises(HubError, match=r"collection user/none"):
        push_folder(folder, "user/tiny", collection="user/none")
    assert len(hub.commits) == 1
    line = refuse("push", folder, "--repo", "user/tiny", "--collection", "https://hf.co/collections/user/a")
    assert "user/title-id, got 'https://hf.co/collections/user/a'" in line
    listed = isoprune(
        "push", folder, "--repo", "user/tiny", "--collection", slug, "--dry_run", "true", "--check", "false"
    )
    assert listed.out.splitlines()[0].endswith(f"to branch main, collection {slug}; nothing was sent")


def test_documented_lines_create_the_collection(
    folder: Path,
    hub: Hub,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = Path(__file__).parents[2]
    (lines,) = re.findall(r"```python\n(.*?)```", (root / "model_cards" / "README.md").read_text(), re.S)
    lines = lines.replace("HfApi()", f"HfApi(endpoint={hub.url!r}, token={TOKEN!r})")
    for name in ("swin_4.5g", "deit_0.6g"):
        push_folder(folder, f"user/{name}")
    monkeypatch.chdir(root)
    for _ in range(2):
        exec(lines, {})
        slug = capsys.readouterr().out.split()[-1]
        assert hub.collections == {slug: ["user/deit_0.6g", "user/swin_4.5g"]}
    assert slug.startswith("user/isomorphic-pruning-")
