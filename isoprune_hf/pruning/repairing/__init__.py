"""Changes of weights without training: repairs of a model after the cut, and rotation of attention heads before it.

Entry points:
    repair.repair: Repair a cut model in place by one of the repairs in `repairs.registry.REPAIRS`.
    rotation.rotate_heads: Rotate heads so that few dims carry most of each product; the model computes the same.
    attention_scale.keep_scale: Restore the attention scale after a cut of rotated heads.
    fit_layers.fit_layers: Fit the layers of a cut network to those of the dense one.

This folder knows nothing about budgets and scores of channels: what was cut is a `PruningPlan`.
"""
