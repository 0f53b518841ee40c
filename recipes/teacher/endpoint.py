"""Completions from OpenAI-compatible servers: `vllm serve`, `transformers serve`, TGI, the Inference Providers.

`Endpoint` spreads requests over the replicas of one model (the least busy first), tries again what fails for a
passing reason, waits while every replica is down, and stops only when nothing has come back for `patience` seconds.
"""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx2
from huggingface_hub import AsyncInferenceClient, set_async_client_factory
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from recipes.arguments import UserError

if TYPE_CHECKING:
    from huggingface_hub import ChatCompletionOutput

Messages = list[dict[str, str]]

START_SECONDS = 10.0
PROBES = 4
FAILURES_IN_A_ROW = 3
# Statuses of an overloaded or broken server or gateway; any other 4xx is an answer.
PASSING = (408, 409, 425, 429)


class Failed(Exception):
    """A request that failed for a reason that may pass: no connection, a time-out, 429, 5xx, half a body."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Refused(Exception):
    """A request that the server, or the model's length, will never accept as it is."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """One completion as a backend gives it.

    Attributes:
        text: Everything that the model said, the reasoning between think tags if the server split it off.
        finish_reason: `stop`, or `length` if `max_tokens` cut it.
        completion_tokens: As the server counts them; 0 if it does not.
    """

    text: str
    finish_reason: str | None
    completion_tokens: int


@dataclass
class Replica:
    """One server: how busy it is, how often it failed in a row, for how long and until when it is set aside."""

    url: str
    client: AsyncInferenceClient
    in_flight: int = 0
    failures: int = 0
    pause: float = 0.0
    aside_until: float = 0.0

    def ready(self, now: float) -> bool:
        """Tell whether it takes a request; one that has failed is tried with a single one first."""
        return now >= self.aside_until and (self.failures < FAILURES_IN_A_ROW or self.in_flight == 0)


@dataclass
class Endpoint:
    """One model behind one or several OpenAI-compatible servers.

    Attributes:
        urls: Addresses of the replicas, with or without `/v1`.
        model: The model's name on them.
        api_key: Sent as a bearer token; None where the server wants none.
        timeout: Seconds for one request.
        patience: Seconds without any success after which the run stops.
        attempts: Tries of one request while others succeed.
        backoff: Seconds before the second try, doubled before each further one, with jitter, 60 at most.
        say: Tells the user that a replica is set aside, or back.
    """

    urls: Sequence[str]
    model: str
    api_key: str | None = None
    timeout: float = 600.0
    patience: float = 600.0
    attempts: int = 8
    backoff: float = 1.0
    say: Callable[[str], None] = print
    replicas: list[Replica] = field(init=False)
    options: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        # Without a limit of connections, which `concurrency` sets; and a server of one's own is no Hub, so
        # HF_HUB_OFFLINE does not block it.
        set_async_client_factory(
            lambda: httpx2.AsyncClient(limits=httpx2.Limits(max_connections=None), follow_redirects=True, timeout=None)
        )
        # A missing key would make the client send the user's Hub token, to whatever server this is.
        key = self.api_key or "none"
        self.replicas = [
            Replica(url, AsyncInferenceClient(base_url=url, api_key=key, timeout=self.timeout)) for url in self.urls
        ]
        self._failures = 0
        self._failing_since: float | None = None
        self._reason = ""

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for replica in self.replicas:
            await replica.client.close()

    async def reach(self) -> list[list[str] | Failed]:
        """Check, within seconds, that at least one server answers.

        Returns:
            The models of each replica; [] for one that does not tell, the failure of one that is down.

        Raises:
            UserError: No server answers.
        """
        found = await asyncio.gather(*(self._models(replica) for replica in self.replicas))
        if all(isinstance(answer, Failed) for answer in found):
            raise UserError(
                f"base_url: no server answers at {', '.join(self.urls)} ({found[0]}). Start one, e.g. "
                f"`vllm serve {self.model}`, or correct the address. Nothing was asked."
            )
        return found

    async def start(self, options: dict[str, Any]) -> list[str]:
        """Check that the servers that are up have the model, and find out which sampling options they accept.

        A replica that is down is set aside, as long as another is up.

        Args:
            options: `temperature`, `top_p`, `top_k`, `max_tokens`; those that are None are not sent. Kept in
                `self.options` as far as accepted.

        Returns:
            The options that were refused; among them `seed`, which is tried too.

        Raises:
            UserError: No server answers, or one does not have the model.
        """
        self.options = {name: value for name, value in options.items() if value is not None}
        refused: list[str] = []
        for replica, models in zip(self.replicas, await self.reach(), strict=True):
            if isinstance(models, Failed):
                replica.failures, replica.pause = FAILURES_IN_A_ROW, self.backoff
                replica.aside_until = time.monotonic() + self.backoff
                self.say(f"{replica.url}: does not answer ({models}); set aside, and tried again later")
            else:
                await self._probe(replica, models, refused)
        return refused

    async def _models(self, replica: Replica) -> list[str] | Failed:
        url = replica.url.rstrip("/")
        url = f"{url}/models" if url.endswith("/v1") else f"{url}/v1/models"
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            async with httpx2.AsyncClient(timeout=START_SECONDS, follow_redirects=True) as client:
                answer = await client.get(url, headers=headers)
        except httpx2.HTTPError as error:
            return Failed(_reason(error))
        if answer.status_code in (502, 503, 504):  # a gateway without its server
            return Failed(_server_says(answer))
        try:
            return [model["id"] for model in answer.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return []

    async def _probe(self, replica: Replica, models: list[str], refused: list[str]) -> None:
        """Ask for one token with every option, and leave out those that the server refuses, the rarest first."""
        candidates = [name for name in ("top_k", "seed", "top_p", "temperature") if name in {"seed", *self.options}]
        candidates = [name for name in candidates if name not in refused]
        patient = AsyncRetrying(
            retry=retry_if_exception_type(Failed),
            wait=wait_random_exponential(multiplier=self.backoff, max=10),
            stop=stop_after_attempt(1 if models and self.model not in models else PROBES),
            reraise=True,
        )
        while True:
            options = {**self.options, "max_tokens": 1}
            seed = None if "seed" in refused else 1
            try:
                await patient(self._ask, replica.client, [{"role": "user", "content": "Hello"}], options, seed)
                return
            except Failed as error:
                raise UserError(self._why_not(replica, error, models)) from None
            except Refused as error:
                if error.status not in (400, 422) or not candidates:
                    raise UserError(self._why_not(replica, error, models)) from None
                name = next((name for name in candidates if name in str(error)), candidates[0])
                candidates.remove(name)
                refused.append(name)
                self.options.pop(name, None)

    def _why_not(self, replica: Replica, error: Failed | Refused, models: list[str]) -> str:
        if isinstance(error, Refused) and error.status in (401, 403):
            return (
                f"api_key_variable: {replica.url} refuses the key ({error}). Put the server's key into an environment "
                f"variable and pass its name, e.g. --api_key_variable MY_KEY."
            )
        if models and self.model not in models:
            return f"model: {replica.url} has no {self.model!r}; it has {', '.join(models)}. ({error})"
        return f"model: {replica.url} does not complete with {self.model!r}: {error}"

    async def complete(self, messages: Messages, seed: int | None) -> Answer:
        """Ask for one completion, again and again while the reason for a failure may pass.

        Args:
            messages: The prompt, as chat messages.
            seed: Of this completion; None where the server accepts none.

        Raises:
            Refused: The server will never complete this prompt, or failed on it `attempts` times while others
                succeeded.
            UserError: Nothing has come back for `patience` seconds.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Failed),
            wait=wait_random_exponential(multiplier=self.backoff, max=60),
            stop=self._give_up,
            reraise=True,
        )
        try:
            return await retrying(self._asking, messages, self.options, seed)
        except Failed as error:
            if self._lost():
                servers = ", ".join(self.urls)
                raise UserError(
                    f"base_url: nothing has come back from {servers} for {self.patience:.0f} s; the last reason: "
                    f"{error}. Every completion so far is kept: run the same command again once a server is up."
                ) from None
            raise Refused(f"{self.attempts} tries: {error}") from None

    def _give_up(self, state: RetryCallState) -> bool:
        poisoned = state.attempt_number >= self.attempts and self._failures < self.attempts
        return poisoned or self._lost()

    def _lost(self) -> bool:
        return self._failing_since is not None and time.monotonic() - self._failing_since > self.patience

    async def _asking(self, messages: Messages, options: dict[str, Any], seed: int | None) -> Answer:
        """Ask the least busy replica once, and keep the books on it."""
        replica = await self._free_replica()
        replica.in_flight += 1
        try:
            answer = await self._ask(replica.client, messages, options, seed)
        except Failed as error:
            self._note_failure(replica, error)
            raise
        except Refused:
            self._note_answer(replica)  # an answer too: the server is well
            raise
        finally:
            replica.in_flight -= 1
        self._note_answer(replica)
        return answer

    def _note_failure(self, replica: Replica, error: Failed) -> None:
        now = time.monotonic()
        replica.failures += 1
        self._failures += 1
        self._failing_since = self._failing_since or now
        self._reason = str(error)
        replica.aside_until = max(replica.aside_until, now + error.retry_after)
        if replica.failures < FAILURES_IN_A_ROW or now < replica.aside_until:
            return
        # Requests that were under way together count as one outage; each try that fails after it doubles the wait.
        if replica.pause == 0.0:
            self.say(f"{replica.url}: failed {replica.failures} times ({error}); set aside, and tried again later")
        replica.pause = min(60.0, 2 * replica.pause or self.backoff)
        replica.aside_until = now + replica.pause

    def _note_answer(self, replica: Replica) -> None:
        if replica.pause > 0.0:
            self.say(f"{replica.url}: answers again")
        replica.failures, replica.pause = 0, 0.0
        self._failures, self._failing_since = 0, None

    async def _free_replica(self) -> Replica:
        while True:
            now = time.monotonic()
            if ready := [replica for replica in self.replicas if replica.ready(now)]:
                return min(ready, key=lambda replica: replica.in_flight)
            if self._lost():
                raise Failed(self._reason)
            await asyncio.sleep(min(0.1, self.backoff))

    async def _ask(
        self, client: AsyncInferenceClient, messages: Messages, options: dict[str, Any], seed: int | None
    ) -> Answer:
        """Send one request, and sort what comes back into an answer, a failure, or a refusal."""
        known = {name: value for name, value in options.items() if name != "top_k"}
        extra = {"top_k": options["top_k"]} if "top_k" in options else None
        try:
            output = await client.chat_completion(messages, model=self.model, seed=seed, extra_body=extra, **known)
        except HfHubHTTPError as error:
            status, reason = error.response.status_code, _server_says(error.response)
            if status in PASSING or status >= 500:
                raise Failed(reason, _retry_after(error.response)) from None
            raise Refused(reason, status) from None
        except (InferenceTimeoutError, httpx2.HTTPError) as error:
            raise Failed(_reason(error)) from None
        except (ValueError, TypeError, AttributeError) as error:  # not JSON, or JSON of another form
            raise Failed(f"not a chat completion: {error}") from None
        return _read_answer(output)


