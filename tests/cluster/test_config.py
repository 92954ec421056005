"""A recipe is read strictly: every wrong input is one sentence with the file, the full path and the remedy."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import Recipe, differences, flatten, known_keys, load_recipe
from data_services.schema import UsageError

MINIMAL = """
name: small
data:
  sources: [{path: "builtin:stdlib-code"}]
  steps: 10
model:
  config: {hidden: 32}
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe: the minimal one and what a test adds."""

    def write(more: str = "", base: str = MINIMAL) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(base + more)
        return path

    return write


def error(path, *overrides) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert "pydantic" not in text
    return text


def test_a_minimal_recipe_has_every_default(recipe):
    loaded = load_recipe(recipe())
    assert loaded.objective.temperature == 0.05
    assert loaded.cluster.workers == 1
    assert loaded.registered_name == "small"


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (
            "objective: {temprature: 0.1}",
            ["recipe.yaml", "unknown key objective.temprature", "did you mean objective.temperature?"],
        ),
        ("temperature: 0.1", ["unknown key temperature", "did you mean objective.temperature?"]),
        ("objective: {temperature: 0}", ["objective.temperature: a temperature of 0", "above 0"]),
        ("objective: {temperature: -0.1}", ["objective.temperature: a temperature of -0.1", "above 0"]),
        ("engine: {zero_stage: 5}", ["engine.zero_stage is 5", "less than or equal to 3"]),
        ("engine: {precision: fp8}", ["engine.precision is 'fp8'", "'bf16' or 'fp32'"]),
        ("optimizer: {lr: fast}", ["optimizer.lr is 'fast'", "valid number"]),
        ("engine: [1, 2]", ["engine is [1, 2]", "section with keys"]),
        ("engine:", ["engine is empty", "section with keys"]),
        ("cluster: {workers: 300}", ["data.batch (256)", "cluster.workers (300)", "every worker"]),
        ("optimizer: {warmup_steps: 10}", ["optimizer.warmup_steps (10)", "data.steps (10)"]),
        ("registry: {gate: {metric: ndgc@10}}", ["registry.gate.metric", "did you mean 'ndcg@10'"]),
        ("registry: {gate: {metric: ndcg@5, minimum: 0.1}}", ["registry.gate.metric", "evaluation.k = 10"]),
        ("evaluation: {bm25: {k: 1}}", ["unknown key evaluation.bm25.k", "evaluation.bm25.k1"]),
        ("seed: 1\nseed: 2", ["line 9", "key 'seed' is given twice"]),
        ("seed: [1", ["line", "expected"]),
        ("seed: !!python/object/apply:os.system [ls]", ["line 8", "could not determine a constructor"]),
        ("? [1]\n: 2", ["a key must be a name"]),
        ("seed: " + "[" * 1000, ["nested too deep"]),
        ("seed: &a [*a]", ["contains itself"]),
        ("seed: 2001-99-99", ["recipe.yaml", "month"]),
    ],
)
def test_wrong_keys_and_values_are_named_with_what_was_expected(recipe, more, parts):
    told = error(recipe(more))
    for part in parts:
        assert part in told


def test_keys_inside_a_list_are_checked_too(recipe):
    told = error(recipe(base=MINIMAL.replace("path:", "pth:")))
    assert "unknown key data.sources.0.pth" in told
    assert "did you mean data.sources.0.path?" in told


def test_a_missing_section_says_what_it_is(recipe):
    assert "data is missing" in error(recipe(base="name: x\nmodel: {path: a}\n"))
    told = error(recipe(base="data: {sources: [{}], steps: 1}\nmodel: {path: a}\nname: x\n"))
    assert "data.sources.0.path is missing (a file, glob, folder" in told


def test_exactly_one_origin_of_the_model(recipe):
    assert "model: give exactly one of" in error(recipe(), "model.path=other")


def test_an_alias_bomb_is_refused_before_it_is_expanded(recipe):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "once its aliases are expanded" in error(recipe("\n".join(lines)))


def test_anchors_and_merges_work(recipe):
    loaded = load_recipe(
        recipe(base=MINIMAL.replace("{hidden: 32}", "&c {hidden: 32}") + "optimizer: {<<: {lr: 0.1}, eps: 0.2}")
    )
    assert (loaded.optimizer.lr, loaded.optimizer.eps) == (0.1, 0.2)


def test_files_that_are_no_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no such file" in error(tmp_path / "absent.yaml")
    assert "cannot be read" in error(tmp_path)
    for name, content, told in [
        ("list.yaml", b"[1]", "mapping of sections, this is list"),
        ("empty.yaml", b"", "mapping of sections, this is NoneType"),
        ("latin.yaml", b"name: \xe9", "not UTF-8 at byte 6"),
        ("huge.yaml", b"#" * 1_000_001, "larger than"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert told in error(tmp_path / name)


def test_a_missing_recipe_names_its_neighbours(tmp_path):
    (tmp_path / "quickstart.yaml").touch()
    assert "there are" in (told := error(tmp_path / "quikstart.yaml"))
    assert "quickstart.yaml" in told


def test_overrides_are_yaml_and_reach_lists_and_absent_sections(recipe):
    loaded = load_recipe(
        recipe(),
        [
            "optimizer.lr=1e-3",
            "optimizer.betas=[0.8, 0.9]",
            "engine.deterministic=true",
            "data.sources.0.split=validation",
            "registry.gate.over_bm25=0.02",
            "cluster.address=null",
            "name=a",
        ],
    )
    assert loaded.optimizer.lr == 1e-3
    assert loaded.optimizer.betas == (0.8, 0.9)
    assert loaded.engine.deterministic is True
    assert loaded.data.sources[0].split == "validation"
    assert loaded.registry.gate is not None
    assert loaded.registry.gate.over_bm25 == 0.02
    assert loaded.cluster.address is None


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("objective.temprature=1", "command line: unknown key objective.temprature; did you mean"),
        ("engine.zero_stage=9", "command line: engine.zero_stage is 9"),
        ("optimizer.lr", "write key.path=value"),
        ("=3", "write key.path=value"),
        ("optimizer..lr=3", "write key.path=value"),
        ("data.sources.7.path=x", "a list of 1; give a position from 0 to 0"),
        ("data.sources.first.path=x", "a list of 1"),
        ("name.x=1", "name is 'small', which has no keys"),
        ("seed={a: 1, a: 2}", "command line, seed, line 1: key 'a' is given twice"),
    ],
)
def test_wrong_overrides_say_that_they_came_from_the_command_line(recipe, override, told):
    assert told in error(recipe(), override)


def test_the_fingerprint_is_of_the_content_not_of_the_writing(recipe):
    one = load_recipe(recipe())
    same = load_recipe(recipe("engine: {}\nseed: 0"))
    other = load_recipe(recipe("seed: 1"))
    assert one.fingerprint() == same.fingerprint()
    assert one.fingerprint() != other.fingerprint()
    assert Recipe.model_validate_json(one.canonical()) == one


def test_differences_name_what_changed_but_not_what_may_change(recipe):
    one = load_recipe(recipe())
    two = load_recipe(recipe(), ["seed=3", "cluster.workers=2", "checkpoint.keep=9", "optimizer.betas=[0.5, 0.98]"])
    assert differences(one, two) == {"seed": (0, 3), "optimizer.betas.0": (0.9, 0.5)}
    assert "cluster.workers" in differences(one, two, free=())
    longer = one.model_copy(update={"data": one.data.model_copy(update={"sources": one.data.sources * 2})})
    assert differences(one, longer)["data.sources.1.path"] == (None, "builtin:stdlib-code")


def test_flatten_keeps_empty_and_nested_values():
    assert dict(flatten({"a": {"b": [1, {"c": None}]}, "d": [], "e": {}})) == {
        "a.b.0": 1,
        "a.b.1.c": None,
        "d": [],
        "e": {},
    }


def test_every_section_of_the_recipe_is_described_by_known_keys():
    keys = dict(known_keys(Recipe))
    for key in ("data.sources.0.path", "model.config.hidden", "registry.gate.metric", "evaluation.bm25.k1"):
        assert key in keys


def test_reading_a_recipe_imports_nothing_heavy():
    heavy = "{'torch', 'ray', 'mlflow', 'transformers', 'deepspeed', 'pandas'}"
    code = f"import sys, cluster.config; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_views_are_read_by_kind_and_texts_alone_need_a_pool(recipe):
    def sources(views, fields="query: text, positive: text"):
        path = f"{{path: x.jsonl, {fields}, views: {views}}}"
        return recipe(base=MINIMAL.replace('{path: "builtin:stdlib-code"}', path))

    pool = "evaluation.pool=pairs.jsonl"
    crop = "{query: [{kind: crop, min_share: 0.2}]}"
    assert load_recipe(sources(crop), [pool]).data.sources[0].views.query[0].min_share == 0.2
    at = "data.sources.0.views.query.0"
    assert f"{at}.min_shar; did you mean {at}.min_share?" in error(
        sources("{query: [{kind: crop, min_shar: 0}]}"), pool
    )
    assert f"{at}.kind is missing" in error(sources("{query: [{min_share: 0.2}]}"), pool)
    assert "it should be one of crop, delete," in error(sources("{query: [{kind: cut}]}"), pool)
    assert "name one field as both" in error(sources("{pair: {kind: context}}", "query: a, positive: b"), pool)
    assert "in evaluation.pool" in error(sources(crop))
    neither = ["evaluation.validation=null", "evaluation.heldout=null"]
    texts = load_recipe(sources(crop), neither).data.sources[0]
    assert texts.texts_alone("pairs", "heldout").positive is None  # as the layout has it


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_that_comes_along_is_one(file):
    assert load_recipe(file, []).name == file.stem.replace("_", "-")


def test_a_sampling_correction_needs_to_know_how_often_documents_are_drawn(recipe):
    path = recipe()
    with pytest.raises(UsageError, match=r"objective needs frequency of every pair: name its field"):
        load_recipe(path, ["objective.sampling_correction=true"])
    corrected = load_recipe(path, ["objective.sampling_correction=true", "data.sources.0.frequency=count"])
    assert corrected.objective.needs == {"frequencies"}
