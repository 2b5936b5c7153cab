"""The metadata of a model card: what the Hub filters, links and shows beside the text. Call `describe_model`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData

from isoprune_hf.checkpoint.task_forms import task_of
from isoprune_hf.recipes.values import MULTI_LABEL
from isoprune_hf.reporting.places import plain_hub_id, show_place

_METRICS = {
    "top1": ("accuracy", "top-1 accuracy"),
    "top5": ("accuracy", "top-5 accuracy"),
    "map": ("mAP", "mean average precision"),
    "loss": ("loss", "loss"),
    "cosine": ("cosine_similarity", "cosine similarity with the features of the base"),
    "miou": ("mean_iou", "mean IoU of the classes of pixels"),
    "same_class": ("accuracy", "share of the pixels whose class is that of the base"),
    "delta1": ("accuracy", "share of the pixels whose depth is within 1.25 times that of the base"),
    "same_objects": ("f1", "share of the objects that the base finds, too (F1)"),
    "box_map": ("mAP", "mean average precision of boxes, at overlaps from 0.5 to 0.95 (COCO)"),
    "box_map_50": ("mAP", "mean average precision of boxes, at an overlap of 0.5"),
    "knn": ("accuracy", "accuracy of the 20 nearest other images (k-NN)"),
}
_MACS = ("macs", "MACs of one image (torch.utils.flop_counter)")
# Photographs that the Hub shows beside image classifiers; each has one class of ImageNet.
_SAMPLES = "https://huggingface.co/datasets/mishig/sample_images/resolve/main"
_SAMPLE_CLASSES = ("tiger", "teapot", "palace")


@dataclass(frozen=True)
class License:
    """The licence of a base, as the metadata of a card names it.

    Args:
        license: Identifier such as apache-2.0; `other` has a name and a link.
        name: Name of another licence.
        link: Address of its text.
    """

    license: str
    name: str | None = None
    link: str | None = None


def describe_model(
    config: Mapping[str, Any],
    figures: Mapping[str, Any],
    *,
    title: str,
    is_isomorphic: bool,
    base_license: License | None,
) -> ModelCardData:
    """Return the metadata of the card of a pruned model.

    Args:
        config: IsoPruneConfig fields of the folder.
        figures: Figures of the model itself, of `metrics.json`.
        title: Name of the model.
        is_isomorphic: The channels competed within isomorphic classes.
        base_license: Licence of the base on the Hub, where timm records none.
    """
    data, library = (config.get("recipe") or {}).get("data") or {}, (config.get("base") or {}).get("library")
    base_model = base_on_hub(config)
    found = license_of_timm(config) or (base_license if base_model else None)
    is_multi_label = config.get("problem_type") == MULTI_LABEL
    tags = [
        "isoprune",
        *(["isomorphic-pruning"] if is_isomorphic else []),
        "pruning",
        *(["multi-label-classification"] if is_multi_label else []),
        *([library] if library else []),
    ]
    labels = {name for text in (config.get("id2label") or {}).values() for name in str(text).split(", ")}
    shown = [name for name in _SAMPLE_CLASSES if name in labels]
    return ModelCardData(
        license=found.license if found else None,
        license_name=found.name if found else None,
        license_link=found.link if found else None,
        library_name="transformers",
        pipeline_tag=task_of(config.get("base")).pipeline,
        tags=tags,
        base_model=base_model,
        # The Hub knows adapter, merge, quantized and finetune: other weights than those of the base.
        base_model_relation="finetune" if base_model else None,
        datasets=plain_hub_id(data.get("dataset")),
        model_name=title,
        eval_results=_list_results(config, figures) or None,
        widget=[{"src": f"{_SAMPLES}/{name}.jpg", "example_title": name.title()} for name in shown] or None,
    )


def base_on_hub(config: Mapping[str, Any]) -> str | None:
    """Return the name on the Hub of the base whose trained weights were pruned; None if it is somewhere else."""
    source = config.get("source") or {}
    return plain_hub_id(source.get("name")) if source.get("pretrained") and not source.get("weights") else None


def license_of_timm(config: Mapping[str, Any]) -> License | None:
    """Return the licence that timm records for the pretrained weights of the base."""
    source, library = config.get("source") or {}, (config.get("base") or {}).get("library")
    name = source.get("name")
    if library != "timm" or not source.get("pretrained") or source.get("weights") or not isinstance(name, str):
        return None
    plain = re.sub(r"^(hf(-hub)?:)?(timm/)?", "", name)
    known = getattr(import_module("timm").get_pretrained_cfg(plain, allow_unregistered=True), "license", None)
    return License(known) if known else None


def list_benchmark_entries(config: Mapping[str, Any], figures: Mapping[str, Any]) -> list[EvalResultEntry]:
    """Return the entries of `.eval_results`, for the leaderboard of a data set; empty for figures of a sample.

    A leaderboard compares figures of the whole split of a data set of the Hub.
    """
    data = (config.get("recipe") or {}).get("data") or {}
    dataset, top1, split = plain_hub_id(data.get("dataset")), figures.get("top1"), figures.get("split")
    is_sample = "split_images" in figures or "[" in str(split or data.get("eval_split"))
    if dataset is None or top1 is None or is_sample:
        return []
    note = (
        f"top-1 accuracy in per cent on all {figures['images']:,} images" if "images" in figures else "top-1 accuracy"
    )
    split = split or data.get("eval_split")
    return [
        EvalResultEntry(
            dataset_id=dataset,
            task_id="default",
            value=round(100 * top1, 3),
            notes=f"{note} of split {split}, by isoprune_hf" if split else note,
        )
    ]


def _name_split(figures: Mapping[str, Any], data: Mapping[str, Any]) -> str | None:
    split: str | None = figures.get("split", data.get("eval_split"))
    return f"{split} (held out)" if "holdout_seed" in figures else split


def _list_results(config: Mapping[str, Any], figures: Mapping[str, Any]) -> list[EvalResult]:
    data, stage = (config.get("recipe") or {}).get("data") or {}, config.get("stage", "base")
    macs = ((config.get("cost") or {}).get("base" if stage == "base" else "pruned") or {}).get("macs")
    values = {kind: figures[key] for key, kind in _METRICS.items() if figures.get(key) is not None}
    if data.get("dataset") is None or not values:
        return []
    values |= {} if macs is None else {_MACS: macs}
    return [
        EvalResult(
            task_type=task_of(config.get("base")).pipeline,
            dataset_type=show_place(data["dataset"]),
            dataset_name=show_place(data["dataset"]),
            dataset_split=_name_split(figures, data),
            dataset_revision=data.get("revision"),
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for (kind, name), value in values.items()
    ]
