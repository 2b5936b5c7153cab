"""Passes over the calibration images of all ranks.

Entry points:
    calibration.Calibration: This rank's micro-batches with the accelerator and the precision of the passes.
    gradients.mean_gradients: Mean gradient of the loss over all images.
    gradients.scoring_mode: Context in which a model runs deterministically and is restored afterwards.
    gradients.sum_over_ranks: The one reduction over ranks that a pass needs.
    resumable.ResumableBatches: Micro-batches whose sums survive the process that adds them up.

This folder knows nothing about coupled groups, criteria or plans.
"""
