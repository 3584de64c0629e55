"""Asking a judge over HTTP: retries, limits of time and of requests at once, what it costs, and a cache in front.

Everything runs on an event loop with a thread of its own, which begins with the first request: there, time limits are
exact and what nobody waits for any more is dropped at once, its connection closed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from instant_reward.rewards.judge_cache import Reply, ReplyCache, whole
from instant_reward.types import Message, UserError

T = TypeVar("T")

_FORMAT = 1  # of what the cache's keys are made of: raise it when that changes
_MOST_BYTES = 1 << 20  # of one answer
_LONGEST_WAIT = 30.0  # seconds between two tries, unless the server asks for more
_TRY_AGAIN = frozenset({408, 409, 425, 429})  # and every 5xx
_CONCERN_ALL = frozenset({401, 402, 404, 405})  # what one request meets here, all do: no text would ever be graded


class JudgeError(Exception):
    """A request that got no usable answer.

    Args:
        what: what happened, as it continues "the judge ...".
        advice: what to do.
        again: whether another try may help.
        lasting: whether every other request would meet the same.
        wait: how many seconds the server wants us to wait.
    """

    def __init__(
        self, what: str, advice: str, *, again: bool = False, lasting: bool = False, wait: float = 0.0
    ) -> None:
        super().__init__(what, advice)
        self.what, self.advice = what, advice
        self.again, self.lasting, self.wait = again, lasting, wait


@dataclass
class Usage:
    """What a judge has cost so far.

    Attributes:
        requests: requests sent, those sent again included.
        retries: requests sent again because an earlier one failed.
        reminders: texts whose first answer had no readable score.
        cache_hits: answers that needed no request.
        failures: texts that got no score.
        prompt_tokens, completion_tokens: as the server counts them.
        uncounted: answers for which the server named no tokens: their cost is missing below.
        money: in the currency of the prices.
    """

    requests: int = 0
    retries: int = 0
    reminders: int = 0
    cache_hits: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    money: float = 0.0


@dataclass(frozen=True)
class Service:
    """Where the judge is and how it is asked.

    Attributes:
        url: the address before ``/chat/completions``.
        settings: fields of every request beside the model and the messages.
        key_variable: the environment variable with the key; None for a server without one.
        concurrency: requests at once.
        timeout: seconds for one request, from its start until its answer is whole.
        total_timeout: seconds for all the texts of one call.
        retries: further tries after a failed one.
        backoff: seconds before the first of them; it doubles with each.
        price: money per million prompt tokens and per million completion tokens.
    """

    url: str
    model: str
    settings: Mapping[str, Any]
    key_variable: str | None
    concurrency: int
    timeout: float
    total_timeout: float
    retries: int
    backoff: float
    price: tuple[float, float]

    def secret(self) -> str | None:
        """The key, read anew each time so that no object ever holds it.

        Raises:
            UserError: where the variable is not set or holds what cannot be a key; the sentence does not show it.
        """
        if self.key_variable is None:
            return None
        value = os.environ.get(self.key_variable, "").strip()
        if not value:
            raise UserError(f"judge: the environment variable {self.key_variable} with the key is not set; set it")
        if not re.fullmatch(r"[!-~]+", value):
            raise UserError(
                f"judge: the environment variable {self.key_variable} holds blanks or characters that no key has; "
                "set it to the key alone"
            )
        return value

    def wait(self, key: str, attempt: int) -> float:
        """Seconds before the given try (from 1): doubled each time, less up to a half that the request itself fixes."""
        digest = hashlib.sha256(f"{key}/{attempt}".encode()).digest()
        share = int.from_bytes(digest[:4], "big") / 2**32
        return float(min(_LONGEST_WAIT, self.backoff * 2.0 ** (attempt - 1)) * (1.0 - share / 2))


class _Running:
    """The event loop, its thread and its connections. It must not refer to the client, whose end closes it."""

    def __init__(self, concurrency: int) -> None:
        import httpx2

        # No limits of its own: the time limits are around it, and the slots bound the connections.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency)
        self.http = httpx2.AsyncClient(timeout=None, limits=limits)
        self.process = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.slots = asyncio.Semaphore(concurrency)
        self.resume_at = 0.0  # the loop's time before which the server wants no request
        self.thread = threading.Thread(target=self._serve, daemon=True, name="judge")
        self.thread.start()

    def _serve(self) -> None:
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()

    def close(self) -> None:
        """Drops what still runs, closes the connections and ends the thread."""
        if self.process != os.getpid() or self.loop.is_closed():  # a forked process has no such thread
            return
        asyncio.run_coroutine_threadsafe(self._end(), self.loop)
        if threading.current_thread() is not self.thread:  # the garbage collector may run on any thread
            self.thread.join(5.0)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        try:
            await self.http.aclose()
        finally:
            self.loop.stop()


class Client:
    """Sends requests to one judge.

    Attributes:
        usage: what they have cost.
    """

    def __init__(self, service: Service, cache: ReplyCache) -> None:
        self.service, self.cache, self.usage = service, cache, Usage()
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._closer: Callable[[], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Threads and connections stay here: another process opens its own, and counts its own cost."""
        return {"service": self.service, "cache": self.cache}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def close(self) -> None:
        """Closes thread and connections; a later request opens new ones."""
        with self._lock:
            closer, self._closer, self._running = self._closer, None, None
        if closer is not None:
            closer()

    def gather(self, jobs: Sequence[Callable[[], Coroutine[Any, Any, T]]], stop: bool) -> list[T | JudgeError]:
        """Runs the jobs side by side and waits for all of them.

        Args:
            stop: the first failure ends all.

        Raises:
            JudgeError: with ``stop``, or where every other request would meet the same; the other jobs are dropped.
        """
        if not jobs:
            return []
        future = asyncio.run_coroutine_threadsafe(self._settle(jobs, stop), self._ready().loop)
        try:
            return future.result()
        except BaseException:  # an interrupt must not leave requests behind that nobody waits for
            future.cancel()
            raise

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """The answer to a conversation, from the cache where it is there. Only for jobs of ``gather``.

        Raises:
            JudgeError: after the last try.
        """
        service = self.service
        body = json.dumps({**service.settings, "model": service.model, "messages": list(messages)}, sort_keys=True)
        key = hashlib.sha256(json.dumps([_FORMAT, service.url, body]).encode()).hexdigest()
        kept = self.cache.get(key)
        if kept is not None:
            self.usage.cache_hits += 1
            return kept
        return self.cache.put(key, await self._insist(body.encode(), key))

    def _ready(self) -> _Running:
        with self._lock:
            if self._running is None or self._running.process != os.getpid():
                self._running = _Running(self.service.concurrency)
                self._closer = weakref.finalize(self, self._running.close)
            return self._running

    async def _settle(self, jobs: Sequence[Callable[[], Coroutine[Any, Any, T]]], stop: bool) -> list[T | JudgeError]:
        async def settled(job: Callable[[], Coroutine[Any, Any, T]]) -> T | JudgeError:
            try:
                return await job()
            except JudgeError as failure:
                if stop or failure.lasting:
                    raise
                return failure

        tasks = [asyncio.create_task(settled(job)) for job in jobs]
        limit = self.service.total_timeout
        try:
            await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        late = JudgeError(f"did not answer everything within {limit:g} s", "raise total_timeout or concurrency")
        return [late if task.cancelled() else task.result() for task in tasks]

    async def _insist(self, body: bytes, key: str) -> Reply:
        """Sends the request until it is answered or the tries are used up."""
        service, running, attempt = self.service, self._ready(), 0
        while True:
            try:
                async with running.slots:
                    while (rest := running.resume_at - running.loop.time()) > 0:
                        await asyncio.sleep(rest)
                    self.usage.requests += 1
                    return await self._send(running, body)
            except JudgeError as failure:
                if not failure.again:
                    raise
                if failure.wait > service.total_timeout:
                    what = f"{failure.what} and asks to wait {failure.wait:.0f} s"
                    raise JudgeError(what, "wait that long, or raise total_timeout") from None
                if attempt == service.retries:
                    tries = "one try" if attempt == 0 else f"{attempt + 1} tries"
                    raise JudgeError(f"{failure.what}, after {tries}", failure.advice) from None
                # All requests wait where the server asks for it: it counts them together.
                running.resume_at = max(running.resume_at, running.loop.time() + failure.wait)
            attempt += 1
            self.usage.retries += 1
            await asyncio.sleep(service.wait(key, attempt))

    async def _send(self, running: _Running, body: bytes) -> Reply:
        import httpx2

        service, secret = self.service, self.service.secret()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {secret}"} if secret else {})
        url = f"{service.url}/chat/completions"
        try:
            async with (
                asyncio.timeout(service.timeout),
                running.http.stream("POST", url, content=body, headers=headers) as response,
            ):
                status, retry_after = response.status_code, response.headers.get("Retry-After", "")
                content = bytearray()
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > _MOST_BYTES:
                        raise JudgeError(f"sent more than {_MOST_BYTES >> 20} MiB", "check url and lower max_tokens")
        except TimeoutError:
            what = f"did not answer within {service.timeout:g} s"
            raise JudgeError(what, "raise timeout or lower concurrency", again=True) from None
        except httpx2.RequestError as error:
            what = f"cannot be reached ({_line(f'{type(error).__name__}: {error}', secret)})"
            raise JudgeError(what, "check url and whether the server runs", again=True) from None
        if status != 200:
            raise _refusal(status, _line(_complaint(bytes(content)), secret), retry_after, service)
        reply = _reply(bytes(content), secret)
        self._count(reply)
        return reply

    def _count(self, reply: Reply) -> None:
        usage, prompt, completion = self.usage, reply.prompt_tokens, reply.completion_tokens
        usage.uncounted += prompt is None or completion is None
        usage.prompt_tokens += prompt or 0
        usage.completion_tokens += completion or 0
        price = self.service.price
        usage.money += ((prompt or 0) * price[0] + (completion or 0) * price[1]) / 1e6


