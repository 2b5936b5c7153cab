"""List the models of `coverage.py`: the populations `anchor` and `named`, and stratified samples of them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from coverage_anchor import LABELS, NOT_APPLICABLE, TIMM, TRANSFORMERS
from transformers import CONFIG_MAPPING, PreTrainedConfig, ViTImageProcessor

from isoprune_hf import IsoImageProcessor
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
    """

    name: str
    library: str
    family: str
    model: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    side: int | None = None
    num_labels: int | None = None

    def open(self, folder: Path) -> BaseModel:
        """Open the base with random weights; the files of a transformers model are written to `folder`.

        Raises:
            IsoPruneError: The model cannot be opened.
        """
        if self.library == "transformers":
            config = CONFIG_MAPPING[self.family](**self.args, num_labels=self.num_labels)
            config.architectures = [self.model] if self.model else None
            config.save_pretrained(folder)
            if self.side is not None:
                ViTImageProcessor(size={"height": self.side, "width": self.side}).save_pretrained(folder)
            return load_base(str(folder), pretrained=False)
        base = load_base(
            f"{self.library}/{self.model}", pretrained=False, model_args=self.args, num_labels=self.num_labels
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


def found_case(name: str, row: dict[str, Any]) -> Case:
    """Return the case of a row that `coverage_reduce.py` found."""
    library, _, model = name.partition("/")
    args, side = row["args"], row["side"]
    if library == "transformers":
        is_sized, args = hasattr(default_tower(row["family"]), "image_size"), config_args(row["family"], args)
    else:
        is_sized = "img_size" in args
    has_no_head = library == "timm" and is_encoder(model)  # its head would be drawn twice
    num_labels = LABELS if has_no_head or library == "transformers" else None
    return Case(name, library, row["family"], model, args, None if is_sized else side, num_labels)


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
    return {name: row["reason"] for name, row in found_rows().items() if "reason" in row}


def cases_of(population: str) -> list[Case]:
    """Return the cases of `anchor` or `named` that are classifiers of images."""
    cases = anchor() if population == "anchor" else named()
    return [case for case in cases if case.name not in NOT_APPLICABLE]


def in_strata(cases: list[Case], seed: int) -> list[Case]:
    """Return cases in an order of which every beginning is a stratified sample by library and family."""
    random = Random(seed)
    strata: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        strata.setdefault((case.library, case.family), []).append(case)
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
