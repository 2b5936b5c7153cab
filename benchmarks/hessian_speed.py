"""Time squared per-sample gradients against the loop of older scripts; print rows of a Markdown table.

    python benchmarks/hessian_speed.py [--device cuda] [--rounds 3] [NAME ...]

The loop runs one forward pass and `backward(retain_graph=True)` for the loss of each image; it is timed once. The time
of isoprune_hf is the best of several rounds; choosing a way for each layer is timed separately, because it is done
once per run. Weights are random. `max error` is the largest relative difference from the loop over all parameters
(root mean square).
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from isoprune_hf import load_base
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.pruning.calibration.gradients import scoring_mode
from isoprune_hf.pruning.scoring.fisher import choose_ways, squared_gradients

DEIT = {"img_size": 64, "patch_size": 8, "embed_dim": 384, "depth": 4, "num_heads": 6}
CASES = {
    "DeiT-like, 4 blocks of 384": ("timm/deit_small_distilled_patch16_224", DEIT, 64, 64),
    "DeiT-like, 4 blocks of 192": ("timm/deit_tiny_distilled_patch16_224", {**DEIT, "embed_dim": 192}, 64, 64),
    "ResNet-50": ("timm/resnet50", None, 32, 64),
    "ConvNeXt-T": ("timm/convnext_tiny", None, 16, 64),
    "MobileNetV2": ("torchvision/mobilenet_v2", None, 16, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {list(CASES)}; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads")
    print("| model | images | loop s | ours s | ratio | choice s | max error |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name in options.names or CASES:
        print(row(name, torch.device(options.device), options.rounds), flush=True)


def row(name: str, device: torch.device, rounds: int) -> str:
    """Time one model and return its row."""
    source, args, batch, size = CASES[name]
    model = load_base(source, pretrained=False, model_args=args, num_labels=100, seed=0).model.to(device)
    names = [parameter for parameter, _ in model.model.named_parameters()]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    labels = torch.randint(100, (batch,), generator=generator).to(device)
    timed(lambda: loop(model, images[:2], labels[:2]), device)  # warm up
    expected, loop_seconds = timed(lambda: loop(model, images, labels), device)
    with scoring_mode(model, requires_grad=False):
        ways, choice_seconds = timed(lambda: choose_ways(model, names, tuple(images.shape[1:])), device)
        seconds = float("inf")
        for _ in range(rounds):
            found, duration = timed(lambda: squared_gradients(model, ways, images, labels), device)
            seconds = min(seconds, duration)
    floor = 1e-11 * max(rms(square) for square in expected.values())
    error = max(rms(found[key] - square) / (rms(square) + floor) for key, square in expected.items())
    figures = (
        f"{loop_seconds:.2f} | {seconds:.2f} | {loop_seconds / seconds:.1f}x | {choice_seconds:.2f} | {error:.0e}"
    )
    return f"| {name} | {batch} of {size}x{size} | {figures} |"


def loop(model: IsoPruneForImageClassification, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sum the squared gradients as older scripts do, but over all images instead of only the last one."""
    model.eval()
    losses = nn.functional.cross_entropy(model(pixel_values=images).logits, labels, reduction="none")
    squares = {name: torch.zeros_like(parameter) for name, parameter in model.model.named_parameters()}
    for loss in losses:
        model.zero_grad()
        loss.backward(retain_graph=True)
        for name, parameter in model.model.named_parameters():
            if parameter.grad is not None:
                squares[name] += parameter.grad.square()
    model.zero_grad()
    return squares


def timed(work: Callable[[], object], device: torch.device) -> tuple[object, float]:
    """Call `work` and return its result and its seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def rms(values: torch.Tensor) -> float:
    """Return the root mean square."""
    return values.double().square().mean().sqrt().item()


if __name__ == "__main__":
    main()
