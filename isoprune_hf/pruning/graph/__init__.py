"""Find the coupled groups of a model: the channels that can only be removed together, for any architecture.

    trace    tracer.trace_network        -> Trace          one forward pass; `rules/` has a rule for each operation
             train_mode.trace_train_mode                   adds the parts that only train mode runs
    unify    unify.unify                 -> Axis           the rules make axes the same axis, split or freeze them
    solve    equations.solve_equations   -> Solution       attributes that depend on sizes, and linked widths
             comparisons.freeze_compared                   freezes sizes that the code compares with literals
    leaves   axis_graph.build_axis_graph -> AxisGraph      free leaves, heads and their dims; runs the steps above
    groups   members.couple_axes         -> CoupledGroup   the elements of each leaf, by parameter and index
    verify   verify.check_cut            -> {name: shape}  the cut network runs as the trace predicts, or an error

A dim of a tensor is an `Axis`: a leaf, a product of factors, or a sum of pieces. A leaf that may be pruned is free;
every other leaf is frozen with a reason. An operation without a rule freezes what it touches, so a group may be
missing but is never wrong. docs/axes.md explains the method.

Functions for other folders:

    find_groups.trace_groups, find_groups.graph_of   the groups of a model, and its axis graph
    blocks.find_blocks                               residual blocks that can be removed whole
    widths.leaf_ties, widths.widths_of               sizes of matrix products as functions of widths
    verify.sizes_after, check_cut, total_macs        after a cut; train_masks: parts that only train mode runs
    output_masks.output_masks                        after a cut; which elements of the outputs of layers are kept
    copying, layers                                  copies of module trees; layer classes by kind

`torch_pruning/` finds groups independently, with the library of that name. Nothing here depends on scores, budgets,
plans or files.
"""
