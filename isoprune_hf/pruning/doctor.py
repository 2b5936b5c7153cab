"""Check that a pruned model is sound: its records are true, its tensors can be reproduced, and a cut can reach it.

`check_model` needs no weights of the base; `check_replay` compares the tensors with those of the base.
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import AutoModelForImageClassification, BaseImageProcessor

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification, model_class_of
from isoprune_hf.checkpoint.structure import image_size_of, meta_copy
from isoprune_hf.checkpoint.task_forms import task_of
from isoprune_hf.errors import IsoPruneError, UnsupportedArchitectureError, WriteError
from isoprune_hf.models.base import hold_unlabelled
from isoprune_hf.pruning.cost.macs import count_cost
from isoprune_hf.pruning.cutting.cut import apply_plan
from isoprune_hf.pruning.cutting.uniform import to_stock
from isoprune_hf.pruning.graph.copying import copy_zeros
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.reach import describe_reach

_NUM_IMAGES = 2


class Finding(NamedTuple):
    """The result of one check.

    Args:
        check: Name of the check.
        verdict: ok, FAIL, or skip if the check does not apply.
        text: Its figure, or the reason.
    """

    check: str
    verdict: Literal["ok", "FAIL", "skip"]
    text: str


def check_model(
    model: IsoPruneForImageClassification, processor: BaseImageProcessor, plan: PruningPlan | None
) -> list[Finding]:
    """Run the checks that need no weights of the base.

    Args:
        model: The model of a folder, in eval mode; left untouched.
        processor: Its image processor.
        plan: Its plan; None if it has none.

    Raises:
        WriteError: No temporary files can be written, which is no fault of the model.
    """
    checks: dict[str, Callable[[], Finding]] = {
        "cost": lambda: _check_cost(model),
        "structure": lambda: _check_structure(model, plan),
        "no-op": lambda: _check_no_op(model),
        "save-load": lambda: _check_round_trip(model, processor),
        "reach": lambda: _check_reach(model),
    }
    findings = []
    for check, run in checks.items():
        try:
            findings.append(run())
        except WriteError:
            raise
        except (IsoPruneError, OSError) as error:
            findings.append(Finding(check, "FAIL", " ".join(str(error).split())))
    return findings


def check_replay(
    model: IsoPruneForImageClassification, base: IsoPruneForImageClassification, plan: PruningPlan
) -> Finding:
    """Check that a model that was not trained after its cut has the tensors of the base at the kept positions.

    Args:
        model: The pruned model.
        base: The dense base with its weights.
        plan: The plan of the cut.
    """
    changed = changed_after_cut(plan)
    if changed is not None:
        return Finding("tensors", "skip", changed)
    if fingerprint(base.model) != plan.fingerprint:
        return Finding("tensors", "skip", "the plan was made on other weights than those of the base")
    try:
        replayed = apply_plan(base, plan)
        expected = (to_stock(replayed) if _is_uniform(model) else replayed).model.state_dict()
    except IsoPruneError as error:
        return Finding("tensors", "FAIL", str(error))
    different = _first_difference(model.model.state_dict(), expected)
    if different:
        return Finding("tensors", "FAIL", f"{different} is not that of the base where the plan keeps it")
    return Finding("tensors", "ok", f"{len(expected)} tensors are those of the base, bit for bit")


def changed_after_cut(plan: PruningPlan) -> str | None:
    """Return the reason why the kept weights differ from those of the base; None if there is none."""
    steps = {"rotate": plan.settings.get("rotate"), "reconstruct": plan.settings.get("reconstruct", "none") != "none"}
    applied = " and ".join(f"prune.{name}" for name, is_applied in steps.items() if is_applied)
    return f"{applied} changed the weights that the plan keeps, as it records" if applied else None


def _check_cost(model: IsoPruneForImageClassification) -> Finding:
    if model.config.cost is None:
        return Finding("cost", "skip", "the config records none")
    # The config of a uniform layout does not describe its base.
    base = model.config.cost["base"] if _is_uniform(model) else count_cost(_dense_copy(model)).to_dict()
    now = {"base": base, "pruned": count_cost(model).to_dict()}
    if model.config.cost != now:
        return Finding("cost", "FAIL", f"config.cost is {model.config.cost}, counted anew it is {now}")
    macs, params = (f"{now['pruned'][key] / now['base'][key]:.1%}" for key in ("macs", "params"))
    return Finding("cost", "ok", f"{macs} of the base's MACs and {params} of its params, as recorded")


def _check_structure(model: IsoPruneForImageClassification, plan: PruningPlan | None) -> Finding:
    if plan is None:
        return Finding("structure", "skip", "there is no plan to compare it with")
    if _is_uniform(model):
        return _check_sizes(model, plan)
    if (model.config.source or {}).get("fingerprint") != plan.fingerprint:
        # The plan belongs to a model that had been cut before: only the resulting widths can be compared.
        return _check_widths(model, plan)
    planned = apply_plan(_dense_copy(model), plan).config.structure or {}
    recorded = model.config.structure or {}
    for kind in ("shapes", "attributes"):
        first, second = recorded.get(kind) or {}, planned[kind]
        for name in sorted(first.keys() | second.keys()):
            if first.get(name) != second.get(name):
                where = f"config.structure.{kind}[{name!r}]"
                return Finding(
                    "structure", "FAIL", f"{where} is {first.get(name)}, by the plan it is {second.get(name)}"
                )
    if set(recorded.get("removed") or []) != set(planned["removed"]):
        return Finding("structure", "FAIL", f"the plan removes {planned['removed']}, config.structure.removed differs")
    count = sum(len(attributes) for attributes in planned["attributes"].values())
    return Finding("structure", "ok", f"the plan gives its {len(planned['shapes'])} shapes and {count} attributes")


def _check_widths(model: IsoPruneForImageClassification, plan: PruningPlan) -> Finding:
    groups = {group.name: group for group in trace_groups(model)}
    for name, kept in plan.kept.items():
        if name.startswith(tuple(f"{block}." for block in plan.removed_blocks)):
            continue
        group, heads = groups.get(name), len(plan.heads.get(name, ()))
        if group is None or (group.channels, group.num_heads) != (len(kept), heads):
            have = "none" if group is None else f"{group.channels} channels and {group.num_heads} heads"
            text = f"the plan keeps {len(kept)} channels and {heads} heads of {name}, the model has {have}"
            return Finding("structure", "FAIL", text)
    text = f"the widths of {len(plan.kept)} groups are those of the plan, which speaks of a model cut before"
    return Finding("structure", "ok", text)


def _check_sizes(model: IsoPruneForImageClassification, plan: PruningPlan) -> Finding:
    """Check the sizes of a stock config against the widths of a plan."""
    config = model.model.config
    attention = (config.num_attention_heads, config.head_dim)
    for name, kept in plan.kept.items():
        heads = len(plan.heads.get(name, ()))
        if name.startswith(tuple(f"{block}." for block in plan.removed_blocks)):
            continue
        if heads and (heads, len(kept) // heads) != attention:
            text = f"the plan keeps {heads} heads of {len(kept) // heads} dims in {name}, the config has {attention}"
            return Finding("structure", "FAIL", text)
        if not heads and len(kept) not in (config.hidden_size, config.intermediate_size):
            return Finding("structure", "FAIL", f"the plan keeps {len(kept)} channels of {name}, a size of no layer")
    return Finding("structure", "ok", f"the widths of {len(plan.kept)} groups are the sizes of the stock config")


def _is_uniform(model: IsoPruneForImageClassification) -> bool:
    return model.config.layout == "uniform"


def _check_no_op(model: IsoPruneForImageClassification) -> Finding:
    groups = trace_groups(model)
    everything = PruningPlan(
        kept={group.name: tuple(range(group.channels)) for group in groups},
        heads={group.name: tuple(range(group.num_heads)) for group in groups if group.num_heads},
    )
    same = torch.equal(_logits(apply_plan(model, everything, groups)), _logits(model))
    text = f"a plan that keeps all of {len(groups)} groups "
    return Finding("no-op", "ok" if same else "FAIL", text + ("changes no output" if same else "changes the outputs"))


def _check_round_trip(model: IsoPruneForImageClassification, processor: BaseImageProcessor) -> Finding:
    with _temporary_folder() as folder:
        save_model_folder(Path(folder) / "model", model, processor)
        if _is_uniform(model):
            again = meta_copy(model)  # the wrapper, around the model that stock code opens
            again.model = AutoModelForImageClassification.from_pretrained(Path(folder) / "model")
        else:
            again = model_class_of(model.config).from_pretrained(Path(folder) / "model")
            if not task_of(model.config.base).has_classes:
                again = hold_unlabelled(again.config, again.model)
        different = _first_difference(again.model.state_dict(), model.model.state_dict())
        if different is None and not torch.equal(_logits(again), _logits(model)):
            different = "an output"
    if different:
        return Finding("save-load", "FAIL", f"{different} came back different")
    return Finding("save-load", "ok", f"tensors and the outputs for {_NUM_IMAGES} images come back bit for bit")


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise WriteError(f"no temporary folder can be made: {error}") from error


def _check_reach(model: IsoPruneForImageClassification) -> Finding:
    dense = _dense_copy(model)
    groups = trace_groups(dense)
    return Finding("reach", "ok" if groups else "FAIL", "\n".join(describe_reach(dense, groups)))


def _dense_copy(model: IsoPruneForImageClassification) -> IsoPruneForImageClassification:
    """Return the dense base of a model with zeros as its weights."""
    dense = meta_copy(model, dense=True)
    dense.model = copy_zeros(dense.model)
    return dense


def _first_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> str | None:
    """Return the name of the first tensor that differs in any bit, dtype or shape; None if all are equal."""
    for name in [*second, *(name for name in first if name not in second)]:
        if name not in first or name not in second or _bits(first[name]) != _bits(second[name]):
            return name
    return None


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, Iterable[int], bytes]:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), content


def _logits(model: IsoPruneForImageClassification) -> torch.Tensor:
    pixels = torch.randn(_NUM_IMAGES, *image_size_of(model), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(pixels.to(model.device)).logits
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UnsupportedArchitectureError(f"the model does not run: {error}") from error
    return logits
