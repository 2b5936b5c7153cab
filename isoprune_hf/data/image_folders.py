"""Read folders of images by class, as ImageFolder of torchvision does; call `read_class_folders`.

Every folder below a split is a class, with the images at any depth below it; links are followed. Classes and files are
sorted with numbers by their values. Everything else that lies there is counted and named in one line.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from isoprune_hf.data.class_names import natural_key, shorten
from isoprune_hf.errors import DatasetError

logger = logging.getLogger(__name__)  # not accelerate's, which needs an accelerator

_ENDINGS = (
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg",
    ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
# Folders that programs write next to images: archives of macOS, notebooks, file servers, version control.
_NO_CLASSES = frozenset({"__MACOSX", ".ipynb_checkpoints", "@eaDir", ".git"})


def class_folders(root: Path) -> list[Path]:
    """Return the folders below `root` that can be classes, sorted with numbers by their values."""
    folders = [path for path in root.iterdir() if path.is_dir() and path.name not in _NO_CLASSES]
    return sorted(folders, key=lambda path: natural_key(path.name))


def holds_images(folder: Path, *, depth: int | None = None) -> bool:
    """Return whether there is an image below a folder, at any depth or only directly in it (`depth` 1)."""
    files = folder.iterdir() if depth == 1 else _files(folder)
    return next((True for path in files if path.is_file() and _is_image(path)), False)


def image_files(folder: Path) -> list[Path]:
    """Return the images that lie directly in a folder, sorted with numbers by their values."""
    found = [path for path in folder.iterdir() if path.is_file() and _is_image(path)]
    return sorted(found, key=lambda path: natural_key(path.name))


def read_class_folders(root: Path, order: Sequence[str] = ()) -> Dataset:
    """Return the images of class folders, with the columns `image` and `label`.

    Args:
        root: Folder of the class folders.
        order: Names of the classes by index; by default sorted.

    Raises:
        DatasetError: There is no image, or a class folder that `order` does not name.
    """
    images: dict[str, list[str]] = {}
    others: list[str] = []
    for folder in class_folders(root):
        files = list(_files(folder))
        images[folder.name] = [str(path) for path in files if _is_image(path)]
        others += [str(path.relative_to(root)) for path in files if not _is_image(path)]
    others += [path.name for path in sorted(root.iterdir()) if path.is_file()]
    empty = [name for name, paths in images.items() if not paths]
    names = list(order) or [name for name, paths in images.items() if paths]
    unnamed = [name for name in images if images[name] and name not in names]
    if unnamed:
        raise DatasetError(
            f"data.dataset: classes.txt does not name {shorten(unnamed)} of the class folders in {str(root)!r}; add "
            "the missing names"
        )
    if not any(images.values()):
        raise DatasetError(f"data.dataset: the folder {str(root)!r} has no images in folders of classes")
    for what, found in (("class folders without images", empty), ("files that are not images", others)):
        if found:
            logger.warning(f"data: {root}: left out {len(found)} {what}: {shorten(found)}")
    labelled = [(path, label) for label, name in enumerate(names) for path in images.get(name, ())]
    columns = {"image": [path for path, _ in labelled], "label": [label for _, label in labelled]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=names)}))


def _files(folder: Path) -> Iterator[Path]:
    """Iterate over the files at any depth below a folder; a link to a folder above itself is not followed."""
    for place, folders, names in os.walk(folder, followlinks=True):
        kept = (name for name in folders if name not in _NO_CLASSES and not _is_loop(Path(place, name)))
        folders[:] = sorted(kept, key=natural_key)
        yield from (Path(place, name) for name in sorted(names, key=natural_key))


def _is_loop(folder: Path) -> bool:
    """Return whether a folder is a link to one that it lies in."""
    return folder.is_symlink() and folder.resolve() in [path.resolve() for path in folder.parents]


def _is_image(path: Path) -> bool:
    """Return whether a file is meant as an image: by its ending, or without an ending by its first bytes."""
    if path.name.startswith("._"):  # attributes of another file, which macOS stores under the name of that file
        return False
    if path.suffix.lower() in _ENDINGS:
        return True
    if not path.is_file() or (path.suffix and not path.suffix[1:].isdecimal()):
        return False
    try:
        with PILImage.open(path) as image:
            return image.format is not None
    except (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError):
        return False
