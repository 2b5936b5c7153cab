"""Pushing: the real client against a Hub in this process."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import Hub, serve_hub
from safetensors.torch import save_file

from isoprune_hf.errors import CheckpointError, HubError, RecipeError
from isoprune_hf.publishing.hub import push_folder

TOKEN = "hf_canary0123456789"
PUSHED = ["README.md", "config.json", "classes.png", "metrics.json", "model.safetensors", "modeling_isoprune.py"]
PUSHED += ["preprocessor_config.json", "pruning_plan.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    cost = {"base": {"macs": 4_000_000, "params": 2_000}, "pruned": {"macs": 1_000_000, "params": 500}}
    config = {"model_type": "isoprune", "stage": "pruned", "cost": cost, "id2label": {"0": "cat", "1": "dog"}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.arange(6.0).reshape(2, 3)}, folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "pruning_plan.json").write_text('{"kept": {}}')
    (folder / "metrics.json").write_text('{"pruned": {"top1": 0.5}}')
    (folder / "modeling_isoprune.py").write_text("# code\n")
    (folder / "classes.png").write_bytes(b"\x89PNG\r\n")
    (folder / "checkpoints" / "state.json").write_text("{}")
    for name in ("optimizer.pt", ".env", ".hidden.json", "model.tmp.safetensors", "notes.txt"):
        (folder / name).write_text("stays here")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_hub() as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(huggingface_hub.constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"))
        yield hub


def run_client(folder: Path, url: str, home: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    environment |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_all_files_of_the_model_arrive_in_one_commit_and_the_token_nowhere(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from isoprune_hf.publishing.hub import push_folder; print(push_folder(sys.argv[1], 'user/tiny'))"
    )
    with serve_hub() as hub:
        result = run_client(folder, hub.url, tmp_path / "home", code)
    assert result.returncode == 0, result.stderr
    assert [commit["paths"] for commit in hub.commits] == [sorted(PUSHED)]
    assert {name: (folder / name).read_bytes() for name in PUSHED} == hub.files["user/tiny"]
    assert result.stdout.strip().startswith(f"{hub.url}/user/tiny/commit/")
    assert any(header == f"Bearer {TOKEN}" for _, _, header in hub.requests)
    assert TOKEN not in result.stdout + result.stderr
    assert not any(TOKEN.encode() in content for content in hub.files["user/tiny"].values())
    assert b"user/tiny" in hub.files["user/tiny"]["README.md"]


def test_an_own_card_is_kept_and_a_second_push_without_changes_makes_no_commit(folder: Path, hub: Hub) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    first = push_folder(folder, "user/tiny", private=True)
    assert hub.files["user/tiny"]["README.md"] == b"---\nlicense: mit\n---\nmine\n"
    assert hub.private == {"user/tiny": True}
    assert push_folder(folder, "user/tiny") == first
    assert len(hub.commits) == 1


def test_a_pushed_file_reads_back_equal(folder: Path, hub: Hub, tmp_path: Path) -> None:
    push_folder(folder, "user/tiny")
    path = huggingface_hub.hf_hub_download("user/tiny", "model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, ["does not know this login", "hf auth login", "HF_TOKEN"]),
        (403, ["forbids this login to write to user/tiny", "HF_TOKEN"]),
        (404, ["has no user/tiny", "check the name"]),
        (429, ["too many requests"]),
        (418, ["status 418"]),
    ],
)
def test_a_refusal_is_one_clear_line_without_the_token(folder: Path, hub: Hub, status: int, words: list[str]) -> None:
    hub.refuse = status
    with pytest.raises(HubError) as caught:
        push_folder(folder, "user/tiny")
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert hub.commits == []


def test_no_login_is_an_error_before_the_first_request(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"^no login for the Hub: log in with `hf auth login`, or set HF_TOKEN.*$"):
        push_folder(folder, "user/tiny")
    assert hub.requests == []


def test_no_network_is_one_line(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub() as closed:
        pass
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed.url)
    with pytest.raises(HubError, match=r"^the Hub cannot be reached \(ConnectError\): check the network.*$"):
        push_folder(folder, "user/tiny")


@pytest.mark.parametrize(("damage", "words"), [("\x0bx", "cannot be reached"), ("\u20ac", "that no token has")])
def test_a_damaged_token_is_not_quoted(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, damage: str, words: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN + damage)
    with pytest.raises(HubError, match=words) as caught:
        push_folder(folder, "user/tiny")
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_a_card_with_damaged_metadata_is_refused_before_any_upload(folder: Path, hub: Hub) -> None:
    (folder / "README.md").write_text("no metadata\n")
    with pytest.raises(HubError, match=r"the Hub cannot take tiny: Invalid metadata in README\.md\. - no metadata"):
        push_folder(folder, "user/tiny")
    assert hub.commits == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_folder_without_a_needed_file_is_refused(folder: Path, hub: Hub, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        push_folder(folder, "user/tiny")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("text", "words"), [('{"model_type": "vit"}', "'vit'"), ("[]", "None"), ("{", "config.json is no JSON")]
)
def test_a_folder_of_another_model_is_refused(folder: Path, hub: Hub, text: str, words: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        push_folder(folder, "user/tiny")
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "user/", "/tiny", "user/ti ny", "../tiny"])
def test_a_repo_is_user_and_name(folder: Path, hub: Hub, repo: str) -> None:
    with pytest.raises(RecipeError, match="must look like user/name"):
        push_folder(folder, repo)
    assert not (folder / "README.md").exists()
