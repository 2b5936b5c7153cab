"""README and docs: every block of code is run or parsed, every link resolves, every quoted message exists."""

import argparse
import ast
import functools
import re
import shlex
import shutil
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
import yaml
from coverage_anchor import TORCH_PRUNING
from coverage_models import cases_of
from coverage_run import RESULTS, known_rows
from coverage_table import documented, tables
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from helpers.command_line import isoprune
from helpers.pruned_models import Pruned
from helpers.tiny_models import TIMM, make_base
from PIL import Image

import isoprune_hf
from isoprune_hf import errors
from isoprune_hf.cli.parser import parse, stage_parser
from isoprune_hf.cli.table import STAGES
from isoprune_hf.models import load_base
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import PruneRecipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.name for page in PAGES]
_BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
# The commands of these pages are run, not only parsed; a `text` block after one is a part of its output.
CARRIED_OUT = ("quickstart.md", "concepts.md")
# Pages whose Python another test runs, in a process without this package.
RUN_BY = {"export.md": "export/test_export.py"}


_PARSING = sys.modules[parse.__module__]


@functools.cache
def strict_parser(stage: str) -> argparse.ArgumentParser:
    """Build the parser of a stage once, since a page has up to thirty commands; it accepts no abbreviated flags."""
    parser = stage_parser(STAGES[stage])
    parser.allow_abbrev = False
    return parser


class Block(NamedTuple):
    """A block of code of a page, and the reason if it is not run."""

    kind: str
    code: str
    reason: str | None
    line: int


def write_colours(folder: Path) -> None:
    """Write images of ten classes, each of one grey, as parquet files with the columns and splits of CIFAR-10."""
    names = [f"class {number}" for number in range(10)]
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=names)})
    folder.mkdir(parents=True)
    for split, count in (("train", 160), ("test", 20)):
        rows = [{"img": Image.new("RGB", (32, 32), 3 * (25 * (row % 10),)), "label": row % 10} for row in range(count)]
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(block["kind"], block["code"], block["reason"], text[: block.start("kind")].count("\n") + 1)
        for block in _BLOCK.finditer(text)
    ]
    assert 2 * len(found) == len(re.findall(r"^ *(?:```|~~~)", text, re.M)), f"{page.name}: a block that is not read"
    return found


