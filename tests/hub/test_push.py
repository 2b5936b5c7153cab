"""Pushes of the real client to a Hub in this process."""

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import pytest
import torch
from helpers.command_line import contents, isoprune, refuse
from helpers.hub_server import COMMIT, TOKEN, Fault, Hub, serve_hub
from helpers.marks import one_of_each
from helpers.own_nets import OwnNet
from helpers.pruned_models import Pruned
from huggingface_hub.utils._http import default_client_factory
from PIL import Image
from transformers import pipeline

from isoprune_hf import prune
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification, code_that_ships
from isoprune_hf.errors import CheckpointError, HubError, RecipeError
from isoprune_hf.hub import waiting
from isoprune_hf.hub.push import describe_push, push_folder

PUSHED = ["README.md", "config.json", "classes.png", "metrics.json", "model.safetensors", "modeling_isoprune.py"]
PUSHED += ["preprocessor_config.json", "pruning_plan.json"]


def test_push_uploads_all_files_in_one_commit(folder: Path, hub: Hub) -> None:
    before = contents(folder)
    commit = push_folder(folder, "user/tiny")
    assert [commit["paths"] for commit in hub.commits] == [sorted(PUSHED)]
    assert {name: before.get(name) for name in PUSHED[1:]}.items() <= hub.files["user/tiny"].items()
    assert contents(folder) == before  # also without a card
    assert commit.startswith(f"{hub.url}/user/tiny/commit/")
    assert any(header == f"Bearer {TOKEN}" for _, _, header in hub.requests)
    assert not any(TOKEN.encode() in content for content in hub.files["user/tiny"].values())
    assert b"user/tiny" in hub.files["user/tiny"]["README.md"]


def test_result_of_prune_is_pushed(hub: Hub, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 5)
    result = prune(OwnNet(8), inputs, criterion="l1", ratio=0.5, round_to=2)
    with pytest.raises(CheckpointError, match="builder"):
        result.push_to_hub("user/own")
    result.push_to_hub("user/own", builder=OwnNet, arguments={"width": 8}, message="Half of OwnNet")
    assert [commit["summary"] for commit in hub.commits] == ["Half of OwnNet"]
    place = tmp_path / "cache"
    opened = IsoPruneForImageClassification.from_pretrained("user/own", builder=OwnNet, cache_dir=place)
    assert torch.equal(opened(inputs).logits, result.model(inputs))


def test_own_card_is_kept_and_repush_commits_nothing(folder: Path, hub: Hub) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    first = push_folder(folder, "user/tiny", private=True)
    assert hub.files["user/tiny"]["README.md"] == b"---\nlicense: mit\n---\nmine\n"
    assert hub.private == {"user/tiny": True}
    assert push_folder(folder, "user/tiny") == first
    assert len(hub.commits) == 1


def test_pushed_file_reads_back_equal(folder: Path, hub: Hub, tmp_path: Path) -> None:
    push_folder(folder, "user/tiny")
    path = huggingface_hub.hf_hub_download("user/tiny", "model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, ["login", "hf auth login", "HF_TOKEN"]),
        (403, ["user/tiny", "HF_TOKEN"]),
        (404, ["user/tiny", "check the name"]),
        (413, ["refuses the size", "user/tiny"]),
        (429, ["too many requests"]),
        (507, ["no room left", "user/tiny"]),
        (418, ["status 418"]),
    ],
)
def test_rejection_is_one_line_without_the_token(folder: Path, hub: Hub, status: int, words: list[str]) -> None:
    hub.refuse = status
    with pytest.raises(HubError) as caught:
        push_folder(folder, "user/tiny")
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.endswith(" (the Hub says: refused)")
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert hub.commits == []


def test_reason_of_server_is_harmless(folder: Path, hub: Hub) -> None:
    hub.faults += [Fault("POST", COMMIT, 403, content={"error": f"quota\n\x1b[2J {TOKEN} " + "x" * 999})]
    with pytest.raises(HubError) as caught:
        push_folder(folder, "user/tiny")
    reason = str(caught.value).partition(" (the Hub says: ")[2]
    assert reason.startswith("quota ?[2J [token] xxx") and len(reason) == 201


@pytest.mark.parametrize("content", [[], {"a": 1}, 3, None, "text", b"<html>", b"{", b"\xff", b""])
@pytest.mark.parametrize(
    "pattern", one_of_each(["/api/repos/create", ".*/preupload/main", ".*/info/lfs.*", COMMIT], COMMIT)
)
def test_answer_of_another_form_is_one_line(folder: Path, hub: Hub, pattern: str, content: object) -> None:
    hub.faults += [Fault("POST", pattern, 200, times=99, content=content)]
    try:
        push_folder(folder, "user/tiny")
    except HubError as error:
        assert "\n" not in str(error)
    else:
        assert pattern == "/api/repos/create"  # whose answer is not read


