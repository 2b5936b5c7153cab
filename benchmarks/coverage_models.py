"""List the models of `coverage.py`: the populations `anchor`, `named` and `tasks`, and stratified samples of them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from coverage_anchor import LABELS, NOT_APPLICABLE, TIMM, TRANSFORMERS
from coverage_left_out import OTHER_NETWORKS
from coverage_tasks import ENCODERS_OF_TIMM, NETWORKS, SIDES
from transformers import CONFIG_MAPPING, PreTrainedConfig, ViTImageProcessor

from isoprune_hf import IsoImageProcessor
from isoprune_hf.api.batches import read_batches
from isoprune_hf.api.holding import hold
from isoprune_hf.checkpoint.task_forms import IMAGE_CLASSIFICATION, IMAGE_FEATURE_EXTRACTION, TASK_FORMS
from isoprune_hf.models import BaseModel, load_base
from isoprune_hf.models.from_timm import is_encoder

NAMED = Path(__file__).with_name("coverage_named.json")
MAX_MILLIONS = 100  # parameters of a model of the population `named`
SIDE = 64  # pixels of the images of a transformers type that reads any size
# Values without which the default config of a type is refused: those of its published models.
CONFIGS = {"perceiver": {"num_cross_attention_heads": 1}}


@dataclass(frozen=True)
class Case:
    """One model of a population.

    Args:
        name: Name in the tables.
        library: timm, torchvision or transformers.
        family: The model file of timm or torchvision, or the type of transformers.
        model: The architecture of timm or torchvision, or the class of transformers; empty for the first class.
        args: Arguments of the architecture, or values of the config of transformers.
        side: Height and width of the images in pixels, for a network that reads any size; None for its own.
        num_labels: Size of a new head; None for its own.
        task: The task of the model.
    """

    name: str
    library: str
    family: str
    model: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    side: int | None = None
    num_labels: int | None = None
    task: str = IMAGE_CLASSIFICATION.task

    @property
    def kind(self) -> str:
        """The line of the tables that counts it: its library, or its task if it is no classifier."""
        return self.library if self.task == IMAGE_CLASSIFICATION.task else self.task

    def open(self, folder: Path) -> BaseModel:
        """Open the base with random weights; the files of a transformers model are written to `folder`.

        Raises:
            IsoPruneError: The model cannot be opened.
        """
        if self.library == "transformers":
            head = {} if self.num_labels is None else {"num_labels": self.num_labels}
            config = CONFIG_MAPPING[self.family](**self.args, **head)
            config.architectures = [self.model] if self.model else None
            config.save_pretrained(folder)
            if self.side is not None:
                processor = ViTImageProcessor(size={"height": self.side, "width": self.side})
                processor.save_pretrained(folder)
            if self.model.endswith("Backbone"):
                return open_backbone(self.model, config, processor)
            return load_base(str(folder), pretrained=False, tasks=TASK_FORMS)
        base = load_base(
            f"{self.library}/{self.model}",
            pretrained=False,
            model_args=self.args,
            num_labels=self.num_labels,
            tasks=TASK_FORMS,
        )
        return base if self.side is None else at_size(base, self.side)


def at_size(base: BaseModel, side: int) -> BaseModel:
    """Return a base for images of another size, with a processor that scales them to it; changes its config."""
    base.model.config.image_size = [3, side, side]
    old = base.processor
    processor = IsoImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=old.resample,
        image_mean=list(old.image_mean),
        image_std=list(old.image_std),
    )
    return BaseModel(base.model, processor)


def open_backbone(name: str, config: PreTrainedConfig, processor: ViTImageProcessor) -> BaseModel:
    """Return a backbone, which is passed in Python: no name opens it."""
    torch.manual_seed(0)
    network = getattr(transformers, name)(config).eval()
    images = torch.zeros(1, 3, processor.size["height"], processor.size["width"])
    batches = read_batches([images], samples=1, batch_size=1, keys=None)
    return BaseModel(hold(network, batches, None, reads_targets=False).model, processor)


def anchor() -> list[Case]:
    """Return the smallest classifier of every model file of timm, reduced, and one of every type of transformers."""
    found = found_rows()
    timm_cases = [found_case(name, found[name]) for name in (f"timm/{model}" for model in TIMM.values())]
    sides = {kind: None if hasattr(default_tower(kind), "image_size") else SIDE for kind in TRANSFORMERS}
    return timm_cases + [
        Case(f"transformers/{kind}", "transformers", kind, args=args, side=sides[kind], num_labels=LABELS)
        for kind, args in TRANSFORMERS.items()
    ]


def named() -> list[Case]:
    """Return all architectures of up to 100 M parameters that the libraries name, reduced by `coverage_reduce.py`."""
    return [
        found_case(name, row) for name, row in found_rows().items() if "side" in row and row["params"] <= MAX_MILLIONS
    ]


def tasks() -> list[Case]:
    """Return networks of the tasks without labels, see `coverage_tasks.py`."""
    rows = found_rows()
    cases = [found_case(name, rows[name], IMAGE_FEATURE_EXTRACTION.task) for name in ENCODERS_OF_TIMM]
    for task, networks in NETWORKS.items():
        for model, (kind, args) in networks.items():
            cases.append(
                Case(f"transformers/{model}", "transformers", kind, model, args, SIDES.get(model, SIDE), task=task)
            )
    return cases


def found_case(name: str, row: dict[str, Any], task: str = IMAGE_CLASSIFICATION.task) -> Case:
    """Return the case of a row that `coverage_reduce.py` found."""
    library, _, model = name.partition("/")
    args, side = row["args"], row["side"]
    if library == "transformers":
        is_sized, args = hasattr(default_tower(row["family"]), "image_size"), config_args(row["family"], args)
    else:
        is_sized = "img_size" in args
    has_no_head = library == "timm" and is_encoder(model)  # its head would be drawn twice
    is_classifier = task == IMAGE_CLASSIFICATION.task
    num_labels = LABELS if is_classifier and (has_no_head or library == "transformers") else None
    return Case(name, library, row["family"], model, args, None if is_sized else side, num_labels, task)


def default_tower(kind: str) -> PreTrainedConfig:
    """Return the default config of a type of transformers; of two towers, that of the images."""
    config = CONFIG_MAPPING[kind](**CONFIGS.get(kind, {}))
    tower: PreTrainedConfig = getattr(config, "vision_config", config)
    return tower


def config_args(kind: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a config of transformers that change values of `default_tower`."""
    config, tower = CONFIG_MAPPING[kind](**CONFIGS.get(kind, {})), default_tower(kind)
    if isinstance(getattr(tower, "image_size", None), list | tuple) and "image_size" in args:
        args = args | {"image_size": [args["image_size"]] * 2}
    return CONFIGS.get(kind, {}) | ({"vision_config": args} if hasattr(config, "vision_config") else args)


