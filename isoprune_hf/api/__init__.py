"""The calls of a Python program: `prune`, which takes any module and any batches, and gives a module of the same type.

- `prune.prune`: open, score, cut and repair in one call.
- `pruned.Pruned`: the result.

A call opens what it is given into the values that `pruning` takes, as the stages of `commands` do for the command
line; it has no way of its own to score or cut.
"""
