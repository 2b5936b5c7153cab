"""Hash the weights of a model: `fingerprint`."""

import torch
import xxhash
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the names, shapes, types and bytes of all weights; equal models have equal fingerprints.

    Note:
        XXH3 (128 bits), as in the fingerprints of `datasets`. It identifies models, but does not resist an attacker
        who constructs a collision.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
