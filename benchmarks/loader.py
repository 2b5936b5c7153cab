"""Measure images per second on one core: both decoders, and the reference's ImageFolder with torchvision's transforms.

    python benchmarks/loader.py [--images 200] [--rounds 5] [--side 500 375] [--data DIR]

The images are JPEGs of smooth noise with several grain sizes, written to a temporary folder; photographs have more
detail and decode more slowly. With `--data`, they are the first wide images of the evaluation split of a data set,
scaled to the same size. The pipelines are read in turns, in one thread and without loader processes, with the setting
of memory that the command line makes; each figure is the median CPU time over the rounds. `normalise` converts a batch
of 8-bit pixels, on a GPU in training and on the CPU here. The last two columns are the largest and the mean difference
from the evaluation pixels of the reference.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from isoprune_hf import DataRecipe, FinetuneRecipe
from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor
from isoprune_hf.cli.memory import keep_freed_memory
from isoprune_hf.data.augmentation import train_transform
from isoprune_hf.data.dataset import load_data
from isoprune_hf.data.decoding import read_image
from isoprune_hf.data.epochs import EpochOrder, train_batches
from isoprune_hf.data.loading import ImageBatch, ImageLoader, LoaderOptions, eval_loader
from isoprune_hf.data.pixels import normalised

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--data", help="data set of photographs, as in `isoprune --data`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        side = tuple(options.side)
        pictures = draw_pictures(side) if options.data is None else photographs(options.data, side)
        size = write_images(Path(folder), itertools.islice(pictures, options.images))
        print(f"{options.images} JPEGs of {options.side[0]} x {options.side[1]}, {size / 1e3:.0f} kB each, one thread")
        print("\n| | images/s | x | normalise images/s | max of 255 | mean of 255 |\n|---|---:|---:|---:|---:|---:|")
        for stage in ("evaluation", "training"):
            report(stage, Path(folder), options.rounds)


def write_images(folder: Path, pictures: Iterator[Image.Image]) -> float:
    """Write the images to train/a and val/a, and return their mean size in bytes."""
    for split in ("train", "val"):
        (folder / split / "a").mkdir(parents=True)
    sizes = []
    for number, picture in enumerate(pictures):
        for split in ("train", "val"):
            picture.save(folder / split / "a" / f"{number:05d}.jpg", quality=92)
        sizes.append((folder / "val" / "a" / f"{number:05d}.jpg").stat().st_size)
    return float(np.mean(sizes))


def draw_pictures(side: tuple[int, int]) -> Iterator[Image.Image]:
    rng = np.random.default_rng(0)
    while True:
        grains = ((80, 0.5), (12, 0.3), (3, 0.2))  # size in pixels, and share
        layers = [
            share * np.asarray(noise(rng, (side[0] // grain, side[1] // grain)).resize(side, Image.Resampling.BICUBIC))
            for grain, share in grains
        ]
        yield Image.fromarray(sum(layers).astype(np.uint8))


def photographs(name: str, side: tuple[int, int]) -> Iterator[Image.Image]:
    data = load_data(DataRecipe(dataset=name))
    for position in range(len(data.evaluation)):
        image = read_image(data.evaluation, position, data.decoding).image
        if image.width > image.height:
            yield image.resize(side, Image.Resampling.LANCZOS)


def noise(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def report(stage: str, folder: Path, rounds: int) -> None:
    """Print a row for each pipeline of a stage."""
    processor = IsoImageProcessor(size={"shortest_edge": 256}, resample=3, image_mean=MEAN, image_std=STD)
    loaders = {"reference": reference_loader(folder, stage)}
    loaders |= {decoder: our_loader(folder, stage, processor, decoder) for decoder in ("pil", "torchvision")}
    times: dict[str, list[float]] = {name: [] for name in loaders}
    pixels: dict[str, list[Tensor]] = {}
    for _ in range(rounds):
        for name, loader in loaders.items():
            start = time.process_time()
            pixels[name] = read(loader)
            times[name].append(time.process_time() - start)
    count = sum(len(batch) for batch in pixels["reference"])
    exact = torch.cat(pixels["reference"])
    for name, batches in pixels.items():
        speed, start = count / median(times[name]), time.process_time()
        batches = [normalised(batch, processor) for batch in batches]
        later = f"{count / (time.process_time() - start):.0f}" if pixels[name][0].dtype == torch.uint8 else "-"
        difference = (torch.cat(batches) - exact).abs() * torch.tensor(STD)[:, None, None] * 255
        far = f"{difference.max():.2f} | {difference.mean():.4f}" if stage == "evaluation" else "- | -"
        ratio = median(times["reference"]) / median(times[name])
        print(f"| {stage}, {name} | {speed:.0f} | {ratio:.2f} | {later} | {far} |", flush=True)


def reference_loader(folder: Path, stage: str) -> DataLoader:
    """Return the loader of the paper's scripts: ImageFolder, PIL, and a float tensor for each image."""
    bicubic = transforms.InterpolationMode.BICUBIC
    head = [transforms.Resize(256, interpolation=bicubic), transforms.CenterCrop(224)]
    if stage == "training":
        head = [transforms.RandomResizedCrop(224, interpolation=bicubic), transforms.RandomHorizontalFlip()]
    tail = [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float), transforms.Normalize(MEAN, STD)]
    return DataLoader(ImageFolder(str(folder / "val"), transforms.Compose([*head, *tail])), batch_size=BATCH)


def our_loader(folder: Path, stage: str, processor: IsoImageProcessor, decoder: str) -> ImageLoader:
    data = load_data(DataRecipe(dataset=str(folder), decoder=decoder))
    options = LoaderOptions(BATCH, decoding=data.decoding)
    if stage == "evaluation":
        return eval_loader(data.evaluation, processor, options)
    transform = train_transform(processor, FinetuneRecipe(), decoding=data.decoding)
    return train_batches(data.train, transform, EpochOrder(seed=0, epoch=1, parts=1), options).loader


def read(loader: DataLoader | ImageLoader) -> list[Tensor]:
    """Return the pixels of an epoch."""
    return [batch.pixels if isinstance(batch, ImageBatch) else batch[0] for batch in loader]


if __name__ == "__main__":
    main()
