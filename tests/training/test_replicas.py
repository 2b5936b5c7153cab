import re
from typing import Any

import pytest
from accelerate import Accelerator

from isoprune_hf.errors import DatasetError, RecipeError
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.replicas import count_parts, fit_batch_size

ACCELERATOR = Accelerator(cpu=True)  # the log of ranks needs one


def make_recipe(**changes: Any) -> FinetuneRecipe:
    return FinetuneRecipe(**{"batch_size": 32, **changes})


def test_indivisible_batch_lists_the_nearest_valid_sizes():
    with pytest.raises(RecipeError, match=r"finetune\.batch_size .*2 x 3.* 32; .* 30 or 36"):
        fit_batch_size(1000, make_recipe(grad_accumulation=3), world=2)
    with pytest.raises(RecipeError, match=r"finetune\.batch_size .*2 x 32.* 32; .* 64$"):
        fit_batch_size(1000, make_recipe(grad_accumulation=32), world=2)


def test_small_split_shrinks_the_batch(caplog):
    assert fit_batch_size(32, make_recipe(grad_accumulation=4), world=2) == 32
    assert fit_batch_size(31, make_recipe(grad_accumulation=4), world=2) == 24
    assert re.search("finetune.batch_size 32 .* 31 .* 24", caplog.text)


def test_fewer_images_than_parts_raises():
    with pytest.raises(DatasetError, match=r"finetune: 7 .*2 x 4; .*finetune\.grad_accumulation"):
        fit_batch_size(7, make_recipe(grad_accumulation=4), world=2)


def test_indivisible_parts_list_the_valid_ranks():
    assert count_parts(make_recipe(virtual_replicas=8), world=4) == 8
    assert count_parts(make_recipe(grad_accumulation=3), world=4) == 12
    with pytest.raises(RecipeError, match=r"finetune\.virtual_replicas 8 .* 3 .* 1 or 2 or 4 or 8"):
        fit_batch_size(1000, make_recipe(virtual_replicas=8), world=3)
    with pytest.raises(RecipeError, match=r"finetune\.batch_size .*virtual_replicas = 5.* 32; .* 30 or 35"):
        fit_batch_size(1000, make_recipe(virtual_replicas=5), world=1)


def test_paired_images_need_even_parts():
    with pytest.raises(
        RecipeError, match=r"finetune\.batch_size .*2 x virtual_replicas = 32 .*mixup_pairing.* 32; .* 64"
    ):
        fit_batch_size(1000, make_recipe(virtual_replicas=32, mixup=0.2), world=1)
    assert fit_batch_size(1000, make_recipe(virtual_replicas=32, mixup=0.2, mixup_pairing="roll"), world=1) == 32
