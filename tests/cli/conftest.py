"""Images in the shape of ImageNet, and a model cut with them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command_line import succeed
from helpers.imagenet import write_imagenet
from helpers.imagenet_cut import TAYLOR, offline_on_cpu


@pytest.fixture(scope="module")
def offline_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with offline_on_cpu(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the shape of ImageNet: 10 classes, 4 training and 2 validation images each."""
    return write_imagenet(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="session")
def cut_folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny ViT cut by one rank with the images; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("cut") / "cut"
    with offline_on_cpu(tmp_path_factory.mktemp("cache")):
        succeed("prune", *TAYLOR, "--data.dataset", images, "--output", folder)
    return folder
