"""The average precision of each class, for images with several labels: `average_precisions`."""

import numpy as np


def average_precisions(scores: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Compute the average precision of each class, not interpolated.

    Args:
        scores: Scores of the N images for C classes, (N, C); only their order matters.
        references: 1 for the classes of an image, otherwise 0, (N, C).

    Returns:
        (C,): AP = sum over k of (R_k - R_(k-1)) P_k, where P_k and R_k are precision and recall of the images with one
        of the k highest scores, equal scores counted as one; NaN for a class without an image.

    Source:
        `average_precision_score` of scikit-learn; Everingham et al., The PASCAL visual object classes challenge: a
        retrospective, IJCV 2015, section 3.2.1 (the area under the curve of precision and recall).
    """
    return np.array([_average_precision(*pair) for pair in zip(scores.T, references.T, strict=True)])


def _average_precision(scores: np.ndarray, references: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    is_last = np.append(ranked[1:] != ranked[:-1], True)  # of images with equal scores
    found = np.cumsum(references[order], dtype=np.int64)[is_last]
    if not found[-1]:
        return float("nan")
    precisions = found / (np.flatnonzero(is_last) + 1)
    return float(np.sum(np.diff(found, prepend=0) * precisions) / found[-1])
