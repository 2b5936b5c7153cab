"""The second engine: coupled groups from the dependency graph of the library torch-pruning.

It is an independent reference for the axis engine and the engine of `preset: reference`. Entry point:
`depgraph.couple_nodes`. Only this folder imports torch_pruning, and only `architectures` depends on particular builds
of attention and patch merging. It must not depend on the axis graph.
"""
