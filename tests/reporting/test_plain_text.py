"""Names and labels that try to leave their place in a card, a terminal or a page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import markdown
import pytest

from isoprune_hf.reporting.model_card import build_model_card
from isoprune_hf.reporting.plain_text import plain_markdown
from isoprune_hf.terminal import paint, printable

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "cat\n# heading\n",
    "a`b` <b>c</b>",
    "[link](javascript:alert(1))",
    "![picture](http://evil/x.png)",
    "x | y | z",
    "\x1b[2J\x1b]0;title\x07",
    "```\n<iframe src=x>\n```",
    "{{ 7 * 7 }} {% raw %}",
    "\u202eevil",
    "- item\n- item",
]
BENIGN = ["hamster/gerbil cage", "crêpe", "猫", "10 % & more", "C:\\x"]


class Tags(HTMLParser):
    """Collects the tags of a document, with the addresses of links and pictures."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]


def render(folder: Path, names: list[str]) -> tuple[str, Tags]:
    """Return the card of a folder that has the names everywhere, and the tags of its page."""
    folder.mkdir()
    each = dict(enumerate(names))
    config = {
        "model_type": "isoprune",
        "stage": "pruned",
        "base": {"library": names[0], "architecture": names[1]},
        "source": {"name": names[2], "pretrained": True, "seed": 0},
        "structure": {"removed": names},
        "recipe": {"prune": {"criterion": names[3], names[4]: names[0]}, "data": {"dataset": names[1]}},
        "image_size": [3, 32, 32],
        "id2label": {str(index): name for index, name in each.items()},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "pruning_plan.json").write_text(json.dumps({"notes": names}))
    (folder / "speed.json").write_text(json.dumps({"device": names[0], "milliseconds": {}, "batch_size": 1}))
    (folder / "metrics.json").write_text("{}")
    text = str(build_model_card(folder)).split("\n---\n", 1)[1]
    return text, Tags(markdown.markdown(text, extensions=["tables", "fenced_code"]))


def test_hostile_names_add_nothing_to_card(tmp_path: Path) -> None:
    _, plain = render(tmp_path / "plain", [f"name {number}" for number in range(len(HOSTILE))])
    text, page = render(tmp_path / "hostile", HOSTILE)
    assert page.addresses == plain.addresses
    assert {*page.tags} <= {*plain.tags} and page.tags.count("h1") == plain.tags.count("h1") == 1
    assert page.tags.count("td") == plain.tags.count("td")
    assert all(sign.isprintable() for sign in text.replace("\n", ""))


def test_ordinary_labels_stay_whole(tmp_path: Path) -> None:
    text, _ = render(tmp_path / "benign", BENIGN)
    assert f"Output: {len(BENIGN)} classes: {', '.join(BENIGN)}." in text


@pytest.mark.parametrize("name", HOSTILE + BENIGN)
def test_escaping_twice_changes_nothing(name: str) -> None:
    once = plain_markdown({name: [name, 1, None]})
    assert plain_markdown(once) == once and next(iter(once.values()))[1:] == [1, None]


@pytest.mark.parametrize("name", HOSTILE)
def test_terminal_obeys_no_name(name: str) -> None:
    shown = printable(f"label {name}\n")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)


def test_own_colours_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    painted = paint("ok", "green", Terminal())  # type: ignore[arg-type]  # paint only asks whether it is a terminal
    assert printable(f"{painted}\x1b[2J\ttab\n") == f"{painted}\\x1b[2J\ttab\n"
