"""Unpack zip files of images once, into the cache of `datasets`; call `unpack`."""

import hashlib
import shutil
import tempfile
import zipfile
from pathlib import Path

from datasets import config

from isoprune_hf.data.image_folders import class_folders, holds_images
from isoprune_hf.errors import DatasetError


def unpack(file: Path) -> Path:
    """Return the folder with the content of a zip file; a folder that is all of it is opened, too.

    The folder is kept for as long as size and time of the file stay the same.

    Raises:
        DatasetError: The file is damaged, or there is no room for its content.
    """
    status = file.stat()
    key = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    place = Path(config.HF_DATASETS_CACHE) / "isoprune_zip" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not place.is_dir():
        _extract(file, place)
    children = class_folders(place)
    is_wrapped = len(children) == 1 and not any(path.is_file() for path in place.iterdir())
    return children[0] if is_wrapped and not holds_images(children[0], depth=1) else place


def _extract(file: Path, place: Path) -> None:
    """Extract a zip file into a new folder, whole or not at all; names that lead out of it lose that part."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=".tmp", dir=place.parent))
    try:
        with zipfile.ZipFile(file) as archive:
            needed, free = sum(entry.file_size for entry in archive.infolist()), shutil.disk_usage(place.parent).free
            if needed > free:
                raise DatasetError(
                    f"data.dataset: {str(file)!r} unpacks to {needed / 1e9:.3g} GB, and {place.parent} has "
                    f"{free / 1e9:.3g} GB of room; set HF_HOME to a folder with more"
                )
            archive.extractall(temporary)
        temporary.rename(place)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # the others: encrypted, unknown method
        raise DatasetError(f"data.dataset: {str(file)!r} cannot be unpacked ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
