"""The momentum encoder against a plain average of the weights the run really had."""

import pytest
import torch

from tests.trainers.test_engine import (
    STAGES,
    STEPS,
    UNEVEN,
    Toy,
    batch,
    everyone,
    make,
    mine,
    same,
    take_step,
)
from trainers.config import MomentumConfig
from trainers.ema import MomentumEncoder

DECAY = 0.9
SAVED = 3


def average(trajectory, decay):
    """average <- decay average + (1 - decay) weights, in float64, over the weights of every step."""
    result = {n: w.double() for n, w in trajectory[0].items()}
    for weights in trajectory[1:]:
        result = {n: decay * result[n] + (1 - decay) * w.double() for n, w in weights.items()}
    return result


def run(engine, momentum, steps):
    trajectory = []
    for _ in range(steps):
        take_step(engine)
        momentum.update()
        trajectory.append(engine.full_weights())
    return trajectory


def journey(stage, precision):
    ids = mine()[0]
    engine = make(stage, precision)
    random_state = torch.get_rng_state()
    momentum = MomentumEncoder(engine, Toy, MomentumConfig(decay=DECAY))
    quiet = torch.equal(random_state, torch.get_rng_state())
    with torch.no_grad():
        student = engine.forward(input_ids=ids, rare=True)
    equal_at_start = torch.equal(momentum.forward(input_ids=ids, rare=True), student)
    trajectory = [engine.full_weights(), *run(engine, momentum, SAVED)]
    saved = engine.state(), momentum.state()
    trajectory += run(engine, momentum, STEPS - SAVED)
    output = momentum.forward(input_ids=ids, rare=True)

    resumed = make(stage, precision, seed=99)
    again = MomentumEncoder(resumed, Toy, MomentumConfig(decay=DECAY))
    resumed.restore(everyone(saved[0]))
    again.restore(everyone(saved[1]))
    run(resumed, again, STEPS - SAVED)
    return {
        "quiet": quiet,
        "equal_at_start": equal_at_start,
        "trajectory": trajectory,
        "averaged": momentum.full_weights(),
        "output": output,
        "no_gradient": not output.requires_grad,
        "saved": saved,
        "resumed": same(again.state(), momentum.state()),
        "same_output": torch.equal(again.forward(input_ids=ids, rare=True), output),
    }


def crawl(stage):
    engine = make(stage, "bf16")
    momentum = MomentumEncoder(engine, Toy, MomentumConfig(decay=0.9999))
    return [engine.full_weights(), *run(engine, momentum, STEPS)], momentum.full_weights()


def continue_from(stage, states):
    engine = make(stage, "fp32", seed=99)
    momentum = MomentumEncoder(engine, Toy, MomentumConfig(decay=DECAY))
    engine.restore([state for state, _ in states])
    momentum.restore([state for _, state in states])
    run(engine, momentum, STEPS - SAVED)
    return momentum.full_weights()


def expected_output(weights, precision, ids):
    """The toy with these weights in one process, in the compute type."""
    model = Toy()
    model.load_state_dict({**weights, "head.weight": weights["embed.weight"]})
    if precision == "bf16":
        for p in model.parameters():
            p.data = p.data.bfloat16()
    return model(ids, True).detach()


@pytest.fixture(scope="module")
def journeys(gloo):
    done = {}

    def get(world_size, stage, precision):
        key = world_size, stage, precision
        if key not in done:
            done[key] = gloo(world_size, journey, stage, precision)
        return done[key]

    return get


CASES = [(1, "fp32"), (2, "fp32"), (2, "bf16")]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("world_size", "precision"), CASES)
def test_the_average_is_that_of_the_weights_the_run_had(journeys, world_size, precision, stage):
    first, *others = journeys(world_size, stage, precision)
    expected = average(first["trajectory"], DECAY)
    assert first["averaged"].keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(first["averaged"][name].double(), weight, rtol=0, atol=1e-6)
    assert all(result["averaged"] == {} for result in others)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("world_size", "precision"), CASES)
def test_the_forward_uses_the_averaged_weights(journeys, world_size, precision, stage):
    results = journeys(world_size, stage, precision)
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    for rows, result in zip(UNEVEN[world_size], results, strict=True):
        output = expected_output(results[0]["averaged"], precision, batch()[0][rows])
        torch.testing.assert_close(result["output"], output, rtol=tolerance, atol=tolerance)
        assert result["no_gradient"]
        assert result["equal_at_start"]
        assert result["quiet"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("world_size", "precision"), CASES)
def test_resume_is_bit_exact(journeys, world_size, precision, stage):
    for result in journeys(world_size, stage, precision):
        assert result["resumed"]
        assert result["same_output"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1)])
def test_the_average_is_restored_at_another_number_of_workers(journeys, gloo, old, new, stage):
    results = journeys(old, stage, "fp32")
    averaged = gloo(new, continue_from, stage, [result["saved"] for result in results])[0]
    for name, weight in averaged.items():
        torch.testing.assert_close(weight, results[0]["averaged"][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_it_moves_in_bf16_at_a_decay_near_one(gloo, stage):
    trajectory, averaged = gloo(2, crawl, stage)[0]
    expected = average(trajectory, 0.9999)
    for name in ("up.weight", "embed.weight"):
        path = expected[name] - trajectory[0][name].double()
        moved = averaged[name].double() - trajectory[0][name].double()
        assert path.norm() > 0
        assert (moved - path).norm() < 0.05 * path.norm()