def lines_of(block: Block) -> list[list[str]]:
    """Split a block of shell into commands, and each command into words, without comments."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_command(words: list[str], where: str) -> None:
    """Check a command: isoprune commands by the parser, others by the file, target or extra that they name."""
    if words[0] in ("accelerate", "torchrun"):
        assert words[0] == "torchrun" or words[1] == "launch", where
        words = words[words.index("train_accelerate.py") :]
    words = words[: words.index(">")] if ">" in words else words
    if words[:2] == ["python", "push_to_hub.py"]:
        words = ["isoprune", "push", *words[2:]]
    match words:
        case ["isoprune" | "train_accelerate.py", *flags]:
            parse(flags)
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), where
        case ["python", script, *_]:
            assert (ROOT / script).is_file(), where
        case ["pip", "install", "torch", "torchvision", "--index-url", index]:
            assert index == "https://download.pytorch.org/whl/cpu", where
        case ["pip", "install", package]:
            extras = re.fullmatch(r"isoprune-hf(?:\[([\w,]+)\])?", package)[1]
            assert all(
                re.search(rf"^{extra} =", (ROOT / "setup.cfg").read_text(), re.M)
                for extra in (extras or "all").split(",")
            ), where
        case ["hf", "auth", "login"]:
            assert find_spec("huggingface_hub.cli"), where
        case _:
            pytest.fail(f"{where}: what is {words}?")


def check_citation(entry: str) -> None:
    """Check that a BibTeX entry agrees with CITATION.cff."""
    assert re.fullmatch(r"@inproceedings\{\w+,\n(?:  \w+ += \{[^{}]+\},?\n)+\}\n", entry)
    said = dict(re.findall(r"^  (\w+) += \{([^{}]+)\}", entry, re.M))
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert said == {
        "title": paper["title"],
        "author": " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"]),
        "booktitle": paper["collection-title"],
        "year": str(paper["year"]),
        "note": paper["identifiers"][0]["value"],
    }


def prepare(page: types.ModuleType, name: str, pruned: Callable[[str], Pruned], folder: Path) -> None:
    """Create the folders and names that the Python of a page uses, with small models instead of those of the text."""
    places = {"folder.md": "output/digits/model", "migrating.md": "output/finetuned/deit_4.2g"}
    if name in places:
        shutil.copytree(pruned("deit").folder, folder / places[name])
    if name == "README.md":
        page.__dict__["model"] = timm.create_model("test_vit", num_classes=7)
        page.__dict__["loader"] = [(torch.randn(4, 3, 160, 160), torch.randint(7, (4,)))]
    if name == "quickstart.md":
        write_colours(folder / "uoft-cs" / "cifar10")  # a folder of that name is read in place of the one of the Hub
    if name == "transformers.md":
        shutil.copytree(pruned("vit").folder, folder / "output" / "digits" / "model")
    if name == "layouts.md":
        processor = load_base(TIMM["vit"][0], False, model_args=TIMM["vit"][1]).processor
        recipe = PruneRecipe(criterion="l1", ratio=0.5, round_to=1, layout="uniform")
        prune_model(make_base("vit", folder), recipe).save(folder / "half", processor)


SLOW = {"quickstart.md": pytest.mark.faults}
SLOW |= dict.fromkeys(["api.md", "own_weights.md", "timm_train.md", "trainer.md"], pytest.mark.families)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=SLOW.get(page.name, ())) for page in PAGES],
    ids=NAMES,
)
def test_every_block_is_run_or_says_why_not(
    page: Path, pruned: Callable[[str], Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = blocks_of(page)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    if any(block.kind == "python" and block.reason is None for block in blocks):
        prepare(module, page.name, pruned, tmp_path)
    for name in ("recipes", "train_accelerate.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_PARSING, "stage_parser", lambda stage: strict_parser(stage.name))
    printed = None  # no command yet: a text block is a drawing
    for block in blocks:
        where = f"{page.name}:{block.line}"
        is_run = block.reason is None
        if block.kind == "bash":
            printed = ""
            for words in lines_of(block):
                check_command(words, where)
                if is_run and page.name in CARRIED_OUT and words[0] == "isoprune":
                    done = isoprune(*words[1:])
                    assert done.code == 0, (where, done.err)
                    printed += done.out
        elif block.kind == "python":
            code = compile(block.code, where, "exec")
            if is_run and page.name in RUN_BY:
                assert f'"{page.name}"' in (ROOT / "tests" / RUN_BY[page.name]).read_text(), where
            elif is_run:
                exec(code, module.__dict__)
        elif block.kind == "yaml":
            (tmp_path / "recipe.yaml").write_text(block.code)
            parse(["run", "--config", "recipe.yaml"])
        elif block.kind == "bibtex":
            check_citation(block.code)
        else:
            assert block.kind == "text", f"{where}: a block of {block.kind or 'no language'}"
            assert not is_run or printed is None or block.code in printed, (
                f"{where}: not what the command above it prints"
            )


def test_skipped_blocks_need_network_or_another_library() -> None:
    reasons = {(page.name, block.reason) for page in PAGES for block in blocks_of(page) if block.reason is not None}
    assert reasons == {
        ("quickstart.md", "what `make demo` prints"),
        ("first_ten_minutes.md", "what the command printed"),
        ("first_ten_minutes.md", "needs the model of this session"),
        ("command_line.md", "in an environment without extras"),
        ("scaling.md", "a file of accelerate's"),
        ("transformers.md", "needs torchao"),
        ("lightning.md", "needs lightning"),
        ("export.md", "needs TensorRT"),
        ("scaling.md", "there is no Slurm here"),
        ("imagenet_protocol.md", "needs ImageNet"),
        ("axes.md", "lines from the inside of timm's attention"),
        ("migrating.md", "commands of the reference"),
        ("migrating.md", "the reference's way, which executes what the file holds"),
        ("quickstart.md", "fetches weights and ImageNet"),
        ("quickstart.md", "needs a login"),
    }


def slug(heading: str) -> str:
    """Return the anchor of a heading as mkdocs does."""
    plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[-\s]+", "-", plain)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_to_file_and_heading(page: Path) -> None:
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        place, _, anchor = target.partition("#")
        file = page.parent / place if place else page
        assert file.is_file(), f"{page.name}: {target}"
        if file.suffix == ".png" and anchor:  # the theme shows one of two pictures
            other = {"only-light": "-dark.png#only-dark", "only-dark": "-light.png#only-light"}[anchor]
            assert f"({place.rpartition('-')[0]}{other})" in text, f"{page.name}: {target} has no counterpart"
            continue
        headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", file.read_text()), re.M) if file.suffix == ".md" else []
        assert not anchor or anchor in map(slug, headings), f"{page.name}: {target}"


def test_readme_is_short_and_its_pictures_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 5000
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert len(pictures) == 2 and all((ROOT / picture).is_file() for picture in pictures)


def navigation(entries: list) -> list[str]:
    """List the pages below an entry of `nav`."""
    pages = []
    for entry in entries:
        for value in entry.values():
            pages += navigation(value) if isinstance(value, list) else [value]
    return pages


def test_every_page_is_in_the_navigation_once() -> None:
    nav = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:])


@pytest.mark.launch
def test_site_builds_strictly_without_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs isoprune-hf[docs]")
    pytest.importorskip("mkdocstrings_handlers.python", reason="needs isoprune-hf[docs]")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    assert config.strict
    assert re.search(r"^docs: .*\n\t.*mkdocs build .*--strict$", (ROOT / "Makefile").read_text(), re.M)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    site = tmp_path / "site"
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    assert pages.keys() >= {Path(name).with_suffix(".html").as_posix() for name in navigation(config.nav)}
    assert "<em>" not in pages["api.html"]  # a star of a docstring that became emphasis
    loads = r"<(?:script|img|iframe)[^>]*src=\"(https?:[^\"]*)|<link rel=\"?stylesheet\"?[^>]*href=\"(https?:[^\"]*)"
    assert {name: found for name, text in pages.items() if (found := re.findall(loads, text))} == {}


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    shown = re.findall(r"^::: isoprune_hf\.(\w+)$", text, re.M)
    assert sorted(shown) == sorted(set(isoprune_hf.__all__) - {"__version__"})


def test_troubleshooting_lists_every_error_and_exit_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    codes = dict(re.findall(r"^\| (\d+) \| .*\|(.*)\|$", text, re.M))
    faults = {name for name in errors.__all__ if issubclass(getattr(errors, name), errors.TrainingFault)}
    for name in faults - {"TrainingFault"}:
        assert f"`{name}`" in codes[str(getattr(errors, name).exit_code)]
    assert codes.keys() == {str(getattr(errors, name).exit_code) for name in faults} | {"0", "1", "2", "3"}
    sections = set(re.findall(r"^## (\w+)$", text, re.M))
    assert sections >= set(errors.__all__) - faults | {"TrainingFault"}
    for name in faults:
        assert name in text


def messages_of_the_source() -> set[str]:
    """Collect every text of the package; values inserted at run time become null characters."""
    texts: set[str] = set()
    for file in (ROOT / "isoprune_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                texts.add("".join(parts))
    return texts


def test_every_quoted_message_is_one_of_the_source() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    tables = re.findall(r"^\|(?: error \|)? message \| what to do \|\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    rows = [row for table in tables for row in table.splitlines()]
    quoted = [re.match(r"\|(?: `\w+`(?:, `\w+`)* \|)? `([^`]+)` \| .+ \|$", row) for row in rows]
    assert all(quoted) and len(quoted) > 60
    source = messages_of_the_source()
    for message in (match[1] for match in quoted):
        pattern = re.compile("[^\n]*".join(re.escape(part) for part in message.split("…")))
        assert any(pattern.search(text) for text in source), message


@pytest.mark.parametrize("population", ["anchor", "named", "tasks"])
def test_the_page_has_the_coverage_that_was_recorded(population: str) -> None:
    cases = cases_of(population)
    rows = known_rows(population, RESULTS / f"coverage_{population}.jsonl")
    page = (ROOT / "docs" / ("tasks.md" if population == "tasks" else "axes.md")).read_text()
    assert documented(page, population, tables(cases, rows, population)) == page


@pytest.mark.parametrize("name", ["README.md", "docs/alternatives.md"])
def test_comparisons_have_the_coverage_of_the_page(name: str) -> None:
    page = (ROOT / "docs" / "axes.md").read_text()
    counts = re.findall(r"^\| all \| (\d+) \| (\d+) \| (\d+) \(", page, re.M)
    (models, measured, default), (_, also_measured, plain) = counts[:2]
    assert measured == also_measured
    of = f"of {models}" if measured == models else f"of {measured} measured, of {models}"
    theirs = sum(TORCH_PRUNING.values())
    ours = f"architectures pruned, by `best` and by `l1`, {of} of timm and transformers | {default}, {plain}"
    assert f"| {ours} | {theirs} of 139 |" in (ROOT / name).read_text()


def test_the_readme_has_the_coverage_of_named_models() -> None:
    counts = re.findall(r"^\| all \| (\d+) \| (\d+) \| (\d+) \(", (ROOT / "docs" / "axes.md").read_text(), re.M)
    ((models, _, default), (_, _, plain)) = counts[2:]
    assert default == plain
    said = f"`--population named`, [{int(default):,} of {int(models):,}](docs/axes.md#named) pass both ways"
    assert said in (ROOT / "README.md").read_text()


def test_the_zoo_has_the_figures_of_the_recipes() -> None:
    zoo = re.findall(r"^\| (\w+_[\d.]+g) \| (.*) \|$", (ROOT / "docs" / "model_zoo.md").read_text(), re.M)
    computed = re.findall(r"^\| (\w+_[\d.]+g) \| (.*) \|$", (ROOT / "docs" / "recipes.md").read_text(), re.M)
    at_ratios = dict(reversed(computed))
    assert [name for name, _ in zoo] == list(dict.fromkeys(name for name, _ in computed)) and len(zoo) == 12
    for name, row in zoo:
        recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
        published = [recipe["expect"].get(key) for key in ("gmacs", "params_m", "top1")]
        cells, figures = row.split(" | "), at_ratios[name].split(" | ")
        exact, table = figures[2].split(" / ")
        assert cells == [
            f"`{recipe['prune']['model']}`",
            *("-" if figure is None else f"{figure:.2f}" for figure in published),
            *(table, exact, figures[5]),
            "not trained here",
        ]


def test_the_collection_has_the_rows_of_the_zoo() -> None:
    zoo = re.findall(r"^\| (\w+_[\d.]+g \| .*) \|$", (ROOT / "docs" / "model_zoo.md").read_text(), re.M)
    collection = yaml.safe_load((ROOT / "model_cards" / "collection.yaml").read_text())
    assert len(collection["description"]) <= 150  # the Hub takes no more
    for row, model in zip(zoo, collection["models"], strict=True):
        published = [model["published"].get(key) for key in ("gmacs", "params_m", "top1")]
        computed = model["computed"]
        assert model["recipe"] == f"recipes/{model['name']}.yaml"
        assert row.split(" | ") == [
            model["name"],
            f"`{model['base']}`",
            *("-" if figure is None else f"{figure:.2f}" for figure in published),
            *(f"{computed['gmacs']:.3f}", f"{computed['exact_gmacs']:.3f}", f"{computed['params_m']:.2f}"),
            model["top1_here"],
        ]


def test_every_test_named_by_a_page_exists() -> None:
    names = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for text in files for name in re.findall(r"^def (test_\w+)", text, re.M)}
    assert len(names) > 20
    assert names <= defined, sorted(names - defined)
