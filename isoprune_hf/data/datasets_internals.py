"""Private names of the `datasets` library, read in version 5.2.0."""

from collections.abc import Iterator
from contextlib import contextmanager

from datasets import IterableDataset
from datasets.packaged_modules.webdataset.webdataset import WebDataset


@contextmanager
def only_labels_decoded() -> Iterator[None]:
    """Make `datasets` decode only integers from tar files inside the block, and return other members as bytes.

    Its decoders are a class attribute that its class methods read, so neither a parameter of `load_dataset` nor an
    attribute of one builder can replace them. The attribute is global: do not enter the block in two threads at once.
    """
    decoders = WebDataset.DECODERS
    WebDataset.DECODERS = {extension: decoder for extension, decoder in decoders.items() if decoder is int}
    try:
        yield
    finally:
        WebDataset.DECODERS = decoders


def with_known_features(stream: IterableDataset) -> IterableDataset:
    """Return the stream with its features resolved, from its first rows if nothing else tells them."""
    return stream._resolve_features()
