"""The momentum encoder against a plain average of the weights the run really had, of every weight and of adapters."""

import gc

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from tests.trainers.test_engine import ADAMW, STAGES, STEPS, UNEVEN, batch, everyone, mine, same, settle, take_step, toy
from trainers.config import AdapterConfig, EngineConfig, MomentumConfig
from trainers.ema import MomentumEncoder
from trainers.encoders.adapters import add_adapter
from trainers.engine import Engine
from trainers.objectives.sections.numbers import Schedule, value_at

DECAY = 0.9
SAVED = 3
TARGETS = ["up", "down"]
ADAPTERS = {
    "full": None,
    "lora": AdapterConfig(rank=2, targets=TARGETS, modules_to_save=["norm"]),
    "dora": AdapterConfig(kind="dora", rank=3, alpha=4, targets=TARGETS),
    "dropping": AdapterConfig(rank=2, targets=TARGETS, dropout=0.5),
}


def model_of(kind, seed=0):
    """The toy, trained whole, or beside its frozen weights with updates far from zero; `seed` draws what trains."""
    if ADAPTERS[kind] is None:
        return toy(seed)
    model = toy(0)
    torch.manual_seed(seed)
    add_adapter(model, ADAPTERS[kind])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    return model


class Cutting(Engine):
    """ZeRO-3 that keeps no parameter gathered, however small: what is kept between forwards is DeepSpeed's whim."""

    def _settings(self, model):
        settings = super()._settings(model)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return settings

    def _keep_gathered(self):
        pass


def make(kind, stage, precision="fp32", seed=None, engine=Engine):
    settle()
    model = model_of(kind, dist.get_rank() if seed is None else seed)
    return engine(model, EngineConfig(zero_stage=stage, precision=precision), ADAMW, STEPS)


def average(trajectory, decays):
    """average <- decay average + (1 - decay) weights, in float64, over the weights of every step."""
    result = {n: w.double() for n, w in trajectory[0].items()}
    for weights, decay in zip(trajectory[1:], decays, strict=True):
        result = {n: decay * result[n] + (1 - decay) * w.double() for n, w in weights.items()}
    return result


def run(engine, momentum, steps):
    trajectory = []
    for _ in range(steps):
        take_step(engine)
        momentum.update()
        trajectory.append(engine.full_weights())
    return trajectory


def journey(kind, stage, precision):
    ids = mine()[0]
    engine = make(kind, stage, precision)
    random_state = torch.get_rng_state()
    momentum = MomentumEncoder(engine, MomentumConfig(decay=DECAY))
    quiet = torch.equal(random_state, torch.get_rng_state())
    with torch.no_grad():
        student = engine.forward(input_ids=ids, rare=True)
    equal_at_start = torch.equal(momentum.forward(input_ids=ids, rare=True), student)
    trajectory = [engine.full_weights(), *run(engine, momentum, SAVED)]
    saved = engine.state(), momentum.state()
    trajectory += run(engine, momentum, STEPS - SAVED)
    output = momentum.forward(input_ids=ids, rare=True)

    resumed = make(kind, stage, precision, seed=99)
    again = MomentumEncoder(resumed, MomentumConfig(decay=DECAY))
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


def crawl(kind, stage):
    engine = make(kind, stage, "bf16")
    momentum = MomentumEncoder(engine, MomentumConfig(decay=0.9999))
    return [engine.full_weights(), *run(engine, momentum, STEPS)], momentum.full_weights()


def continue_from(kind, stage, states):
    engine = make(kind, stage, seed=99)
    momentum = MomentumEncoder(engine, MomentumConfig(decay=DECAY))
    engine.restore([state for state, _ in states])
    momentum.restore([state for _, state in states])
    run(engine, momentum, STEPS - SAVED)
    return momentum.full_weights()


def expected_output(kind, weights, precision, ids):
    """The toy with these weights in one process, in the compute type."""
    model = model_of(kind)
    model.load_state_dict({**weights, "head.weight": weights["embed.weight"]})
    if precision == "bf16":
        for p in model.parameters():
            p.data = p.data.bfloat16()
    return model(ids, True).detach()


@pytest.fixture(scope="module")
def journeys(gloo):
    done = {}

    def get(*key):
        if key not in done:
            done[key] = gloo(key[0], journey, *key[1:])
        return done[key]

    return get


