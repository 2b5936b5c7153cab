"""Spearman's rank correlation: whether two scorings rank alike."""

import math

import numpy as np


def correlate_ranks(first: np.ndarray, second: np.ndarray) -> float:
    """Give Spearman's rank correlation of two (n,) arrays; ties share their mean rank; nan where one is constant."""
    first, second = (_rank(values) - (len(values) + 1) / 2 for values in (first, second))
    length = math.sqrt((first @ first) * (second @ second))
    return float(first @ second) / length if length else math.nan


def _rank(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
