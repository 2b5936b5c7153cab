"""Rules: what an operation does to the axes of its tensors. One file per kind of operation.

A file lists axis rules (`@rule`, by the name in aten, see `registry.AxisRule`) and size rules (`@size_rule`, by the
name of the Python function, see `registry.SizeRule`); `tables.py` merges them into `AXIS_RULES` and `SIZE_RULES`.

To support another operation, add a function with `@rule("NAME")` to the file of its kind, and a case to the test of
that file. If it takes sizes as integers, add a `@size_rule`. A new file also needs a line in `tables.py`. Without a
rule, the axes that an operation touches are frozen. Rules must not depend on modules, groups or architectures.
"""
