"""The benchmark of features: what it measures of a network and of a broken copy of it."""

import copy

import pytest
import torch
from features import measure, read_digits, train

pytestmark = pytest.mark.benchmarks


def test_copy_has_equal_features_and_broken_one_none() -> None:
    images, labels = read_digits()
    dense, head = train(images[:128], labels[:128], steps=2)
    cosine, positions, near, top1 = measure(copy.deepcopy(dense), dense, head, images[:64], labels[:64])
    assert (cosine, positions) == ("1.0000", "1.0000")
    right = (head(dense(images[:64]).pooler_output).argmax(1) == labels[:64]).float().mean()
    assert float(top1) == pytest.approx(100 * float(right), abs=0.06) and 0 <= float(near) <= 100
    broken = copy.deepcopy(dense)
    with torch.no_grad():
        broken.layernorm.weight.neg_()
        broken.layernorm.bias.neg_()
    assert measure(broken, dense, head, images[:64], labels[:64])[:2] == ["-1.0000", "-1.0000"]
