"""One file for each repair of a cut model.

Entry points:
    task.Repair: The protocol that every repair implements, and `RepairTask`, its argument.
    registry.REPAIRS: All repairs by name.

How to add one: docs/extending.md.
"""
