from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_base
from timm import create_model
from timm.layers import DropPath

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import FinetuneRecipe, PruneRecipe
from isoprune_hf.training.regularisation import regularised


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"depth": 4, "embed_dim": 32, "num_heads": 2}),
        ("convnext_atto", {"depths": [1, 2, 3, 1], "dims": [8, 16, 24, 32]}),
        ("swin_tiny_patch4_window7_224", {"depths": [2, 2, 2], "num_heads": [1, 2, 2], "embed_dim": 16}),
    ],
)
def test_drop_rates_equal_a_new_timm_network(name: str, args: dict) -> None:
    new = create_model(name, drop_path_rate=0.3, drop_rate=0.2, **args)
    network = create_model(name, **args)
    before = [repr(module) for module in network.modules()]

    def rates(model: torch.nn.Module) -> dict[str, float]:
        found = {n: m.drop_prob for n, m in model.named_modules() if isinstance(m, DropPath)}
        return {name: rate for name, rate in found.items() if rate}

    with regularised(network, FinetuneRecipe(drop_path=0.3, dropout=0.2)):
        assert rates(network) == pytest.approx(rates(new), abs=1e-6)
        drops = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Dropout) and m.p == 0.2]
        assert drops == [n for n, m in new.named_modules() if isinstance(m, torch.nn.Dropout) and m.p == 0.2] != []
    assert [repr(module) for module in network.modules()] == before


@pytest.mark.parametrize("family", ["resnet", "mobilenet_v2"])
def test_dropout_is_active_only_inside_the_block(family: str, tmp_path: Path) -> None:
    model = make_base(family, tmp_path)
    images = torch.randn(2, 3, 64, 64)
    plain = model.eval()(images).logits
    for module in model.modules():
        module.training = isinstance(module, torch.nn.Dropout) or module is model.model
    with regularised(model, FinetuneRecipe(dropout=1 - 1e-9)):  # nothing gets through
        dropped = model(images).logits
    heads = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    torch.testing.assert_close(dropped, heads[-1].bias.expand_as(dropped))
    assert torch.equal(model.eval()(images).logits, plain)


def test_removed_blocks_count_in_the_drop_rates(tmp_path: Path) -> None:
    base = make_base("vit", tmp_path)
    pruned = prune_model(base, PruneRecipe(criterion="l1", ratio=0, remove_blocks=["blocks.0"])).model
    with regularised(pruned, FinetuneRecipe(drop_path=0.4)):
        assert [m.drop_prob for m in pruned.modules() if isinstance(m, DropPath)] == [0.4, 0.4]


def test_model_without_dropout_or_depth_raises(tmp_path: Path) -> None:
    resnet = make_base("hf-resnet", tmp_path)
    no_depth, no_dropout = r"drop_path 0.1: \w+ has no stochastic depth", r"dropout 0.1: \w+ has no dropout before"
    with pytest.raises(RecipeError, match=no_depth), regularised(resnet, FinetuneRecipe(drop_path=0.1)):
        pass
    with pytest.raises(RecipeError, match=no_dropout), regularised(resnet, FinetuneRecipe(dropout=0.1)):
        pass
    with regularised(resnet, FinetuneRecipe(dropout=0.0, drop_path=0.0)):
        pass
