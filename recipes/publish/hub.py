"""Calls to the Hub: patient with what passes, and one clear error for what does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from recipes.arguments import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from huggingface_hub import HfApi

T = TypeVar("T")
# Worth another try: time-outs, a commit of somebody else in between (412), too many requests, a Hub in trouble.
PASSING = {408, 412, 429, 500, 502, 503, 504}
SETTINGS = "https://huggingface.co/settings/tokens"
NOTHING_LOST = (
    "The folder stands as it is: run the same command again, and what was uploaded already is not sent twice."
)


@dataclass
class Hub:
    """One repository of the Hub, called through `do`.

    Attributes:
        api: The client; its token is what everything is done with.
        repo_id: `owner/name`.
        repo_type: `model`, `dataset` or `space`.
        attempts: How often a call is made that fails for a reason that may pass.
    """

    api: HfApi
    repo_id: str
    repo_type: str
    attempts: int = 3

    def do(self, what: str, call: Callable[[], T]) -> T:
        """Call the Hub, again if need be.

        Args:
            what: What the call does, as an error message names it: "create the repository".
            call: The call; it may be made several times.

        Raises:
            UserError: The Hub refuses, does not answer, or fails in every attempt.
        """
        from json import JSONDecodeError

        from httpx2 import TransportError
        from huggingface_hub.errors import HfHubHTTPError
        from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

        def passes(error: BaseException) -> bool:
            error = _cause(error)
            if isinstance(error, HfHubHTTPError):
                return error.response.status_code in PASSING
            return isinstance(error, TransportError | JSONDecodeError)  # a proxy's page in place of an answer

        def say(state: RetryCallState) -> None:
            error = _cause(state.outcome.exception())
            print(f"Could not {what}: {_reason(error)}. Trying again.", flush=True)

        retrying = Retrying(
            retry=retry_if_exception(passes),
            stop=stop_after_attempt(self.attempts),
            wait=wait_exponential_jitter(initial=1, max=30),
            before_sleep=say,
            reraise=True,
        )
        try:
            return retrying(call)
        except (HfHubHTTPError, TransportError, JSONDecodeError, RuntimeError) as error:
            if isinstance(_cause(error), RuntimeError):
                raise
            raise UserError(self._explain(what, _cause(error))) from None

    def _explain(self, what: str, error: BaseException) -> str:
        from huggingface_hub.errors import HfHubHTTPError

        failed = f"Could not {what}: {_reason(error)}."
        if not isinstance(error, HfHubHTTPError):
            return f"{failed} Is there a network, and is {self.api.endpoint} the Hub you mean? {NOTHING_LOST}"
        status = error.response.status_code
        if status == 401:
            return f"{failed} The token is not valid: run `hf auth login`, or set HF_TOKEN to one of {SETTINGS}."
        if status == 403:
            return f"{failed} The token may not do this: use one with write access ({SETTINGS}), or ask the owner."
        if status in PASSING:
            return f"{failed} {NOTHING_LOST}"
        return f"{failed} Nothing more was changed."


def set_timeout(seconds: float) -> None:
    """Make every call fail that gets no answer for so long; huggingface_hub by itself waits for ever.

    Raises:
        UserError: The client is told to stay offline.
    """
    import httpx2
    from huggingface_hub import is_offline_mode, set_client_factory

    def set_on(request: httpx2.Request) -> None:
        # Several calls of huggingface_hub ask for no time-out, which wins over their client's.
        request.extensions = {**request.extensions, "timeout": httpx2.Timeout(seconds).as_dict()}

    if is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it.")
    set_client_factory(lambda: httpx2.Client(event_hooks={"request": [set_on]}, follow_redirects=True))


def _cause(error: BaseException | None) -> BaseException:
    """Return what lies below the RuntimeError that huggingface_hub makes of a failed upload."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error


def _reason(error: BaseException) -> str:
    """Say what went wrong without an address: those of uploads are signed."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return f"no answer ({type(error).__name__})"
    said = " ".join((error.server_message or "").split())
    return f"the Hub answers {error.response.status_code}" + (f", {said[:200]!r}" if said else "")
