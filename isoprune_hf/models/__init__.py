"""Open base models by name, folder or Hub id, each with its image processor.

- `load_base`: open a model of timm, torchvision, transformers or isoprune_hf.
- `identify.identify`: determine library and place of a name without opening the model.
- `processors.with_transform`: change the evaluation transform of an image processor.

`load.OPENERS` has one opener for each library, in `from_timm`, `from_torchvision`, `from_transformers` and
`from_isoprune`. Knows nothing of data sets, pruning or commands.
"""

from isoprune_hf.models.base import BaseModel
from isoprune_hf.models.load import load_base

__all__ = ["BaseModel", "load_base"]
