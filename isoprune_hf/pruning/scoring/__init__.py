"""Importance scores: from images or weights to one number for each channel and each residual block.

Entry points:
    score_groups.score_groups: Score coupled groups and blocks by one criterion.
    scores.ImportanceScores: The result, with a record of how it was computed; saved and loaded as safetensors.
    criteria.registry.CRITERIA: All criteria by name; `criteria` has one file for each.
    trial_cuts.measure_trial_cuts: The divergence that cuts of single groups cause after a repair.
    gate_points.find_gate_points, gate_gradients.gate_gradients: Derivatives of the loss by gates on channels.

This folder knows neither which groups compete nor how many channels are removed: see `deciding`.
"""