def _refusal(status: int, said: str, retry_after: str, service: Service) -> JudgeError:
    """What an answer with another status than 200 means."""
    code = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    if status == 429:
        advice = "lower concurrency or raise retries"
        return JudgeError(f"is asked too much ({code})", advice, again=True, wait=_seconds(retry_after))
    if status in _TRY_AGAIN or status >= 500:
        advice = "see the server's log or raise retries"
        return JudgeError(f"fails ({code})", advice, again=True, wait=_seconds(retry_after))
    if 300 <= status < 400:
        return JudgeError(f"sends us elsewhere ({code})", "give the final address as url", lasting=True)
    lasting = status in _CONCERN_ALL
    if status in (401, 402, 403):
        named = service.key_variable
        advice = f"check the key in {named}" if named else "name the environment variable with a key as key_variable"
        return JudgeError(f"refuses us ({code})", advice, lasting=lasting)
    if status in (404, 405):
        return JudgeError(f"has no such address or model ({code})", "check url and model", lasting=lasting)
    return JudgeError(
        f"refuses the request ({code})", "check model, max_tokens, temperature, options and the text's length"
    )


def _reply(content: bytes, secret: str | None) -> Reply:
    """The answer in a response's body. JudgeError, to be tried again, where there is none."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        what = "sent what is no JSON" if content.strip() else "sent nothing"
        raise JudgeError(what, "check url and see the server's log", again=True) from None
    try:
        choice = found["choices"][0]
        said = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        complaint = _line(_complaint(content), secret)
        what = f"sent no answer ({complaint})" if complaint else "sent no answer"
        raise JudgeError(what, "check url and model and see the server's log", again=True) from None
    if isinstance(said, list):  # some servers send an answer in parts
        said = "".join(str(part.get("text", "")) for part in said if isinstance(part, dict))
    usage = found.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        text=_hidden(clean(said if isinstance(said, str) else ""), secret),
        finish=str(choice.get("finish_reason") or ""),
        prompt_tokens=whole(usage.get("prompt_tokens")),
        completion_tokens=whole(usage.get("completion_tokens")),
    )


def _complaint(content: bytes) -> str:
    """What a server says is wrong, in any of the usual forms."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return content[:2000].decode(errors="replace")
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found)


def _line(text: str, secret: str | None) -> str:
    """At most 200 visible characters, in one line, without the key."""
    shown = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", _hidden(clean(text), secret)).strip()
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _hidden(text: str, secret: str | None) -> str:
    return text.replace(secret, "***") if secret else text


def clean(text: str) -> str:
    """The text with what no encoding has, half a surrogate pair, as U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _seconds(retry_after: str) -> float:
    """What a Retry-After header asks for: seconds or a date; 0 where it says neither."""
    if re.fullmatch(r"\s*\d{1,9}(\.\d+)?\s*", retry_after):
        return float(retry_after)
    try:
        then = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())
