"""ray_cluster.yaml, held against Ray's own schema and defaults, and its shell lines against a shell."""

import copy
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "ray_cluster.yaml"
COMMANDS = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture(scope="module")
def cloud() -> dict:
    return yaml.safe_load(FILE.read_text())


@pytest.fixture(scope="module")
def on_premise(cloud) -> dict:
    """The variant in the comments, put in as the comments say."""
    block = FILE.read_text().split("# --- on-premise begins\n")[1].split("# --- on-premise ends")[0]
    variant = yaml.safe_load("".join(line.removeprefix("# ") for line in block.splitlines(keepends=True)))
    removed = {"max_workers", "head_node_type", "available_node_types", "head_setup_commands", *variant}
    return {key: value for key, value in cloud.items() if key not in removed} | variant


@pytest.fixture(params=["cloud", "on_premise"])
def config(request) -> dict:
    return copy.deepcopy(request.getfixturevalue(request.param))


def commands(config: dict) -> list[str]:
    return [command for key in COMMANDS for command in config.get(key, [])]


def prepared(config: dict) -> dict:
    """As `ray up` sees it: defaults filled in by the provider."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(copy.deepcopy(config))


def test_ray_accepts_the_file(config):
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared(config))


def test_rays_schema_would_notice_a_wrong_key(config):
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(jsonschema.ValidationError, match="idle_minutes"):
        validate_config(prepared(config | {"idle_minutes": 5}))


def test_there_are_cpu_and_gpu_workers_and_a_head_that_trains_nothing(cloud):
    types = prepared(cloud)["available_node_types"]
    assert set(types) == {"head", "cpu", "gpu"}
    assert types["head"]["resources"]["CPU"] == 0
    assert types["cpu"]["resources"]["CPU"] > 0
    assert "GPU" not in types["cpu"]["resources"]
    assert types["gpu"]["resources"]["GPU"] > 0
    assert len({t["node_config"]["ImageId"] for t in types.values()}) == 1


def test_the_token_is_on_and_comes_from_a_file(config):
    environment = "\n".join(config["setup_commands"])
    assert "export RAY_AUTH_MODE=token" in environment
    path = re.search(r'RAY_AUTH_TOKEN_PATH="\$HOME/(.+?)"', environment)
    assert path is not None
    assert f"~/{path[1]}" in config["file_mounts"]


def test_no_token_stands_in_the_file():
    text = FILE.read_text()
    assert not re.search(r"RAY_AUTH_TOKEN\s*[=:]", text)
    assert not re.search(r"[0-9a-f]{32,}", text)  # what `ray get-auth-token` makes


def test_the_dashboard_is_on_loopback(config):
    heads = [command for command in config["head_start_ray_commands"] if "ray start --head" in command]
    assert len(heads) == 1
    assert "--dashboard-host=127.0.0.1" in heads[0]
    assert not any("0.0.0.0" in command for command in commands(config))


def test_every_start_of_ray_has_the_environment(config):
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert command.startswith(". ~/.gyre_env;")


def test_every_node_installs_the_lock_and_shares_the_storage(config):
    setup = "\n".join(config["setup_commands"])
    assert "-r ~/gyre/requirements.lock" in setup
    local = config["file_mounts"]["~/gyre/requirements.lock"]
    assert (ROOT / local).is_file()
    assert re.search(r"^torch==", (ROOT / local).read_text(), re.M)
    home = re.search(r"GYRE_HOME=(\S+?)'", setup)
    assert home is not None
    assert f"mountpoint -q {home[1]}" in setup


def test_every_command_is_a_shell_command(config):
    for command in commands(config):
        subprocess.run(["bash", "-n", "-c", f"({command})"], check=True)


def test_the_environment_file_can_be_read_and_is_written_twice_alike(config, tmp_path):
    write = next(command for command in config["setup_commands"] if command.startswith("printf"))
    (tmp_path / "bin").mkdir()
    ip = tmp_path / "bin" / "ip"
    ip.write_text("#!/bin/sh\necho 'default via 10.0.0.254 dev ens5 proto dhcp src 10.0.0.1 metric 100'\n")
    ip.chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{ip.parent}:/usr/bin:/bin"}
    show = '. ~/.gyre_env; echo "$GYRE_HOME $RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH $NCCL_SOCKET_IFNAME $PATH"'
    out = subprocess.run(
        ["bash", "-c", f"({write}) && ({write}) && {show}"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert out[:4] == ["/mnt/gyre", "token", f"{tmp_path}/.ray/auth_token", "ens5"]
    assert out[4].startswith(f"{tmp_path}/venv/bin:")
    assert len((tmp_path / ".gyre_env").read_text().splitlines()) == 6


def test_both_variants_set_the_same_environment(cloud, on_premise):
    ours, theirs = (
        next(command for command in config["setup_commands"] if command.startswith("printf"))
        for config in (cloud, on_premise)
    )
    assert ours == theirs
