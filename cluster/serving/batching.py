"""Requests that arrive while a batch is computed make the next one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


class Together(Generic[Asked, Answered]):
    """Calls `run` with what was asked for meanwhile, in order; each caller awaits its own answer.

    most     asked for in one call of `run`, at most
    at_once  calls of `run` that are under way, at most
    wait_s   how long the first request after a pause waits for others

    Ray Serve's own batches are cut by the clock and then queue: under load a busy model gets many small ones. Here a
    batch is cut when the model is free for it, so it is as large as the load makes it.
    """

    def __init__(
        self, run: Callable[[list[Asked]], Awaitable[list[Answered]]], most: int, at_once: int = 1, wait_s: float = 0.0
    ) -> None:
        self._run, self._most, self._at_once, self._wait_s = run, most, at_once, wait_s
        self._waiting: deque[tuple[Asked, asyncio.Future[Answered]]] = deque()
        self._under_way = 0
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps none alive

    async def __call__(self, asked: Asked) -> Answered:
        answer: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, answer))
        if self._under_way < self._at_once:
            self._under_way += 1
            task = asyncio.create_task(self._until_nothing_waits())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await answer

    async def _until_nothing_waits(self) -> None:
        await asyncio.sleep(self._wait_s)
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            batch = [(asked, answer) for asked, answer in taken if not answer.done()]  # some clients went away
            if batch:
                await self._answer(batch)
        self._under_way -= 1  # in one breath with the last look: who comes next finds that nobody works

    async def _answer(self, batch: list[tuple[Asked, asyncio.Future[Answered]]]) -> None:
        try:
            found = await self._run([asked for asked, _ in batch])
        except Exception as error:  # noqa: BLE001  whatever it is, the callers are told
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), value in zip(batch, found, strict=True):
            if not answer.done():
                answer.set_result(value)
