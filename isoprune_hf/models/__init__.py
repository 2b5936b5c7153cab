"""Open a base model, with its image processor, from timm, transformers, torchvision or a folder of ours."""

from isoprune_hf.models.base import BaseModel
from isoprune_hf.models.load import load_base

__all__ = ["BaseModel", "load_base"]
