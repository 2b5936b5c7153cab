"""Measure how long a forward pass takes and how much memory it needs.

Entry points: `speed.measure_latency` (median milliseconds of several models, measured in turns), `speed.time_against`
(a base that is opened once, against cuts of it), `cases.measure_cases` (base and pruned model in every runtime, dtype
and batch size), `onnx_profile.time_onnx_layers` (layers inside ONNX Runtime), `module_times.share_of_modules` (where
the time goes) and `memory.peak_memory` (bytes). `runtimes/` has one file for each runtime; `timing` has the loop, and
the rule by which a machine counts as busy.

This folder knows models as modules that take pixels. It must not know how they were pruned, how exported folders look,
or how results are shown.
"""
