"""The notebook, run from top to bottom without a network."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from transformers import AutoModelForImageClassification

import isoprune_hf
from isoprune_hf.recipes.presets import PRESETS

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "prune_your_model.ipynb"


def outputs(cell: nbformat.NotebookNode) -> str:
    """Return the output of a cell as text."""
    return "\n".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs)


def test_notebook_has_ten_cells_and_no_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) == 10
    assert all(
        not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code"
    )


def test_notebook_uses_public_names_alone() -> None:
    code = "".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code")
    assert re.findall(r"^(?:from|import) isoprune_hf.*$", code, re.M) == ["import isoprune_hf as iso"]
    assert set(re.findall(r"\biso\.(\w+)", code)) <= set(isoprune_hf.__all__)


def test_notebook_offline_and_on_the_hub_share_code() -> None:
    """Names and sizes differ; one branch installs the package in Colab, and one chooses the settings of the base."""
    code = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert 'ON_THE_HUB = "google.colab" in sys.modules' in code[0]
    assert '    %pip install --quiet "isoprune-hf[train,publish]"' in code[0]
    assert [source.count("if ON_THE_HUB:") for source in code] == [0, 1, *[0] * (len(code) - 2)]


@pytest.mark.faults
def test_notebook_runs_offline_and_writes_pruned_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(out.output_type == "error" for cell in code for out in cell.outputs)
    assert "1,347 images to train on, 450 to test on, 10 classes" in outputs(code[0])
    # The last but one cell has the table of base, pruned and finetuned.
    top1 = {name: float(value) for name, value in re.findall(r"^(\w+) +(0\.\d+|1\.0+) ", outputs(code[-2]), re.M)}
    assert set(top1) == {"base", "pruned", "finetuned"}
    assert top1["base"] > 0.6 and top1["finetuned"] > max(0.6, top1["pruned"] - 0.02)
    assert re.search(r"^\d \(0\.\d\d\), truth \d$", outputs(code[-1]), re.MULTILINE)
    assert any("image/png" in out.get("data", {}) for out in code[-1].outputs)
    folder = tmp_path / "output" / "notebook"
    cost = json.loads((folder / "config.json").read_text())["cost"]
    assert 0.45 < cost["pruned"]["macs"] / cost["base"]["macs"] <= 0.5
    assert json.loads((folder / "metrics.json").read_text())["finetuned"]["top1"] == pytest.approx(top1["finetuned"])
    decided = json.loads((folder / "pruning_plan.json").read_text())["settings"]
    assert {name: decided[name] for name in PRESETS["best"]} == PRESETS["best"]
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == cost["pruned"]["params"]
