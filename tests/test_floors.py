"""The floors of the package, which modules may import which library, and other rules of the house."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

from isoprune_hf.checkpoint.modeling_isoprune import PARTS

ROOT = Path(__file__).parents[1]


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    absolute = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return absolute | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def test_every_import_contract_is_kept() -> None:
    """In a process of its own: import-linter configures logging."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_module_imports_itself_through_others() -> None:
    graph = grimp.build_graph("isoprune_hf", cache_dir=None, exclude_type_checking_imports=True)
    modules = graph.modules - {"isoprune_hf"}  # whose lazy names need the modules that import it
    uses = {module: graph.find_modules_directly_imported_by(module) & modules for module in modules}
    order = list(TopologicalSorter(uses).static_order())  # raises CycleError
    assert set(order) == modules


def test_shipped_code_imports_only_its_own_parts() -> None:
    package = ROOT / "isoprune_hf"
    parts = {"isoprune_hf." + name.removesuffix(".py").replace("/", ".") for name in PARTS}
    used = {name for part in PARTS for name in imports(package / part) if name.startswith("isoprune_hf")}
    assert used <= parts


def test_no_module_has_more_than_300_lines() -> None:
    lengths = {
        path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("isoprune_hf/**/*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_text_files_are_read_and_written_as_utf8() -> None:
    """Windows has another default encoding; ruff's PLW1514 only knows files whose type it can infer."""
    missing = []
    for path in ROOT.glob("isoprune_hf/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                is_text = node.func.attr in ("read_text", "write_text")
                if is_text and "encoding" not in {keyword.arg for keyword in node.keywords}:
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert missing == []


def test_no_two_test_files_have_one_name() -> None:
    """Without packages pytest imports a test file by its name alone."""
    counts = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in counts.items() if count > 1] == []


def test_names_of_tests_have_at_most_eight_words() -> None:
    names = [
        node.name.removeprefix("test_")
        for path in ROOT.glob("tests/**/test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert len(names) > 1000 and [name for name in names if len(name.split("_")) > 8] == []