@pytest.mark.parametrize("kind", ["silent", "drip"])
def test_slow_hub_is_given_up(
    folder: Path, hub: Hub, kind: Literal["silent", "drip"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_SILENCE", 0.2)
    monkeypatch.setattr(waiting, "_ANSWER_SECONDS", 0.2)
    hub.faults += [Fault("POST", COMMIT, kind, times=99)]
    waiting.limit_waiting()
    try:
        begin = time.monotonic()
        with pytest.raises(HubError, match=r"cannot be reached \(ReadTimeout\)"):
            push_folder(folder, "user/tiny", create_pr=True)
        assert time.monotonic() - begin < 5
    finally:
        huggingface_hub.set_client_factory(default_client_factory)


def test_missing_login_is_an_error_before_any_request(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"^[^\n]*hf auth login.*HF_TOKEN[^\n]*$"):
        push_folder(folder, "user/tiny")
    assert hub.requests == []


def test_unreachable_hub_is_reported_in_one_line(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub() as closed:
        pass
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed.url)
    with pytest.raises(HubError, match=r"^[^\n]*\(ConnectError\): check the network[^\n]*$"):
        push_folder(folder, "user/tiny")


@pytest.mark.parametrize(("damage", "words"), [("\x0bx", "cannot be reached"), ("\u20ac", "character")])
def test_damaged_token_is_not_quoted(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, damage: str, words: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN + damage)
    with pytest.raises(HubError, match=words) as caught:
        push_folder(folder, "user/tiny")
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_card_with_damaged_metadata_is_refused_before_upload(folder: Path, hub: Hub) -> None:
    (folder / "README.md").write_text("no metadata\n")
    with pytest.raises(HubError, match=r"tiny: Invalid metadata in README\.md"):
        push_folder(folder, "user/tiny")
    assert hub.commits == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_folder_without_required_file_is_refused(folder: Path, hub: Hub, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        push_folder(folder, "user/tiny")
    assert hub.requests == []


@pytest.mark.parametrize(("text", "words"), [('{"model_type": "vit"}', "'vit'"), ("[]", "None"), ("{", "config.json")])
def test_folder_of_another_model_is_refused(folder: Path, hub: Hub, text: str, words: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        push_folder(folder, "user/tiny")
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "user/", "/tiny", "user/ti ny", "../tiny"])
def test_repo_must_be_user_and_name(folder: Path, hub: Hub, repo: str) -> None:
    with pytest.raises(RecipeError, match="repo"):
        push_folder(folder, repo)
    assert not (folder / "README.md").exists()


# Temporary failures, and files that the Hub already has


def sent(hub: Hub) -> list[str]:
    """Return the files that were uploaded separately, outside a commit."""
    return [path for method, path, _ in hub.requests if method == "PUT"]


@pytest.mark.parametrize(
    ("fault", "waited"),
    [
        (Fault("POST", "/api/repos/create", 503), [1.0]),
        (Fault("POST", "/api/repos/create", 429, times=2, headers={"Retry_After": "17"}), [17.0, 17.0]),
        (Fault("POST", "/api/repos/create", "drop"), [1.0]),
        (Fault("POST", COMMIT, 500, times=3), [1.0, 2.0, 4.0]),
        (Fault("POST", COMMIT, 429, headers={"Retry_After": "3600"}), [300.0]),
        (Fault("POST", COMMIT, "drop", times=2), [1.0, 2.0]),
        (Fault("POST", "/api/validate-yaml", 502), [1.0]),
    ],
    ids=lambda value: f"{value.pattern} {value.answer}" if isinstance(value, Fault) else "",
)
def test_temporary_failure_is_retried(
    folder: Path, hub: Hub, waits: list[float], fault: Fault, waited: list[float]
) -> None:
    hub.faults.append(fault)
    url = push_folder(folder, "user/tiny")
    assert fault.times == 0
    assert waits == waited
    assert [commit["paths"] for commit in hub.commits] == [sorted(PUSHED)]
    assert url.startswith(f"{hub.url}/user/tiny/commit/")
    assert len(sent(hub)) == 1


@pytest.mark.parametrize("pattern", ["/api/models/user/tiny/preupload/main", "/user/tiny.git/info/lfs.*", "/lfs/.*"])
@pytest.mark.parametrize("answer", [429, 503, "drop"])
def test_faults_while_uploading_weights_are_survived(folder: Path, hub: Hub, pattern: str, answer: Any) -> None:
    method = "PUT" if pattern == "/lfs/.*" else "POST"
    hub.faults.append(Fault(method, pattern, answer))
    push_folder(folder, "user/tiny")
    assert hub.faults[0].times == 0
    assert hub.files["user/tiny"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert len(hub.commits) == 1


@pytest.mark.parametrize("status", [409, 412])
def test_conflicting_change_is_reported_without_retry(folder: Path, hub: Hub, waits: list[float], status: int) -> None:
    hub.faults.append(Fault("POST", COMMIT, status))
    with pytest.raises(HubError, match=r"^[^\n]*user/tiny[^\n]*push again \(the Hub says: fault\)$"):
        push_folder(folder, "user/tiny")
    assert waits == []


def test_commit_with_lost_response_is_not_made_twice(folder: Path, hub: Hub) -> None:
    hub.faults.append(Fault("POST", COMMIT, "lose"))
    url = push_folder(folder, "user/tiny")
    assert len(hub.commits) == 1
    assert url == f"{hub.url}/user/tiny/commit/{hub.heads['user/tiny', 'main']}"


def test_repeated_push_does_not_send_weights_again(folder: Path, hub: Hub, waits: list[float]) -> None:
    hub.faults.append(Fault("POST", COMMIT, 503, times=6))
    with pytest.raises(HubError, match=r"status 503"):
        push_folder(folder, "user/tiny")
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert (hub.commits, hub.files["user/tiny"]) == ([], {})  # never a part of the commit
    assert len(sent(hub)) == 1
    push_folder(folder, "user/tiny")
    assert len(sent(hub)) == 1
    assert [commit["paths"] for commit in hub.commits] == [sorted(PUSHED)]


def test_only_changed_files_are_sent(folder: Path, hub: Hub) -> None:
    push_folder(folder, "user/tiny")
    (folder / "metrics.json").write_text('{"pruned": {"top1": 0.75}}')
    push_folder(folder, "user/tiny")
    assert [commit["paths"] for commit in hub.commits] == [sorted(PUSHED), ["README.md", "metrics.json"]]
    assert len(sent(hub)) == 1


# Branches, tags and pull requests


def test_branch_is_created_and_tag_names_the_commit(folder: Path, hub: Hub) -> None:
    push_folder(folder, "user/tiny", revision="half", tag="v1")
    assert hub.files["user/tiny"] == {}
    assert sorted(hub.branches["user/tiny", "half"]) == sorted(PUSHED)
    assert hub.tags == {("user/tiny", "v1"): hub.heads["user/tiny", "half"]}
    push_folder(folder, "user/tiny", revision="half", tag="v1")
    assert len(hub.commits) == 1
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(HubError, match=r"user/tiny.* tag v1 .*another tag"):
        push_folder(folder, "user/tiny", revision="half", tag="v1")


def test_pull_request_does_not_change_the_branch(folder: Path, hub: Hub) -> None:
    assert push_folder(folder, "user/tiny", create_pr=True) == f"{hub.url}/user/tiny/discussions/1"
    assert hub.files["user/tiny"] == {}
    assert sorted(hub.branches["user/tiny", "refs/pr/1"]) == sorted(PUSHED)


def test_pull_request_with_lost_response_is_not_reopened(folder: Path, hub: Hub, waits: list[float]) -> None:
    hub.faults.append(Fault("POST", COMMIT, "lose"))
    with pytest.raises(HubError, match="look for a pull request"):
        push_folder(folder, "user/tiny", create_pr=True)
    assert (len(hub.commits), waits) == (1, [])
    hub.faults.append(Fault("POST", COMMIT, 429))
    assert push_folder(folder, "user/tiny", create_pr=True).endswith("/discussions/2")


def test_tag_of_pull_request_is_refused(folder: Path, hub: Hub) -> None:
    with pytest.raises(RecipeError, match="tag v1"):
        push_folder(folder, "user/tiny", tag="v1", create_pr=True)
    assert hub.requests == []


def test_dry_run_lists_files_and_sends_nothing(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = sorted(path.name for path in folder.iterdir())
    text = describe_push(folder, "user/tiny", revision="half", tag="v1")
    head, *lines = text.splitlines()
    assert head == "user/tiny: 8 files in one commit to branch half, tag v1; nothing was sent"
    listed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in lines[:8]}
    assert sorted(listed) == sorted(PUSHED)
    assert {name: listed[name] for name in before if name in listed} == {
        name: (folder / name).stat().st_size for name in before if name in listed
    }
    assert "pipeline_tag: image-classification" in text and "\n# tiny\n" in text
    assert "to a pull request" in describe_push(folder, "user/tiny", create_pr=True)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert hub.requests == []


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("target", ["evil.Model", "user/other--modeling_isoprune.IsoPruneModel", 3, None])
def test_auto_map_points_to_own_code(folder: Path, hub: Hub, name: str, target: object) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(values | {"auto_map": {"AutoModel": "modeling_isoprune.IsoPruneModel"}}))
    push_folder(folder, "user/tiny")
    (folder / name).write_text(json.dumps(values | {"auto_map": {"AutoModel": target}}))
    before = len(hub.requests)
    with pytest.raises(CheckpointError, match=f"auto_map of {name}"):
        push_folder(folder, "user/tiny")
    assert len(hub.requests) == before


def test_other_files_are_named_and_stay(folder: Path, hub: Hub) -> None:
    others = ["evil.py", "notes.json", "secret.safetensors"]
    for name in others:
        (folder / name).write_text("stays here")
    text = describe_push(folder, "user/tiny")
    (line,) = (line for line in text.splitlines() if line.startswith("not sent"))
    assert all(name in line for name in [*others, "checkpoints", "optimizer.pt"])
    push_folder(folder, "user/tiny")
    assert hub.files["user/tiny"].keys() == set(PUSHED)


@pytest.mark.parametrize("name", ["extra.png", "model.safetensors"])
def test_link_is_refused(folder: Path, hub: Hub, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text(TOKEN)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*secret"):
        push_folder(folder, "user/tiny")
    assert hub.requests == []


def test_token_is_in_no_file_body_or_log(
    folder: Path, hub: Hub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    hub.faults += [
        Fault("POST", COMMIT, 500),
        Fault("PUT", "/lfs/.*", 503),
        Fault("POST", "/api/repos/create", "drop"),
    ]
    push_folder(folder, "user/tiny", revision="half", tag="v1")
    assert {header for _, path, header in hub.requests if path.startswith("/api/models")} == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in body for body in hub.bodies) and len(hub.bodies) == len(hub.requests)
    assert not any(TOKEN in path for _, path, _ in hub.requests)
    assert not any(TOKEN.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert TOKEN not in caplog.text + "".join(capfd.readouterr())


# The command, and the pushed model opened by someone else


def test_folder_that_fails_doctor_is_not_pushed(pruned: Callable[[str], Pruned], hub: Hub, tmp_path: Path) -> None:
    folder = shutil.copytree(pruned("vit").folder, tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    config["cost"]["pruned"]["macs"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    assert "is not pushed: cost: " in refuse("push", folder, "--repo", "user/vit")
    config["cost"]["pruned"]["macs"] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "modeling_isoprune.py").open("a") as file:
        file.write("import os\n")
    for flags in ([], ["--check", "false"]):
        line = refuse("push", folder, "--repo", "user/vit", *flags)
        assert "modeling_isoprune.py is not the code of this isoprune_hf" in line
    assert hub.requests == []


ALONE = """
import json, sys
from pathlib import Path
sys.modules["isoprune_hf"] = None
from transformers import pipeline
from PIL import Image
from transformers import pipeline
classify = pipeline("image-classification", model="user/vit", revision="v1", trust_remote_code=True)
print(json.dumps(classify(Image.open(sys.argv[1]), top_k=7)))
"""


def classify_alone(image: Path, url: str, home: Path) -> list[dict[str, Any]]:
    """Return the answers of a process that is given the Hub by its environment, and cannot import this package."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    command = [sys.executable, "-c", ALONE, str(image)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.launch
def test_pushed_model_opens_without_package_and_offline(
    pruned: Callable[[str], Pruned], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = pruned("vit")
    folder = shutil.copytree(sample.folder, tmp_path / "vit")
    hub.faults += [Fault("POST", "/api/models/user/vit/commit/half", 503), Fault("PUT", "/lfs/.*", "drop")]
    done = isoprune("push", folder, "--repo", "user/vit", "--revision", "half", "--tag", "v1")
    assert done.code == 0
    # The client itself sends the file again, so only the commit is reported.
    (line,) = done.err.splitlines()
    assert "status 503" in line and "1 s" in line
    assert done.out == f"{hub.url}/user/vit/commit/{hub.tags['user/vit', 'v1']}\n"
    code = hub.branches["user/vit", "half"]["modeling_isoprune.py"]
    assert code == code_that_ships().encode()
    image = Image.effect_mandelbrot((61, 47), (-2, -1, 1, 1), 30).convert("RGB")
    image.save(tmp_path / "image.png")
    with torch.inference_mode():
        logits = sample.model(**sample.processor(image, return_tensors="pt")).logits[0]
    expected = {sample.model.config.id2label[index]: float(p) for index, p in enumerate(logits.softmax(0))}
    for mode in ("alone", "package", "package, offline"):
        asked = len(hub.requests)
        if mode == "alone":
            found = classify_alone(tmp_path / "image.png", hub.url, tmp_path / "home")
        else:
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", mode == "package, offline")
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
            found = pipeline("image-classification", model="user/vit", revision="half")(image, top_k=7)
        assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-5)
        assert (len(hub.requests) == asked) == (mode == "package, offline")
