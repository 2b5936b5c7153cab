"""An axis-level dependency graph: which elements of which tensors can only leave together."""