EVERY = [(w, kind, s, p) for kind in ("full", "lora", "dora") for w in (1, 2) for s in STAGES for p in ("fp32", "bf16")]
QUICK = [
    *((2, "full", stage, "fp32") for stage in STAGES),
    *((1, "full", 0, "bf16"), (1, "full", 3, "fp32"), (2, "full", 1, "bf16")),
    *((2, "lora", 1, "fp32"), (2, "lora", 3, "fp32"), (1, "lora", 3, "bf16")),
    *((2, "dora", 2, "bf16"), (1, "dora", 0, "fp32")),
]
REST = [pytest.param(case, marks=pytest.mark.proof) for case in EVERY if case not in QUICK]
CASES = pytest.mark.parametrize("case", [*QUICK, *REST], ids=lambda case: "-".join(map(str, case)))
MOVING = {
    "full": ("up.weight", "embed.weight"),
    "lora": ("up.lora_A.default.weight", "down.lora_B.default.weight", "norm.modules_to_save.default.weight"),
}


@CASES
def test_the_average_is_that_of_the_weights_the_run_had(journeys, case):
    first, *others = journeys(*case)
    expected = average(first["trajectory"], [DECAY] * STEPS)
    assert first["averaged"].keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(first["averaged"][name].double(), weight, rtol=0, atol=1e-6)
    assert all(result["averaged"] == {} for result in others)


@CASES
def test_the_forward_uses_the_averaged_weights(journeys, case):
    world_size, kind, _, precision = case
    results = journeys(*case)
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    for rows, result in zip(UNEVEN[world_size], results, strict=True):
        output = expected_output(kind, results[0]["averaged"], precision, batch()[0][rows])
        torch.testing.assert_close(result["output"], output, rtol=tolerance, atol=tolerance)
        assert result["no_gradient"]
        assert result["equal_at_start"]
        assert result["quiet"]


@CASES
def test_resume_is_bit_exact(journeys, case):
    for result in journeys(*case):
        assert result["resumed"]
        assert result["same_output"]


CHANGES = [("full", 1, 3, 2, 1), ("full", 2, 0, 2, 3), ("full", 2, 2, 1, 2), ("lora", 2, 1, 1, 0), ("lora", 2, 3, 2, 2)]


@pytest.mark.parametrize(("kind", "old", "stage", "new", "then"), CHANGES)
def test_the_average_is_restored_at_another_number_of_workers_or_stage(journeys, gloo, kind, old, stage, new, then):
    results = journeys(old, kind, stage, "fp32")
    averaged = gloo(new, continue_from, kind, then, [result["saved"] for result in results])[0]
    for name, weight in averaged.items():
        torch.testing.assert_close(weight, results[0]["averaged"][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "stage"), [("full", 1), ("full", 3), ("lora", 0), ("lora", 2)])
def test_it_moves_in_bf16_at_a_decay_near_one(gloo, kind, stage):
    trajectory, averaged = gloo(2, crawl, kind, stage)[0]
    expected = average(trajectory, [0.9999] * STEPS)
    moved = {n: averaged[n].double() - trajectory[0][n].double() for n in expected}
    for name in MOVING[kind]:
        path = expected[name] - trajectory[0][name].double()
        assert path.norm() > 0
        assert (moved[name] - path).norm() < 0.05 * path.norm()
    if kind == "lora":
        assert moved["up.base_layer.weight"].norm() == 0


def holdings():
    """Bytes of every tensor there is, by the address of its memory."""
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def sharing(kind, stage, precision):
    """(bytes that a momentum encoder adds, trained elements, which weights stand elsewhere in its forward)."""
    engine = make(kind, stage, precision)
    take_step(engine)
    before = holdings()
    momentum = MomentumEncoder(engine, MomentumConfig())
    added = {place: size for place, size in holdings().items() if place not in before}

    def places():
        return {n: getattr(p, "ds_tensor", p).data_ptr() for p, n in engine.names.items()}

    own, seen = places(), []
    hook = engine.module.register_forward_pre_hook(lambda *_: seen.append(places()))
    momentum.forward(input_ids=mine()[0], rare=True)
    hook.remove()
    trained = {n: p for p, n in engine.names.items() if p.requires_grad}
    elements = sum(getattr(p, "ds_numel", p.numel()) for p in trained.values())
    elsewhere = {n for n in own if seen[0][n] != own[n]}
    return sum(added.values()), elements, elsewhere == set(trained), places() == own


