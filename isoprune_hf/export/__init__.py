"""Export a model to another runtime and check its logits against PyTorch.

Entry points: `export.export_model` (write a folder) and `export.check_export` (check the request before any work). A
format is one file with a class that follows `formats.ExportFormat`, and one entry in `formats.FORMATS`; its precisions
of eight bits are functions of its own (`values.Quantizer`).

This folder must not know the command line, model cards, or how a model was pruned.
"""
