"""Send requests to the Hub.

`retry` repeats a request that failed temporarily, `translate_errors` turns a failure into a HubError of one line.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is imported there but not exported
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
)

from isoprune_hf.errors import HubError

logger = logging.getLogger(__name__)

Response = TypeVar("Response")
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"
_CONFLICT = "another change of {repo} is in progress on the Hub: check it, then push again"
_STATUS_MESSAGES = {
    401: f"the Hub does not accept this login: {_LOGIN}",
    403: "the Hub does not allow this login to write to {repo}: " + _LOGIN,
    404: "the Hub has no {repo} that this login can access: check the name, or " + _LOGIN,
    409: _CONFLICT,
    412: _CONFLICT,
    429: "the Hub received too many requests from this login: push again later",
}
_RETRY_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt
_MAX_RETRY_WAIT = 300.0  # seconds


@contextmanager
def translate_errors(repo: str, content: str, *, create_pr: bool = False) -> Iterator[None]:
    """Translate every error of a request to the Hub into a HubError of one line, without the token.

    Args:
        repo: `user/name`.
        content: Name of what is sent, for an error of its content.
        create_pr: The request opens a pull request, which may exist although no response arrived.

    Raises:
        HubError: The request failed.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError(f"not logged in to the Hub: {_LOGIN}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        message = _STATUS_MESSAGES.get(status, "the Hub returned status {status}: push again later")
        raise HubError(message.format(repo=repo, status=status)) from error
    except UnicodeEncodeError:
        raise HubError(f"the login contains a character that no token contains: {_LOGIN}") from None
    except ValueError as error:
        raise HubError(f"the Hub does not accept {content}: {' '.join(str(error).split())}") from error
    except (HTTPError, OSError) as error:
        # The text of a protocol error may quote the header with the token, so it is neither shown nor chained.
        advice = "look for a pull request, then push again" if create_pr else "check the network, then push again"
        raise HubError(f"the Hub cannot be reached ({type(error).__name__}): {advice}") from None


def retry(action: Callable[[], Response], *, only_if_rejected: bool = False) -> Response:
    """Call `action` up to six times while it fails temporarily: 429, 5xx or a lost connection.

    Args:
        action: The request.
        only_if_rejected: Do not repeat a request that the Hub may have carried out without a response arriving.
    """
    for wait in _RETRY_WAITS:
        try:
            return action()
        except HfHubHTTPError as error:
            status = error.response.status_code
            if not (status in (429, 503) if only_if_rejected else status == 429 or 500 <= status < 600):
                raise
            advised = error.response.headers.get("Retry-After", "")
            seconds = min(float(advised) if advised.isdecimal() else wait, _MAX_RETRY_WAIT)
            logger.warning(f"the Hub returned status {status}: retrying in {seconds:.0f} s")
        except HTTPError as error:
            if only_if_rejected:
                raise
            seconds = wait
            logger.warning(f"the Hub cannot be reached ({type(error).__name__}): retrying in {seconds:.0f} s")
        time.sleep(seconds)
    return action()
