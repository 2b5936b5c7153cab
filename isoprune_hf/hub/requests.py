"""Send requests to the Hub.

`retry` repeats a request that failed temporarily, `translate_errors` turns a failure into a HubError of one line.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import get_token
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
    413: "the Hub refuses the size of what was sent to {repo}",
    429: "the Hub received too many requests from this login: push again later",
    507: "the Hub has no room left for {repo}",
}
_SHOWN_REASON = 200  # characters of what the server says
_RETRY_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt
_MAX_RETRY_WAIT = 300.0  # seconds
_FINAL_STATUSES = (501, 507)  # of the server, but not temporary


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
        raise HubError(f"{message.format(repo=repo, status=status)}{_reason(error)}") from None
    except UnicodeEncodeError:
        raise HubError(f"the login contains a character that no token contains: {_LOGIN}") from None
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
        # The client reads an answer without checking it, so the type is that of the first operation that fails.
        raise HubError(
            f"the Hub returned an answer of another form than expected ({type(error).__name__}): push again later"
        ) from None
    except ValueError as error:
        raise HubError(f"the Hub does not accept {content}: {' '.join(str(error).split())}") from error
    except (HTTPError, OSError) as error:
        # The text of a protocol error may quote the header with the token, so it is neither shown nor chained.
        advice = "look for a pull request, then push again" if create_pr else "check the network, then push again"
        raise HubError(f"the Hub cannot be reached ({type(error).__name__}): {advice}") from None


def find_login() -> str:
    """Return the token that requests would carry, so that it can be left out of a text; "" without a login."""
    return get_token() or ""


def _reason(error: HfHubHTTPError) -> str:
    """Return what the server says about an error, as the end of a message: one line without control signs or token."""
    text = " ".join((error.server_message or "").split())
    login = find_login()
    text = text.replace(login, "[token]") if login else text
    shown = "".join(sign if sign.isprintable() else "?" for sign in text)[:_SHOWN_REASON]
    return f" (the Hub says: {shown})" if shown else ""


def retry(action: Callable[[], Response], *, only_if_rejected: bool = False) -> Response:
    """Call `action` up to six times while it fails temporarily: 429, 5xx or a lost connection.

    No attempt begins later than five minutes after the first.

    Args:
        action: The request.
        only_if_rejected: Do not repeat a request that the Hub may have carried out without a response arriving.
    """
    begin = time.monotonic()
    for wait in _RETRY_WAITS:
        try:
            return action()
        except HfHubHTTPError as error:
            status = error.response.status_code
            is_temporary = status in (429, 503) if only_if_rejected else status == 429 or 500 <= status < 600
            if not is_temporary or status in _FINAL_STATUSES or time.monotonic() - begin > _MAX_RETRY_WAIT:
                raise
            advised = error.response.headers.get("Retry-After", "")
            seconds = min(float(advised) if advised.isdecimal() else wait, _MAX_RETRY_WAIT)
            logger.warning(f"the Hub returned status {status}: retrying in {seconds:.0f} s")
        except HTTPError as error:
            if only_if_rejected or time.monotonic() - begin > _MAX_RETRY_WAIT:
                raise
            seconds = wait
            logger.warning(f"the Hub cannot be reached ({type(error).__name__}): retrying in {seconds:.0f} s")
        time.sleep(seconds)
    return action()
