"""The steps of `prune_model` and their shared inputs: score a model, decide, cut, repair."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.measuring.speed import time_against
from isoprune_hf.measuring.timing import Rounds
from isoprune_hf.pruning.calibration.calibration import Calibration
from isoprune_hf.pruning.cost.latency import LatencyModel
from isoprune_hf.pruning.cost.macs import CostModel
from isoprune_hf.pruning.cutting.carry_over import carry_over
from isoprune_hf.pruning.cutting.cut import apply_plan, keep_masks
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph.precision import in_stored_types
from isoprune_hf.pruning.groups import CoupledGroup, ResidualBlock
from isoprune_hf.pruning.latency_budget import MeasuredPair, latency_settings, meet_latency
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.repairing.attention_scale import keep_scale, undo_scale
from isoprune_hf.pruning.repairing.repair import repair
from isoprune_hf.pruning.repairing.rotation import Rotated
from isoprune_hf.pruning.score import score_with_recipe
from isoprune_hf.pruning.scoring.scores import ImportanceScores, Sample
from isoprune_hf.recipes import PruneRecipe

Value = TypeVar("Value")
_TIMED_PASSES = 20
_UNTIMED_PASSES = 3
_STAGES = ("trace", "rotate", "score", "solve", "cut", "repair")


@dataclass(frozen=True, eq=False)
class Traced:
    """Groups and cost of a base, found before anything is scored.

    Args:
        groups: Coupled groups.
        blocks: Residual blocks; empty if the recipe removes none.
        cost: Cost of every width.
        latency: Time of every width; None without a latency budget.
    """

    groups: tuple[CoupledGroup, ...]
    blocks: tuple[ResidualBlock, ...]
    cost: CostModel
    latency: LatencyModel | None


class Cut(NamedTuple):
    """A cut model with its plan, after the repair.

    Args:
        plan: What was kept.
        model: The cut model.
        factors: The factors of its queries, of `keep_scale`.
        notes: One line for each thing that could not be repaired.
    """

    plan: PruningPlan
    model: IsoPruneForImageClassification
    factors: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]


class StageClock:
    """Adds up the wall seconds of each stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(_STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block that it wraps."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


@dataclass(frozen=True, eq=False)
class PruningRun:
    """The steps of one pruning, with the inputs that they share.

    Args:
        model: The base.
        traced: Groups and cost of the base.
        rotated: The base with rotated heads, or as it is.
        images: Calibration images; None if the recipe reads none.
        accelerator: Ranks that share the images.
        sample: Description of the calibration sample.
        clock: Times of the stages.
    """

    model: IsoPruneForImageClassification
    traced: Traced
    rotated: Rotated
    images: Calibration | None
    accelerator: Accelerator | None
    sample: Sample | None
    clock: StageClock

    def score(
        self,
        recipe: PruneRecipe,
        model: IsoPruneForImageClassification,
        groups: Sequence[CoupledGroup],
        blocks: Sequence[ResidualBlock],
    ) -> ImportanceScores:
        """Score a model, the base or a smaller one."""
        with self.clock.stage("score"):
            return score_with_recipe(model, recipe, groups, self.images, blocks=blocks, sample=self.sample)

    def decide(self, recipe: PruneRecipe, scores: ImportanceScores) -> PruningPlan:
        """Make a plan for the base; the plan of the main process on every rank."""
        traced = self.traced
        plan = make_plan(traced.groups, scores, recipe, cost=traced.cost, latency=traced.latency, blocks=traced.blocks)
        return broadcast(plan, self.accelerator)

    def cut(self, plan: PruningPlan) -> IsoPruneForImageClassification:
        """Cut a copy of the rotated base."""
        return apply_plan(self.rotated.model, plan, self.traced.groups, base_cost=self.traced.cost.base)

    def cut_to_budget(
        self, recipe: PruneRecipe, scores: ImportanceScores
    ) -> tuple[PruningPlan, IsoPruneForImageClassification]:
        """Make the final plan and the final cut; for a latency budget several, which are measured."""
        traced = self.traced
        if traced.latency is None:
            with self.clock.stage("solve"):
                plan = self.decide(recipe, scores)
            with self.clock.stage("cut"):
                return plan, self.cut(plan)
        settings = latency_settings(recipe)

        def attempt(tried: PruneRecipe) -> tuple[PruningPlan, IsoPruneForImageClassification]:
            plan = self.decide(tried, scores)
            return plan, self.cut(plan)

        def measure(pruned: IsoPruneForImageClassification) -> MeasuredPair:
            stored, _ = in_stored_types(pruned, self.model)
            timing = time_pruned(stored)
            times = timing.undisturbed()
            return broadcast(MeasuredPair(times["base"], times["pruned"], timing.busy), self.accelerator)

        rounds = Rounds(_TIMED_PASSES, _UNTIMED_PASSES)
        with (
            self.clock.stage("solve"),
            time_against(
                self.model, batch_size=settings.batch_size, runtime=settings.runtime, rounds=rounds
            ) as time_pruned,
        ):
            return meet_latency(recipe, traced.cost, traced.latency, attempt=attempt, measure=measure)

    def repair(
        self, pruned: IsoPruneForImageClassification, plan: PruningPlan, recipe: PruneRecipe, earlier: Cut | None
    ) -> Cut:
        """Repair a cut model, in place.

        Args:
            pruned: A cut of the rotated base.
            plan: What it kept.
            recipe: Names the repair.
            earlier: An earlier cut that was repaired, with more channels; the repair begins with its weights. It is
                changed.
        """
        with self.clock.stage("repair"):
            groups, base = self.traced.groups, self.rotated.model
            name = recipe.reconstruct or "none"
            if earlier is not None and name != "none":
                undo_scale(self.rotated, earlier.model, earlier.factors)
                masks = [keep_masks(of_cut, groups, base.model) for of_cut in (earlier.plan, plan)]
                carry_over(earlier.model.model, masks[0], pruned.model, masks[1])
            factors = keep_scale(self.rotated, pruned, plan, groups)
            notes = repair(self.rotated, pruned, plan, groups, name, self.images, factors=factors)
        return Cut(plan, pruned, factors, notes)


def broadcast(value: Value, accelerator: Accelerator | None) -> Value:
    """Return the value of the main process on every rank."""
    if accelerator is None or accelerator.num_processes == 1:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]
