"""Cut a model to a plan, and convert uniform cuts to stock models of transformers.

Entry points: `cut.apply_plan` cuts a copy of a base, `replay.replay_plan` cuts it to a plan that was saved,
`uniform.to_stock` converts a cut with equal blocks. `attributes.set_attributes` updates the numbers that modules keep
about their tensors; `stock_timm` and `stock_transformers` hold the conversions.

Nothing here knows scores, budgets or images.
"""
