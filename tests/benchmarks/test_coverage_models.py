from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from coverage_anchor import NOT_APPLICABLE, TRANSFORMERS
from coverage_models import MAX_MILLIONS, Case, cases_of, config_args, found_rows, in_strata, not_applicable, sample
from coverage_reduce import all_names
from timm import list_modules
from transformers import CONFIG_MAPPING

from isoprune_hf.checkpoint.task_forms import TASK_FORMS, networks_of


def make_cases(**sizes: int) -> list[Case]:
    return [Case(f"{family}{index}", "timm", family) for family, size in sizes.items() for index in range(size)]


def test_anchor_has_every_timm_file_and_type() -> None:
    cases = cases_of("anchor")
    families = Counter(case.library for case in cases)
    assert set(list_modules()) >= {case.family for case in cases if case.library == "timm"}  # newer ones have more
    assert families == {"timm": 98, "transformers": len(TRANSFORMERS) - len(NOT_APPLICABLE)}


def test_most_names_of_the_libraries_have_a_row() -> None:
    names = set(all_names())
    assert len(names & found_rows().keys()) >= 0.95 * len(names)  # newer versions have more


def test_named_models_are_small_enough() -> None:
    rows, cases = found_rows(), cases_of("named")
    assert all(rows[case.name]["params"] <= MAX_MILLIONS for case in cases)
    assert len(cases) == sum("side" in row and row["params"] <= MAX_MILLIONS for row in rows.values()) > 1000


def test_reasons_are_those_of_models_outside_the_count() -> None:
    names = {case.name for case in cases_of("named")}
    assert not names & not_applicable("named").keys()


@pytest.mark.families
def test_every_class_of_a_task_has_a_case() -> None:
    names = set()
    for form in (form for form in TASK_FORMS.values() if not form.has_classes):
        for kind in set(CONFIG_MAPPING.keys()) - {"isoprune"}:
            with suppress(AttributeError, ImportError, ValueError):  # classes that this environment does not have
                names |= {f"transformers/{found.__name__}" for found in networks_of(form, CONFIG_MAPPING[kind])}
    known = {case.name for case in cases_of("tasks")}
    assert not known & not_applicable("tasks").keys()
    assert len(names - known - not_applicable("tasks").keys()) < 0.05 * len(names)  # newer versions have more


def test_models_of_tasks_are_counted_by_task() -> None:
    counts = Counter(case.kind for case in cases_of("tasks"))
    assert counts.keys() == {form.task for form in TASK_FORMS.values() if not form.has_classes}


def test_every_beginning_is_a_stratified_sample() -> None:
    cases = make_cases(a=60, b=30, c=10)
    for share in (0.1, 0.5):
        drawn = Counter(case.family for case in sample(cases, share, seed=0))
        assert all(abs(drawn[family] - share * size) <= 1 for family, size in (("a", 60), ("b", 30), ("c", 10)))
    assert sample(cases, 0.5, 0)[:10] == sample(cases, 0.1, 0)


def test_order_depends_on_the_seed_alone() -> None:
    cases = make_cases(a=20, b=5)
    assert in_strata(cases, 1) == in_strata(list(cases), 1) != in_strata(cases, 2)


def test_values_of_a_tower_go_into_its_config() -> None:
    assert config_args("clip", {"image_size": 64}) == {"vision_config": {"image_size": 64}}
    assert config_args("pvt_v2", {"image_size": 64}) == {"image_size": [64, 64]}


@pytest.mark.parametrize(
    "case",
    [
        Case("sized", "timm", "resnet", "resnet18", {"layers": [1, 1, 1, 1]}, 64),
        Case("typed", "transformers", "resnet", args={"depths": [1, 1, 1, 1]}, side=64, num_labels=10),
    ],
)
def test_case_has_images_of_its_side(case: Case, tmp_path: Path) -> None:
    assert case.open(tmp_path).model.config.image_size == [3, 64, 64]
