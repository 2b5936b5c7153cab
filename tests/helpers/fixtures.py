"""Models pruned once in a session, the folders they are saved in, and a clean interpreter."""

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.fresh_python import FreshPython
from helpers.pruned_models import LABELS, Pruned
from helpers.tiny_models import TIMM, make_base, make_images

from isoprune_hf.models import load_base
from isoprune_hf.pruning.cost import latency_cache
from isoprune_hf.pruning.prune import prune_model
from isoprune_hf.recipes import PruneRecipe


@pytest.fixture(scope="session", autouse=True)
def own_latency_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep fitted times in a folder of this session: tests neither read nor write those of the user."""
    folder = tmp_path_factory.mktemp("latency")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_cache, "cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pruned]:
    """Return a function that returns the pruned model of a family of `tiny_models`; it must not be changed."""
    made: dict[str, Pruned] = {}
    root = tmp_path_factory.mktemp("pruned")

    def give(family: str) -> Pruned:
        if family not in made:
            base = make_base(family, root / "bases", labels=len(LABELS))
            base.config.id2label = LABELS
            base.config.label2id = {name: index for index, name in LABELS.items()}
            name, args = TIMM.get(family, (str(root / "bases" / family), None))
            processor = load_base(name, False, model_args=args).processor
            recipe = PruneRecipe(criterion="l1", ratio=0.4, head_ratio=0.3, head_dim_ratio=0.3, round_to=1)
            result = prune_model(base, recipe)
            result.save(root / family, processor)
            images = make_images(base)
            with torch.no_grad():
                logits = result.model(images).logits
            made[family] = Pruned(result.model, processor, root / family, images, logits)
        return made[family]

    return give


@pytest.fixture(scope="session")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshPython]:
    """An interpreter that runs scripts in clean processes."""
    python = FreshPython(tmp_path_factory.mktemp("fresh"))
    yield python
    python.close()
