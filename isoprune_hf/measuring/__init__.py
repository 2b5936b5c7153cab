"""Measure how long a forward pass takes and how much memory it needs.

Entry points: `speed.measure_latency` (median milliseconds of several models, measured in turns),
`speed.record_measurement` (device and settings of a measurement), `memory.peak_memory` (bytes), and
`cases.measure_cases` (base and pruned model in every runtime, dtype and batch size).

This folder knows models as modules that take pixels. It must not know how they were pruned, how they are exported, or
how results are shown.
"""
