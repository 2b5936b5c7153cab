"""A tiny network of semantic segmentation whose pixels have several classes."""

import torch
import transformers

SIZES = {
    "num_encoder_blocks": 2,
    "hidden_sizes": [16, 24],
    "depths": [1, 1],
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "decoder_hidden_size": 16,
    "num_labels": 3,
    "classifier_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
}


def make_segformer() -> transformers.SegformerForSemanticSegmentation:
    """Return a SegFormer with random weights, for images of 16 x 16; its logits are maps of 8 x 8."""
    torch.manual_seed(0)
    network = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**SIZES)).eval()
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.mul_(6)
        network.decode_head.classifier.weight.mul_(20)
    return network
