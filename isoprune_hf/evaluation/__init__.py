"""Evaluation of image classifiers: every image of a split is counted exactly once, on any number of ranks.

Entry points:
    `evaluate.evaluate_model` returns accuracy, loss and calibration error of a model on a split.
    `evaluate.predict_split` returns the predictions behind them, for `compute_figures` and `tabulate_classes`.

Nothing here knows about pruning, training or the command line.
"""
