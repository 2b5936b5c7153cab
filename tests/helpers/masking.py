"""Plans from random scores, and the base with the removed elements zeroed."""

import copy

import numpy as np
import torch
from torch import nn

from isoprune_hf.pruning.cost.macs import cost_model
from isoprune_hf.pruning.deciding.make_plan import make_plan
from isoprune_hf.pruning.graph.find_groups import trace_groups
from isoprune_hf.pruning.scoring.score_groups import score_groups
from isoprune_hf.recipes import PruneRecipe


def plan_random(model, seed=0, **options):
    groups = trace_groups(model)
    scores = score_groups(model, groups, criterion="random", seed=seed)
    recipe = PruneRecipe(
        **{"criterion": "taylor", "ratio": 0.4, "head_ratio": 0.3, "head_dim_ratio": 0.3, "round_to": 1, **options}
    )
    return groups, make_plan(groups, scores, recipe, cost=cost_model(model, groups))


class KeptNorm(nn.Module):
    """A norm with statistics over the kept channels only, and zeros in the others."""

    def __init__(self, norm, kept, channels_first):
        super().__init__()
        self.norm, self.kept, self.channels_first = norm, kept, channels_first

    def forward(self, hidden):
        hidden = hidden.movedim(1, -1) if self.channels_first else hidden
        weight, bias = self.norm.weight[self.kept], self.norm.bias[self.kept]
        if isinstance(self.norm, nn.GroupNorm):
            first = hidden[..., self.kept].movedim(-1, 1)
            inner = nn.functional.group_norm(first, self.norm.num_groups, weight, bias, self.norm.eps).movedim(1, -1)
        else:
            inner = nn.functional.layer_norm(hidden[..., self.kept], (len(self.kept),), weight, bias, self.norm.eps)
        output = torch.zeros_like(hidden)
        output[..., self.kept] = inner
        output = getattr(self.norm, "act", nn.Identity())(output)
        return output.movedim(-1, 1) if self.channels_first else output


def masked_base(model, groups, plan):
    """Return the base with removed elements at zero and norms over the kept channels, which the cut must equal."""
    masked = copy.deepcopy(model)
    removed = {}
    for group in groups:
        if group.name not in plan.kept:
            continue
        leaving = np.setdiff1d(np.arange(group.channels), plan.kept[group.name])
        for member in group.members:
            removed.setdefault((member.parameter, member.dim), set()).update(member.index[leaving].ravel().tolist())
        if group.num_heads:
            heads = plan.heads[group.name]
            head_dim = len(plan.kept[group.name]) // len(heads)
            # Eager and fused attention: the temperature is that of the dims that are left.
            ratio = (group.head_dim / head_dim) ** 0.5
            attention = masked.model.get_submodule(group.name)
            queries = getattr(attention, "qkv", None) or attention.q_proj
            rows = queries.weight.shape[0] if queries is getattr(attention, "q_proj", None) else group.channels
            with torch.no_grad():
                queries.weight[:rows] *= ratio
                if queries.bias is not None:
                    queries.bias[:rows] *= ratio
    with torch.no_grad():
        for (name, dim), positions in removed.items():
            tensor = masked.model.get_submodule(name.rpartition(".")[0])._parameters.get(name.rpartition(".")[2])
            if tensor is not None:
                tensor.index_fill_(dim, torch.tensor(sorted(positions)), 0.0)
    for path, module in list(masked.model.named_modules()):
        gone = removed.get((f"{path}.weight", 0))
        if isinstance(module, nn.LayerNorm | nn.GroupNorm) and gone:
            kept = torch.tensor([i for i in range(len(module.weight)) if i not in gone])
            channels_first = isinstance(module, nn.GroupNorm) or type(module).__name__ == "LayerNorm2d"
            channels_first = channels_first or getattr(module, "data_format", "") == "channels_first"
            masked.model.set_submodule(path, KeptNorm(module, kept, channels_first))
    return masked
