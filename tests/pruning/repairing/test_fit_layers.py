"""The equations of the layers of whole networks: their number of rows, and the same weights by both forms."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from helpers.plain_scores import batches_of
from helpers.tiny_models import make_base

from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.cutting.cut import apply_plan, keep_masks
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.repairing import fit_layers as fitting
from isoprune_hf.pruning.repairing.equations import Equations
from isoprune_hf.pruning.repairing.kernel_equations import KernelEquations
from isoprune_hf.pruning.repairing.normal_equations import NormalEquations
from isoprune_hf.pruning.repairing.ridge import form_of_fit


# hf-swin joins images with windows, and resnext has groups. One image is not split into halves, which takes less time.
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("vit", [2, 1]),
        pytest.param("hf-swin", [1], marks=pytest.mark.families),
        pytest.param("resnext", [1], marks=pytest.mark.families),
    ],
)
def test_both_forms_give_the_same_weights(
    family: str, sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_base(family, tmp_path).double().eval()
    groups = trace_groups(dense)
    plan = PruningPlan({g.name: tuple(range(0, g.channels, 2)) for g in groups if not g.num_heads}, {})
    pruned, masks = apply_plan(dense, plan, groups), keep_masks(plan, groups, dense.model)
    calibration = Calibration([(images.double(), labels) for images, labels in batches_of(dense, sizes)])
    expected, counted = [], []

    def fit(*args: object, **kwargs: object) -> str | None:
        counted.append(sum(float(half.totals[-1]) for half in args[2:]))
        return solve(*args, **kwargs)

    solve = fitting._fit
    monkeypatch.setattr(fitting, "_fit", fit)
    fitted = []
    for form in (NormalEquations, KernelEquations):

        def only(size: object, rows: int, limit: int, form: type[Equations] = form) -> type[Equations]:
            expected.append(rows)
            return form

        monkeypatch.setattr(fitting, "form_of_fit", only)
        network = copy.deepcopy(pruned)
        fitting.fit_layers(dense, network, masks, calibration)
        fitted.append(network.state_dict())
    assert expected == counted
    first, second = fitted
    changed = [name for name, value in first.items() if not torch.equal(value, pruned.state_dict()[name])]
    assert len(changed) > 10
    for name in changed:
        torch.testing.assert_close(second[name], first[name], rtol=1e-6, atol=1e-8)


def test_networks_use_the_form_that_costs_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_base("mobilenet_v2", tmp_path).eval()
    chosen = []
    monkeypatch.setattr(fitting, "form_of_fit", lambda *args: chosen.append(form_of_fit(*args)) or chosen[-1])
    fitting.fit_layers(dense, copy.deepcopy(dense), {}, Calibration(batches_of(dense, [2])))
    runs = [form for form, _ in itertools.groupby(chosen)]
    assert runs[0] is NormalEquations and runs[-1] is KernelEquations  # deep layers have more features, fewer rows
