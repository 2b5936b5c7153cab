"""Isomorphic Pruning for Hugging Face vision models: score, cut to a budget, finetune, open anywhere."""

from typing import TYPE_CHECKING, Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotImageClassification,
)

from isoprune_hf.checkpoint.modeling_isoprune import (
    IsoImageProcessor,
    IsoPruneBackbone,
    IsoPruneConfig,
    IsoPruneForDepthEstimation,
    IsoPruneForImageClassification,
    IsoPruneForObjectDetection,
    IsoPruneForSemanticSegmentation,
    IsoPruneForZeroShotImageClassification,
    IsoPruneModel,
)
from isoprune_hf.errors import (
    BudgetError,
    CheckpointError,
    DatasetError,
    ExportError,
    HubError,
    ImageError,
    IsoPruneError,
    MissingExtraError,
    RecipeError,
    UnsupportedArchitectureError,
)
from isoprune_hf.extras import require_package
from isoprune_hf.recipes import DataRecipe, FinetuneRecipe, PruneRecipe
from isoprune_hf.version import __version__

if TYPE_CHECKING:
    from isoprune_hf.api.evaluate import evaluate_model
    from isoprune_hf.api.finetune import finetune
    from isoprune_hf.api.prune import prune
    from isoprune_hf.api.pruned import Pruned
    from isoprune_hf.data.dataset import load_data
    from isoprune_hf.export.export import export_model
    from isoprune_hf.models import load_base
    from isoprune_hf.pruning.cost.macs import cost_model, count_cost
    from isoprune_hf.pruning.cutting.cut import apply_plan
    from isoprune_hf.pruning.deciding.make_plan import make_plan
    from isoprune_hf.pruning.graph.blocks import find_blocks
    from isoprune_hf.pruning.graph.find_groups import trace_groups
    from isoprune_hf.pruning.plan import PruningPlan
    from isoprune_hf.pruning.prune import prune_model
    from isoprune_hf.pruning.scoring.score_groups import score_groups
    from isoprune_hf.pruning.scoring.scores import ImportanceScores
    from isoprune_hf.reporting.model_card import build_model_card

# Imported on first use: opening a pruned model needs none of these modules.
_LAZY = {
    "prune": "api.prune",
    "Pruned": "api.pruned",
    "load_base": "models",
    "find_blocks": "pruning.graph.blocks",
    "cost_model": "pruning.cost.macs",
    "count_cost": "pruning.cost.macs",
    "trace_groups": "pruning.graph.find_groups",
    "ImportanceScores": "pruning.scoring.scores",
    "score_groups": "pruning.scoring.score_groups",
    "PruningPlan": "pruning.plan",
    "make_plan": "pruning.deciding.make_plan",
    "prune_model": "pruning.prune",
    "apply_plan": "pruning.cutting.cut",
    "export_model": "export.export",
    "build_model_card": "reporting.model_card",
    "load_data": "data.dataset",
    "evaluate_model": "api.evaluate",
    "finetune": "api.finetune",
}

__all__ = [
    "BudgetError",
    "CheckpointError",
    "DataRecipe",
    "DatasetError",
    "ExportError",
    "FinetuneRecipe",
    "HubError",
    "ImageError",
    "ImportanceScores",
    "IsoImageProcessor",
    "IsoPruneBackbone",
    "IsoPruneConfig",
    "IsoPruneError",
    "IsoPruneForDepthEstimation",
    "IsoPruneForImageClassification",
    "IsoPruneForObjectDetection",
    "IsoPruneForSemanticSegmentation",
    "IsoPruneForZeroShotImageClassification",
    "IsoPruneModel",
    "MissingExtraError",
    "PruneRecipe",
    "Pruned",
    "PruningPlan",
    "RecipeError",
    "UnsupportedArchitectureError",
    "__version__",
    "apply_plan",
    "build_model_card",
    "cost_model",
    "count_cost",
    "evaluate_model",
    "export_model",
    "find_blocks",
    "finetune",
    "load_base",
    "load_data",
    "make_plan",
    "prune",
    "prune_model",
    "score_groups",
    "trace_groups",
]

AutoConfig.register("isoprune", IsoPruneConfig)
AutoBackbone.register(IsoPruneConfig, IsoPruneBackbone)
AutoModel.register(IsoPruneConfig, IsoPruneModel)
AutoModelForImageClassification.register(IsoPruneConfig, IsoPruneForImageClassification)
AutoModelForDepthEstimation.register(IsoPruneConfig, IsoPruneForDepthEstimation)
AutoModelForObjectDetection.register(IsoPruneConfig, IsoPruneForObjectDetection)
AutoModelForSemanticSegmentation.register(IsoPruneConfig, IsoPruneForSemanticSegmentation)
AutoModelForZeroShotImageClassification.register(IsoPruneConfig, IsoPruneForZeroShotImageClassification)
AutoImageProcessor.register(
    IsoPruneConfig, image_processor_classes={"pil": IsoImageProcessor, "torchvision": IsoImageProcessor}
)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'isoprune_hf' has no attribute {name!r}")
    return getattr(require_package(f"isoprune_hf.{_LAZY[name]}", name), name)


def __dir__() -> list[str]:
    return sorted(__all__)
