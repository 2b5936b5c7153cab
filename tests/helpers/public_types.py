"""A program that uses the public API, for the type checker (`make types`): what it gives is what stands here.

A line with `type: ignore` is a mistake that must be found: one that is not found is an error, too.
"""

from typing import assert_type

from accelerate import Accelerator
from transformers import BaseImageProcessor

from isoprune_hf import (
    BudgetError,
    DataRecipe,
    FinetuneRecipe,
    ImportanceScores,
    IsoPruneConfig,
    IsoPruneError,
    IsoPruneForImageClassification,
    PruneRecipe,
    PruningPlan,
    apply_plan,
    cost_model,
    count_cost,
    evaluate_model,
    find_blocks,
    finetune,
    load_base,
    load_data,
    make_plan,
    prune_model,
    score_groups,
    trace_groups,
)

model, processor = load_base("timm/test_vit", pretrained=False)
assert_type(model, IsoPruneForImageClassification)
assert_type(processor, BaseImageProcessor)
assert_type(model.config, IsoPruneConfig)
assert_type(count_cost(model).macs, int)

groups = trace_groups(model)
assert_type(groups[0].channels, int)
scores = score_groups(model, groups, criterion="l1")
assert_type(scores, ImportanceScores)
recipe = PruneRecipe(criterion="l1", target_macs="50%")
plan = make_plan(groups, scores, recipe, cost=cost_model(model, groups), blocks=find_blocks(model))
assert_type(plan, PruningPlan)
assert_type(PruningPlan.from_json(plan.to_json()), PruningPlan)
assert_type(apply_plan(model, plan, groups), IsoPruneForImageClassification)

data = load_data(DataRecipe(dataset="digits"))
assert_type(data.label_names, tuple[str, ...])
if data.evaluation is not None:
    assert_type(evaluate_model(model, data.evaluation, processor), dict[str, float | int])
try:
    result = prune_model(model, recipe)
    assert_type(result.pruned_cost.params, int)
    finetune(result.model, data, processor, FinetuneRecipe(epochs=1), accelerator=Accelerator())
    result.save("pruned", processor)
except BudgetError as error:
    mended: IsoPruneError = error
    bad: ValueError = error

PruneRecipe(criterion="l3")  # type: ignore[arg-type]
PruneRecipe(ratoi=0.5)  # type: ignore[call-arg]
load_base(3)  # type: ignore[arg-type]
make_plan(groups, recipe, scores)  # type: ignore[arg-type]
apply_plan(model, scores)  # type: ignore[arg-type]
_ = prune_model(model, recipe).pruned  # type: ignore[attr-defined]
recipe.ratio = 0.4  # type: ignore[misc]
