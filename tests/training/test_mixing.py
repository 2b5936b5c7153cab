import numpy as np
import pytest
import torch
from timm.data import Mixup
from torch.nn import functional

from isoprune_hf.data.augmentation import seeded_generators
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.mixing import mix

IMAGES = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 8, 8)
LABELS = torch.tensor([0, 1, 2, 0])


def test_nothing_is_mixed_by_default():
    images, labels = mix(IMAGES, LABELS, FinetuneRecipe(), num_classes=3, seeds=(0,))
    assert images is IMAGES and labels is LABELS


@pytest.mark.parametrize(("pairing", "partners"), [("flip", [3, 2, 1, 0]), ("roll", [3, 0, 1, 2])])
def test_mixup_pairs_images_and_targets_alike(pairing: str, partners: list[int]):
    recipe = FinetuneRecipe(mixup=1.0, mixup_pairing=pairing)
    images, targets = mix(IMAGES.clone(), LABELS, recipe, num_classes=3, seeds=(1, 2))
    share = (images[1, 0, 0, 0].item() - partners[1]) / (1 - partners[1])
    own, other = functional.one_hot(LABELS, 3).float(), functional.one_hot(LABELS[partners], 3).float()
    assert 0.0 < share < 1.0
    torch.testing.assert_close(targets, share * own + (1 - share) * other, atol=1e-6, rtol=0)
    torch.testing.assert_close(images, share * IMAGES + (1 - share) * IMAGES[partners], atol=1e-6, rtol=0)


@pytest.mark.parametrize("pairing", ["flip", "roll"])
def test_cutmix_weights_targets_by_box_area(pairing: str):
    recipe = FinetuneRecipe(cutmix=1.0, mixup_pairing=pairing)
    for seed in range(5):
        images, targets = mix(IMAGES.clone(), LABELS, recipe, num_classes=3, seeds=(seed,))
        area = (images[1, 0] == 1).float().mean().item()
        assert targets[1, 1].item() == pytest.approx(area, abs=1e-6)
        assert targets.sum(1).tolist() == pytest.approx([1.0] * 4)


def test_mixing_depends_on_its_seeds_only():
    recipe = FinetuneRecipe(mixup=0.8, cutmix=1.0, mixup_pairing="roll")
    torch.manual_seed(0)
    np.random.seed(0)
    first = mix(IMAGES.clone(), LABELS, recipe, num_classes=3, seeds=(3, 4))
    after = torch.rand(2), np.random.rand(2).tolist()
    torch.manual_seed(0)
    np.random.seed(0)
    assert torch.equal(torch.rand(2), after[0]) and np.random.rand(2).tolist() == after[1]
    again = mix(IMAGES.clone(), LABELS, recipe, num_classes=3, seeds=(3, 4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    others = [mix(IMAGES.clone(), LABELS, recipe, num_classes=3, seeds=(3, seed))[1] for seed in range(5, 9)]
    assert not all(torch.equal(first[1], other) for other in others)


def test_smoothing_in_the_loss_equals_timm_targets():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    recipe = FinetuneRecipe(mixup=0.8)
    _, targets = mix(IMAGES.clone(), LABELS, recipe, num_classes=3, seeds=(5,))
    with seeded_generators(5):
        _, smoothed = Mixup(0.8, 0.0, label_smoothing=0.1, num_classes=3)(IMAGES.clone(), LABELS)
    ours = functional.cross_entropy(logits, targets, label_smoothing=0.1)
    timms = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    assert ours.item() == pytest.approx(timms.item(), abs=1e-6)