PLACES = [("full", 2, "fp32"), ("full", 3, "bf16"), *zip(["lora"] * 4, STAGES, ["fp32", "bf16"] * 2, strict=True)]


@pytest.mark.parametrize(("kind", "stage", "precision"), PLACES)
def test_what_does_not_train_is_shared(gloo, kind, stage, precision):
    for added, elements, only_the_trained, back in gloo(2, sharing, kind, stage, precision):
        assert only_the_trained
        assert back
        assert added <= (4 + 4 + 4) * elements + 1000  # the average, its copies, and what a gather receives


def asked(kind, stage, engine, when):
    """Steps with graphs kept, the momentum encoder asked at one moment of each: (state, its answers, what it should
    have answered)."""
    engine = make(kind, stage, engine=engine)
    momentum = MomentumEncoder(engine, MomentumConfig(decay=0.5))
    (ids, targets), answers, expected = mine(), [], []

    def ask(moment):
        if moment == when and engine.global_steps >= 2:  # by then DeepSpeed knows what comes next, and gathers ahead
            answers.append(momentum.forward(input_ids=ids, rare=True))
            weights = everyone(momentum.full_weights())[0]
            expected.append(expected_output(kind, weights, "fp32", ids))

    for _ in range(5):
        ask("before")
        h = engine.forward(input_ids=ids, rare=True)
        ask("between")
        engine.backward([h], [h.detach() - targets], last=True)
        ask("after")
        engine.step()
        momentum.update()
        with torch.no_grad():
            engine.forward(input_ids=ids, rare=True)
    return engine.state(), answers, expected


ASKED = [
    ("full", 2, Engine, ["between"]),
    ("full", 3, Cutting, ["before", "between", "after"]),
    ("lora", 3, Engine, ["between"]),
    ("dora", 3, Cutting, ["before"]),
]


@pytest.mark.parametrize(("kind", "stage", "engine", "moments"), ASKED)
def test_asking_it_leaves_the_training_model_alone(gloo, kind, stage, engine, moments):
    alone = gloo(2, asked, kind, stage, engine, "never")
    for when in moments:
        for (undisturbed, _, _), (state, answers, expected) in zip(
            alone, gloo(2, asked, kind, stage, engine, when), strict=True
        ):
            assert same(state, undisturbed)
            assert len(answers) == 3
            for answer, weighed in zip(answers, expected, strict=True):
                torch.testing.assert_close(answer, weighed, rtol=1e-5, atol=1e-5)


def scheduled():
    schedule = Schedule(start=0.5, end=1, shape="cosine")
    engine = make("lora", 2)
    momentum = MomentumEncoder(engine, MomentumConfig(decay=schedule))
    trajectory = [engine.full_weights(), *run(engine, momentum, STEPS)]
    expected = average(trajectory, [value_at(schedule, step / STEPS) for step in range(STEPS)])
    averaged = momentum.full_weights()
    return max(float((averaged[n].double() - w).abs().max()) for n, w in expected.items())


def test_a_scheduled_decay_is_that_of_each_step(gloo):
    assert gloo(1, scheduled)[0] < 1e-6


@pytest.mark.parametrize("decay", [1, 1.5, -0.1, {"start": 1, "end": 0.9}, {"start": 0.9, "end": 1.1}])
def test_a_decay_that_never_moves_or_overshoots_is_refused(decay):
    with pytest.raises(ValidationError, match="must lie in"):
        MomentumConfig(decay=decay)


def dropping(dropout):
    engine = make("dropping", 1)
    momentum = MomentumEncoder(engine, MomentumConfig(dropout=dropout))
    engine.train()

    def ask(seed):
        torch.manual_seed(seed)
        return momentum.forward(input_ids=mine()[0], rare=True)

    outputs = [ask(1), ask(1), ask(2)]
    return [torch.equal(outputs[0], other) for other in outputs[1:]], engine.module.training


def test_it_drops_where_it_is_told_to_as_the_generator_says(gloo):
    assert gloo(1, dropping, False) == [([True, True], True)]
    assert gloo(1, dropping, True) == [([True, False], True)]
