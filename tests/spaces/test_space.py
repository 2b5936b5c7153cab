"""The Space that compares base and pruned model: its functions, and the page in a real browser."""

import copy
import importlib
import io
import json
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from isoprune_hf.errors import CheckpointError, ImageError, IsoPruneError
from isoprune_hf.models import load_base
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import PruneRecipe

SPACE = Path(__file__).parents[2] / "spaces" / "compare"


def png(width: int, height: int, color: tuple[int, int, int] = (200, 30, 90)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """Return a PNG header of 9000 x 9000 pixels without the pixels, which must never be decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def comparison() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SPACE))
    yield importlib.import_module("comparison")
    sys.path.remove(str(SPACE))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Save a pruned model and its base, and return both folders."""
    root = tmp_path_factory.mktemp("space")
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    names = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
    base = load_base("timm/vit_tiny_patch16_224", pretrained=False, model_args=args, num_labels=7, label_names=names)
    base.model.save_pretrained(root / "base")
    base.processor.save_pretrained(root / "base")
    opened = load_base(str(root / "base"))
    result = prune_model(opened.model, PruneRecipe(criterion="l1", target_macs="50%"))
    result.save(root / "model", opened.processor)
    return str(root / "model"), str(root / "base")


@pytest.fixture(scope="module")
def pair(comparison: ModuleType, folders: tuple[str, str]):
    return comparison.open_pair(*folders)


def test_answers_equal_those_of_each_model(comparison: ModuleType, pair, folders: tuple[str, str]) -> None:
    encoded = png(40, 30)
    found = comparison.compare(pair, encoded)
    for name, folder in zip(("pruned", "base"), folders, strict=True):
        model, processor = load_base(folder)
        with torch.no_grad():
            logits = model(**processor(Image.open(io.BytesIO(encoded)), return_tensors="pt")).logits[0]
        by_hand = {model.config.id2label[i]: float(p) for i, p in enumerate(logits.softmax(0))}
        best = sorted(by_hand, key=by_hand.get, reverse=True)[:5]
        assert list(found.answers[name]) == best
        assert found.answers[name] == pytest.approx({label: by_hand[label] for label in best})
    assert set(pair.milliseconds) == {"base", "pruned"} and min(pair.milliseconds.values()) > 0
    assert found.image.size == (40, 30)


def test_table_shows_costs_of_the_config(comparison: ModuleType, pair) -> None:
    cost = pair.models["pruned"].config.cost
    lines = comparison.tabulate(pair._replace(milliseconds={"base": 4.0, "pruned": 3.0})).splitlines()
    (base, pruned) = (cost[name]["macs"] for name in ("base", "pruned"))
    assert lines[2] == f"| GMACs | {base / 1e9:.3g} | {pruned / 1e9:.3g} | {pruned / base:.0%} |"
    assert lines[4] == "| ms an image | 4 | 3 | 75% |"


def test_headline_has_gain_and_accuracy(comparison: ModuleType, pair) -> None:
    costs = {"base": {"macs": 200, "params": 100}, "pruned": {"macs": 100, "params": 60}}
    config = SimpleNamespace(cost=costs, problem_type=None)
    models = {name: SimpleNamespace(config=config) for name in ("base", "pruned")}
    known = pair._replace(models=models, milliseconds={"base": 6.0, "pruned": 4.0}, accuracy={})
    text = "50% of the MACs and 60% of the parameters, 1.50x as fast on this machine"
    assert comparison.headline(known) == text
    measured = known._replace(accuracy={"base": 0.9, "pruned": 0.875})
    assert comparison.headline(measured) == f"{text}, 87.5% right instead of 90.0%"


def test_labels_have_probabilities_of_their_own(comparison: ModuleType, pair) -> None:
    configs = {name: copy.deepcopy(model.config) for name, model in pair.models.items()}
    configs["pruned"].problem_type = "multi_label_classification"
    models = {name: type(model)(configs[name]).eval() for name, model in pair.models.items()}
    lists = pair._replace(models=models, accuracy={"base": 0.9, "pruned": 0.875})
    answers = comparison.compare(lists, png(32, 32)).answers["pruned"]
    pixels = lists.processors["pruned"](Image.new("RGB", (32, 32), (200, 30, 90)), return_tensors="pt")["pixel_values"]
    wanted = models["pruned"](pixels).logits[0].sigmoid().sort(descending=True).values[:5]
    assert [*answers.values()] == pytest.approx(wanted.tolist())
    assert comparison.headline(lists).endswith("87.5% mean average precision instead of 90.0%")


def test_several_labels_are_named(comparison: ModuleType) -> None:
    answers = {"base": {"ant": 0.9, "bee": 0.6, "cat": 0.2}, "pruned": {"bee": 0.4, "ant": 0.3}}
    found = comparison.Comparison(Image.new("RGB", (1, 1)), answers, is_multi_label=True)
    assert comparison.summarize(found) == "The base predicts `ant`, `bee`, the pruned model no class."
    assert comparison.caption(found) == "base: ant 90%, bee 60% | pruned: no class"


def test_accuracy_is_that_of_the_same_images(comparison: ModuleType, tmp_path: Path) -> None:
    figures = {"top1": 0.5, "images": 10, "data": "aa"}
    for base, expected in ((figures | {"top1": 0.75}, {"base": 0.75, "pruned": 0.5}), (figures | {"data": "bb"}, {})):
        (tmp_path / "metrics.json").write_text(json.dumps({"base": base, "pruned": figures}))
        assert comparison._read_accuracy(tmp_path, "pruned") == expected


def test_examples_are_those_of_the_folder(
    comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": Image.new("L", (8, 8)), "label": number % 2} for number in range(9)]
    images = SimpleNamespace(evaluation=rows, label_names=["0", "1"])
    monkeypatch.setattr(comparison, "load_data", lambda recipe: images)
    (tmp_path / "config.json").write_text(json.dumps({"recipe": {"data": {"dataset": "digits"}}}))
    digits = comparison.list_examples(tmp_path)
    assert len(digits) == 6 and all(path.suffix == ".png" for path in digits)
    (tmp_path / "examples").mkdir()
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / "examples" / name).write_bytes(b"")
    assert [path.name for path in comparison.list_examples(tmp_path)] == ["a.png", "b.JPG"]


def test_caption_has_both_answers(comparison: ModuleType) -> None:
    answers = {"base": {"ant": 0.9, "bee": 0.1}, "pruned": {"bee": 0.6, "ant": 0.4}}
    found = comparison.Comparison(Image.new("RGB", (2, 2)), answers)
    assert comparison.caption(found) == "base: ant 90% | pruned: bee 60%"


HOSTILE = ["<img src=x onerror=alert(1)>", "**a** [x](javascript:alert(1))", "`\x1b[2J`\u202eb\n# c", "x" * 10**6]
HOSTILE += ["https://example.com", "", " \n", "$$\\href{javascript:alert(1)}{x}$$"]


def test_hostile_labels_are_short_lines_of_text(comparison: ModuleType) -> None:
    shown = comparison.show_labels(dict(enumerate(HOSTILE)))
    assert len({*shown.values()}) == len(HOSTILE) and all(0 < len(line) <= 80 for line in shown.values())
    assert all(line.isprintable() for line in shown.values())
    assert shown[0] == HOSTILE[0]  # the page shows the name as text
    assert [shown[2], shown[5], shown[6]] == ["` [2J` b # c", "? (5)", "? (6)"]


@pytest.mark.parametrize("label", HOSTILE)
def test_hostile_labels_stay_in_their_code_span(label: str, comparison: ModuleType) -> None:
    """Nothing in a code span is a tag, a link, a heading or a formula, and no name ends the span."""
    name = comparison.show_labels({0: label})[0]
    found = comparison.Comparison(None, {"base": {name: 1.0}, "pruned": {"ant": 1.0}})
    before, inside, between, other, after = comparison.summarize(found).split("`")
    assert [before, between, other, after] == ["The base predicts ", ", the pruned model ", "ant", "."]
    assert inside and "\n" not in inside and "<" not in inside


def test_classes_of_one_name_have_answers_each(comparison: ModuleType, pair) -> None:
    model = pair.models["base"]
    kept = model.config.id2label
    model.config.id2label = dict.fromkeys(kept, "same")
    answers = comparison.compare(pair, png(40, 30)).answers
    model.config.id2label = kept
    assert len(answers["base"]) == 5 and all(name.startswith("same (") for name in answers["base"])


def test_damaged_examples_are_left_out(comparison: ModuleType, pair, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png(8, 8))
    (tmp_path / "bad.png").write_bytes(b"no image")
    examples = [tmp_path / name for name in ("bad.png", "missing.png", "good.png")]
    answered = comparison.answer_examples(pair._replace(examples=examples))
    assert [path for path, _ in answered] == [str(tmp_path / "good.png")]


def test_missing_picture_of_widths_is_drawn(comparison: ModuleType, folders: tuple[str, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders[0], tmp_path / "model"))
    (folder / "widths.png").unlink(missing_ok=True)
    widths = comparison.open_pair(str(folder), folders[1]).widths
    with Image.open(widths) as picture:
        assert picture.width > 500
    assert not (folder / "widths.png").exists()


@pytest.mark.parametrize(("encoded", "words"), [(b"", "image"), (b"no image", "image")])
def test_file_without_image_is_refused(encoded: bytes, words: str, comparison: ModuleType, pair) -> None:
    with pytest.raises(IsoPruneError, match=words):
        comparison.compare(pair, encoded)


def test_truncated_image_is_refused(comparison: ModuleType, pair) -> None:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(whole, "JPEG")
    with pytest.raises(IsoPruneError, match="image"):
        comparison.compare(pair, whole.getvalue()[: len(whole.getvalue()) // 2])


def test_huge_image_is_refused_before_decoding(comparison: ModuleType, pair) -> None:
    with pytest.raises(ImageError, match=r"9000 x 9000 pixels.* 67,108,864 "):
        comparison.compare(pair, bomb())


def test_models_that_cannot_be_opened_are_refused(
    comparison: ModuleType, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="no/such/place"):
        comparison.open_pair("no/such/place")
    with pytest.raises(CheckpointError, match="other weights than the one that was cut"):
        comparison.open_pair(folders[0], folders[0])


# The page, which needs gradio and a browser


@pytest.fixture(scope="module")
def page(comparison: ModuleType, pair) -> Iterator[str]:
    """Serve the page and yield its address."""
    pytest.importorskip("gradio")
    space = importlib.import_module("app")
    app = space.build_app(pair)
    _, address, _ = app.launch(prevent_thread_lock=True, quiet=True, **space.LAUNCH)
    yield address
    app.close()


def test_unopenable_model_is_reported_in_one_line(comparison: ModuleType, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("gradio")
    assert importlib.import_module("app").main(["no/such/place"]) == 2
    assert re.fullmatch(r"compare: error: no/such/place [^\n]+\n", capsys.readouterr().err)


def test_api_returns_the_same_answers(page: str, comparison: ModuleType, pair, tmp_path: Path) -> None:
    client = pytest.importorskip("gradio_client")
    file = tmp_path / "image.png"
    file.write_bytes(png(40, 30))
    summary, _, base, pruned = client.Client(page, verbose=False).predict(
        client.handle_file(file), api_name="/compare"
    )
    answers = comparison.compare(pair, file.read_bytes()).answers
    for found, expected in ((base, answers["base"]), (pruned, answers["pruned"])):
        assert {row["label"]: row["confidence"] for row in found["confidences"]} == pytest.approx(expected)
        assert found["label"] in summary


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_uploaded_image_shows_both_answers_in_browser(
    width: int, page: str, comparison: ModuleType, pair, tmp_path: Path
) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no browser")
    good, bad, large = (tmp_path / name for name in ("good.png", "bad.png", "large.png"))
    good.write_bytes(png(40, 30))
    bad.write_bytes(b"no image")
    large.write_bytes(bomb())
    first = next(iter(comparison.compare(pair, good.read_bytes()).answers["pruned"]))
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 1000})
        faults: list[str] = []
        tab.on("pageerror", lambda error: faults.append(str(error)))
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))

        def upload(file: Path, words: str) -> None:
            tab.goto(page)
            tab.get_by_text("classify it with both models").wait_for()
            tab.locator("input[type=file]").first.set_input_files(file)
            tab.get_by_text(words).first.wait_for(timeout=20_000)

        upload(good, first)
        tab.wait_for_timeout(500)
        tab.screenshot(path=tmp_path / f"answer-{width}.png", full_page=True)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        upload(bad, "cannot be read as an image")
        upload(large, "image of 9000 x 9000 pixels")
        assert tab.get_by_text(first, exact=True).count() == 0
        browser.close()
    assert faults == []
    assert [url for url in asked if not url.startswith((page, "data:", "blob:"))] == []
    with Image.open(tmp_path / f"answer-{width}.png") as picture:
        assert picture.width == width and len(picture.convert("RGB").getcolors(2**24)) > 100
