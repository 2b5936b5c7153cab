"""Bound how long this process waits for a server that is silent or slow; see `limit_waiting`."""

import time
from collections.abc import Iterator

from httpx2 import Client, ReadTimeout, Response, SyncByteStream
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

_SILENCE = 60.0  # seconds without a byte
_ANSWER_SECONDS = 120.0  # for the whole of an answer
_ANSWER_BYTES = 64 * 2**20


def limit_waiting() -> None:
    """Limit how long every later request of huggingface_hub in this process waits.

    A request fails after 60 s without a byte. An answer that is no file, in JSON or to something sent, fails after
    120 s or 64 MiB in all, however steadily it drips.
    """
    set_client_factory(_open_client)


def _open_client() -> Client:
    client = default_client_factory()
    client.timeout = _SILENCE
    client.event_hooks = {**client.event_hooks, "response": [*client.event_hooks["response"], _limit_answer]}
    return client


def _limit_answer(response: Response) -> None:
    is_json = response.headers.get("Content-Type", "").startswith("application/json")
    if is_json or response.request.method not in ("GET", "HEAD"):
        stream = response.stream
        assert isinstance(stream, SyncByteStream)  # as opened by a Client
        response.stream = _LimitedStream(stream, response)


class _LimitedStream(SyncByteStream):
    """The body of an answer, until it takes too long or too much."""

    def __init__(self, stream: SyncByteStream, response: Response):
        self._stream, self._response = stream, response

    def __iter__(self) -> Iterator[bytes]:
        end, left = time.monotonic() + _ANSWER_SECONDS, _ANSWER_BYTES
        for part in self._stream:
            left -= len(part)
            if left < 0 or time.monotonic() > end:
                raise ReadTimeout("the answer takes too long", request=self._response.request)
            yield part

    def close(self) -> None:
        """Close the connection's part."""
        self._stream.close()
