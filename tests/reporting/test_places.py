"""Paths of the author's machine are no part of what is published."""

from pathlib import Path

import pytest

from isoprune_hf.reporting.places import hide_note, hide_paths, hide_places, is_place, plain_hub_id, show_place


@pytest.mark.parametrize(
    ("text", "plain", "place"),
    [
        ("uoft-cs/cifar10", "uoft-cs/cifar10", False),
        ("hf:uoft-cs/cifar10", "uoft-cs/cifar10", False),
        ("hf-hub:timm/resnet50", "timm/resnet50", False),
        ("torchvision/resnet50.IMAGENET1K_V1", None, False),
        ("/home/me/photos", None, True),
        ("~/photos", None, True),
        ("./photos", None, True),
        ("C:\\me\\photos", None, True),
        ("data/me/photos", None, True),
        ("digits", None, False),
    ],
)
def test_names_of_the_hub_are_no_places(text: str, plain: str | None, place: bool) -> None:
    assert (plain_hub_id(text), is_place(text)) == (plain, place)


def test_existing_folder_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "dense").mkdir(parents=True)
    assert is_place("output/dense") and show_place("output/dense") == "a local folder (dense)"


def test_hidden_values_have_no_path_left() -> None:
    values = {"a": ["/home/me/x", {"/home/me/y": 3}], "b": "timm/resnet50", "c": "./x", "n": None, "z": 1.5}
    hidden = {"a": ["./x", {"./y": 3}], "b": "timm/resnet50", "c": "./x", "n": None, "z": 1.5}
    assert hide_places(values) == hidden == hide_places(hidden)
    assert hide_note("fine") == "fine" and "/" not in hide_note("see /home/me/net.py")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("int8/bf16", "int8/bf16"),
        ("https://example.org/a", "https://example.org/a"),
        ("either / or", "either / or"),
        ("/home/al ice/x", "./x"),
        ("C:\\me\\x", "./x"),
        ("read from ~/x, twice", "not shown, because it contains a path"),
        ("name=/home/me", "not shown, because it contains a path"),
    ],
)
def test_rooted_paths_are_hidden_in_texts(text: str, hidden: str) -> None:
    assert hide_paths([text]) == [hidden] == hide_paths([hidden])
