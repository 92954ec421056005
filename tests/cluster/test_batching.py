"""Requests together: everyone gets their own answer, whatever happens to the others."""

import asyncio
import random

import pytest

from cluster.serving.batching import Together


def test_what_arrives_while_a_batch_is_under_way_makes_the_next_one():
    batches = []

    async def story():
        free = asyncio.Event()

        async def run(asked):
            batches.append(asked)
            await free.wait()
            return [10 * x for x in asked]

        together = Together(run, most=4)
        calls = [asyncio.create_task(together(0))]
        while not batches:
            await asyncio.sleep(0)
        calls += [asyncio.create_task(together(x)) for x in range(1, 7)]
        await asyncio.sleep(0)
        free.set()
        assert await asyncio.gather(*calls) == [10 * x for x in range(7)]
        assert await together(7) == 70, "after a pause it begins again"

    asyncio.run(story())
    assert batches == [[0], [1, 2, 3, 4], [5, 6], [7]]


def test_so_many_batches_are_under_way_and_no_more():
    async def story():
        now, most = 0, 0

        async def run(asked):
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(0)
            now -= 1
            return asked

        together = Together(run, most=1, at_once=3)
        assert await asyncio.gather(*(together(x) for x in range(20))) == list(range(20))
        return most

    assert asyncio.run(story()) == 3


def test_a_failed_batch_fails_its_own_requests_alone():
    async def story():
        async def run(asked):
            if 1 in asked:
                raise RuntimeError("the replica died")
            return asked

        together = Together(run, most=2)
        return await asyncio.gather(*(together(x) for x in range(6)), return_exceptions=True)

    first, second, *others = asyncio.run(story())
    assert [str(first), str(second)] == ["the replica died"] * 2
    assert others == [2, 3, 4, 5]


def test_a_client_that_went_away_costs_nothing():
    batches = []

    async def story():
        async def run(asked):
            batches.append(asked)
            return asked

        together = Together(run, most=9)
        gone, stays = asyncio.create_task(together(1)), asyncio.create_task(together(2))
        await asyncio.sleep(0)
        gone.cancel()
        assert await stays == 2
        with pytest.raises(asyncio.CancelledError):
            await gone

    asyncio.run(story())
    assert batches == [[2]]


def test_nobody_waits_for_ever_however_the_arrivals_fall():
    async def story(draw):
        async def run(asked):
            for _ in range(draw.randint(0, 3)):
                await asyncio.sleep(0)
            return asked

        together = Together(run, most=3, at_once=draw.randint(1, 2))

        async def client(x):
            for _ in range(draw.randint(0, 30)):
                await asyncio.sleep(0)
            return await together(x)

        return await asyncio.wait_for(asyncio.gather(*(client(x) for x in range(12))), 60)

    for seed in range(200):
        assert asyncio.run(story(random.Random(seed))) == list(range(12))
