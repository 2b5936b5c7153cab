"""One file for each importance criterion.

Entry points:
    criterion.Criterion: The protocol that every criterion implements, and `ScoringTask`, its argument.
    registry.CRITERIA: All criteria by name.

A criterion gives every element of every parameter a value and leaves the reduction to channels to `reduction`, or it
scores the channels of a group itself. Scores of different groups are made comparable elsewhere (see `deciding`).
How to add one: docs/extending.md.
"""
