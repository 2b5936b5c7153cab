"""Small networks of images and texts, with a tokenizer whose words are those of the labels of tests."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

_VISION = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MARKS = ["<pad>", "<start>", "<end>", "<unk>"]
_WORDS = [*_MARKS, "This", "is", "a", "photo", "of", "animal", "object", "red", "blue", ".", "an"]


def make_clip() -> transformers.CLIPModel:
    torch.manual_seed(0)
    return transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=_VISION, text_config=_TEXT, projection_dim=24)
    ).eval()


def make_siglip() -> transformers.SiglipModel:
    torch.manual_seed(0)
    return transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=_VISION, text_config={**_TEXT, "projection_size": 32})
    ).eval()


def make_processor() -> transformers.CLIPProcessor:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<start> $A <end>", None, [("<start>", 1), ("<end>", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<start>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    size = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    return transformers.CLIPProcessor(images, tokenizer)


def save_published(network: transformers.PreTrainedModel, folder: Path) -> Path:
    """Write a network as it is published: weights, image processor and tokenizer; return the folder."""
    network.save_pretrained(folder)
    processor = make_processor()
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    return folder
