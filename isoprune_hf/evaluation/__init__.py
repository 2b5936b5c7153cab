"""Evaluation of classifiers and features: every image of a split is counted exactly once, on any number of ranks.

Entry points:
    `evaluate.evaluate_model` returns accuracy, loss and calibration error of a model on a split.
    `features.evaluate_features` compares features with those of the dense network, `segmentation.evaluate_pixels` the
    classes of pixels, also with masks, and `comparing.compare_outputs` any outputs by given measures.
    `evaluate.predict_split` returns the predictions behind them, for `compute_figures`, with a table by class.

Nothing here knows about pruning, training or the command line.
"""