def found_rows() -> dict[str, dict[str, Any]]:
    """Return the rows that `coverage_reduce.py` found."""
    rows: dict[str, dict[str, Any]] = json.loads(NAMED.read_text(encoding="utf-8"))
    return rows


def not_applicable(population: str) -> dict[str, str]:
    """Return the models of a population that are no classifiers of images here, with the reason."""
    if population == "anchor":
        return NOT_APPLICABLE
    if population == "tasks":
        return OTHER_NETWORKS
    return {name: row["reason"] for name, row in found_rows().items() if "reason" in row}


def cases_of(population: str) -> list[Case]:
    """Return the cases of a population that are counted."""
    cases = POPULATIONS[population]()
    return [case for case in cases if case.name not in NOT_APPLICABLE]


POPULATIONS = {"anchor": anchor, "named": named, "tasks": tasks}


def in_strata(cases: list[Case], seed: int) -> list[Case]:
    """Return cases in an order of which every beginning is a stratified sample by library and family."""
    random = Random(seed)
    strata: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        strata.setdefault((case.kind, case.family), []).append(case)
    places = {}
    for stratum in strata.values():
        random.shuffle(stratum)
        start = random.random()
        for index, case in enumerate(stratum):
            places[case.name] = (index + start) / len(stratum)
    return sorted(cases, key=lambda case: places[case.name])


def sample(cases: list[Case], share: float, seed: int) -> list[Case]:
    """Return a stratified share of cases, at least one."""
    return in_strata(cases, seed)[: max(1, round(share * len(cases)))]
