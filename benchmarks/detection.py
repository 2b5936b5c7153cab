"""Measure the objects that a pruned RT-DETR finds in generated scenes, without boxes for the pruning.

A small RT-DETR is trained on shapes on the textures of photographs, whose boxes are known exactly, and cut to shares
of its MACs in several ways. Each line has, on other scenes, mean average precision (COCO, and at an overlap of
0.5), the share of objects that are found (F1 of boxes of the right class that overlap the true ones by half, of
probabilities from 0.5), the same share for the objects of the base, and the divergence from it. torch-pruning is
measured, too; its Taylor importance gets the true boxes of the scenes.

Run from the top of the repository:

    python benchmarks/detection.py --shares 70 50
"""

import argparse
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from cut_table import add_arguments, open_base, print_cuts
from peer_cuts import peer_cuts
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, RTDetrResNetConfig

from isoprune_hf.data.boxes import Objects
from isoprune_hf.evaluation.box_precision import FoundBoxes, box_figures
from isoprune_hf.evaluation.detection import objects_of, share_of_same
from isoprune_hf.models.detection_loss import DetectionLoss

SIDE, SHAPES, BATCH = 64, ("ellipse", "rectangle"), 16
BACKBONE = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}
NETWORK = {
    "encoder_in_channels": [32, 48, 64],
    "encoder_hidden_dim": 64,
    "encoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "d_model": 64,
    "decoder_in_channels": [64, 64, 64],
    "decoder_layers": 2,
    "decoder_ffn_dim": 128,
    "decoder_attention_heads": 4,
    "num_queries": 12,
    "num_denoising": 0,
    "num_labels": len(SHAPES),
    "freeze_backbone_batch_norms": False,
}
# torch-pruning keeps the outputs, the points of deformable attention, and the residual streams of the transformers: it
# cuts these without the embeddings of positions that are added to them, and the network does not run.
KEPT = ("class_embed", "bbox_embed.0.layers.2", "bbox_embed.1.layers.2", "enc_score_head", "enc_bbox_head.layers.2")
KEPT += ("sampling_offsets", "attention_weights")
KEPT += ("o_proj", "fc2", "output_proj", "encoder_input_proj", "decoder_input_proj", "enc_output", "query_pos_head")
LOSS = DetectionLoss(len(SHAPES))
Boxes = list[dict[str, Tensor]]


def draw_scenes(count: int, seed: int) -> tuple[Tensor, Boxes]:
    """Return images (N, 3, 64, 64) and their boxes: one to three shapes that hardly overlap."""
    random = np.random.default_rng(seed)
    photos = load_sample_images().images

    def texture() -> Image.Image:
        photo = photos[random.integers(len(photos))]
        top, left = (int(random.integers(size - SIDE)) for size in photo.shape[:2])
        return Image.fromarray(photo[top : top + SIDE, left : left + SIDE])

    images, truths = [], []
    for _ in range(count):
        image, kinds, corners = texture(), [], []
        for _ in range(random.integers(1, 4)):
            kind, width, height = int(random.integers(len(SHAPES))), *map(int, random.integers(16, 34, 2))
            left, top = (int(random.integers(SIDE - size)) for size in (width, height))
            box = (left, top, left + width, top + height)
            if any(min(box[2], b[2]) > max(left, b[0]) and min(box[3], b[3]) > max(top, b[1]) for b in corners):
                continue
            shape = Image.new("L", (SIDE, SIDE))
            getattr(ImageDraw.Draw(shape), SHAPES[kind])(box, fill=255)
            colour = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in random.integers(256, size=3)))
            image.paste(Image.blend(texture(), colour, 0.6), mask=shape)
            kinds.append(kind)
            corners.append(box)
        boxes = box_convert(torch.tensor(corners).float() / SIDE, "xyxy", "cxcywh")
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1)
        truths.append({"class_labels": torch.tensor(kinds), "boxes": boxes})
    return torch.stack(images), truths


def make_network() -> RTDetrForObjectDetection:
    backbone = RTDetrResNetConfig(**BACKBONE, out_features=["stage2", "stage3", "stage4"])
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=backbone, **NETWORK))


def train(images: Tensor, truths: Boxes, steps: int) -> RTDetrForObjectDetection:
    """Train a network on scenes."""
    torch.manual_seed(0)
    network = make_network()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (BATCH,))
        optimizer.zero_grad()
        network(images[chosen], labels=[truths[number] for number in chosen]).loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def outputs_of(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    found = [network(part) for part in images.split(50)]
    return torch.cat([part.logits for part in found]), torch.cat([part.pred_boxes for part in found])


def measure(network: nn.Module, dense: nn.Module, images: Tensor, truths: Boxes) -> list[str]:
    """Return the figures of a network as cells of the table."""
    outputs, wanted = outputs_of(network, images), outputs_of(dense, images)
    found = objects_of(LOSS, outputs)
    true = [(box_convert(one["boxes"], "cxcywh", "xyxy"), one["class_labels"]) for one in truths]
    shares = [
        100 * np.mean([share_of_same(*one, *other) for one, other in zip(found, others, strict=True)])
        for others in (true, objects_of(LOSS, wanted))
    ]
    divergence = float(LOSS.distances(outputs, wanted).mean())
    precision = precision_of(outputs, truths)
    return [*(f"{share:.1f}" for share in [*precision, *shares]), f"{divergence:.4f}"]


def precision_of(outputs: tuple[Tensor, Tensor], truths: Boxes) -> list[float]:
    """Return mean average precision in per cent, over all overlaps and at 0.5."""
    answer = SimpleNamespace(logits=outputs[0], pred_boxes=outputs[1])
    sizes = torch.full((len(truths), 2), SIDE)
    found = RTDetrImageProcessor().post_process_object_detection(answer, 0.0, sizes)
    true = [
        Objects(SIDE * box_convert(one["boxes"], "cxcywh", "xyxy"), kinds, torch.zeros_like(kinds, dtype=torch.bool))
        for one in truths
        for kinds in [one["class_labels"]]
    ]
    figures = box_figures([FoundBoxes(one["boxes"], one["labels"], one["scores"]) for one in found], true)
    return [100 * figures["box_map"], 100 * figures["box_map_50"]]


def loss_of(network: nn.Module, images: Tensor, truths: Boxes) -> Tensor:
    """Return the network's own loss."""
    return network(images, labels=truths).loss


def sum_of_outputs(network: nn.Module, images: Tensor) -> Tensor:
    """Return the sum of the logits and boxes of images."""
    found = network(images)
    return found.logits.sum() + found.pred_boxes.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = add_arguments(parser, steps=1200, scenes=3000, learning_rate=1e-4).parse_args()
    dense = open_base(args.weights, make_network, lambda: train(*draw_scenes(args.scenes, seed=0), args.steps))
    calibration, boxes = draw_scenes(256, seed=1)
    held_out = draw_scenes(300, seed=2)
    batches = list(calibration.split(BATCH))
    losses = [
        partial(loss_of, images=images, truths=boxes[BATCH * number : BATCH * (number + 1)])
        for number, images in enumerate(batches)
    ]
    peers = partial(
        peer_cuts,
        dense,
        batches,
        losses,
        is_kept=lambda name: any(part in name for part in KEPT),
        output=sum_of_outputs,
    )
    titles = ["mAP %", "mAP50 %", "objects found %", "objects as the base %", "divergence"]
    print_cuts(dense, batches, titles, lambda network: measure(network, dense, *held_out), peers, args)


if __name__ == "__main__":
    main()