def _read_answer(output: ChatCompletionOutput) -> Answer:
    """Take the one choice out of a chat completion; servers split reasoning off under two names.

    Raises:
        Failed: It has another form, or not exactly one choice.
    """
    choices = output.choices
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        found = len(choices) if isinstance(choices, list) else "no"
        raise Failed(f"not a chat completion: {found} choices, expected 1")
    message = choices[0].message
    content = message.content if isinstance(message, dict) else None
    reasoning = (message.reasoning or message.get("reasoning_content")) if isinstance(message, dict) else None
    if not isinstance(content or "", str) or not isinstance(reasoning or "", str) or not (content or reasoning):
        if isinstance(message, dict) and content == "":
            return Answer("", choices[0].finish_reason, _tokens(output))
        raise Failed("not a chat completion: no text in its message")
    text = f"<think>{reasoning}</think>\n{content or ''}" if reasoning else content
    # A lone half of a surrogate pair, where a server cut a character in two, has no place in parquet.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Answer(text, choices[0].finish_reason, _tokens(output))


def _tokens(output: ChatCompletionOutput) -> int:
    usage = output.usage
    return (usage.completion_tokens or 0) if isinstance(usage, dict) else 0


def _server_says(response: httpx2.Response) -> str:
    """Shorten an error response to its status and the first words of its body."""
    return f"{response.status_code} {' '.join(response.text.split())[:300]}".strip()


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__} {error}".strip()[:300]


def _retry_after(response: httpx2.Response) -> float:
    """Read the Retry-After header, seconds or a date, as seconds from now; an hour at most."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), 3600.0)
