"""deploy/: what Kubernetes and a container builder are given, held against what the rest of the tree says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pathspec import GitIgnoreSpec

from cluster.jobs.secrets import NAMED_SO
from cluster.jobs.submission import commands

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
LOCK = (ROOT / "requirements.lock").read_text()
# A folder with ray.io_rayclusters.yaml and ray.io_rayjobs.yaml, ray-operator/config/crd/bases of ray-project/kuberay.
CRDS = os.environ.get("KUBERAY_CRDS")


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    return {made["kind"]: made for made in yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())}


@pytest.fixture(scope="module")
def pods(objects) -> dict[str, dict[str, Any]]:
    """{name of the group: its pod}."""
    spec = objects["RayCluster"]["spec"]
    workers = {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"]["spec"]} | workers


def closed(schema: Any) -> Any:
    """An OpenAPI schema as JSON Schema, in which a key that isn't named is an error, as `kubectl --validate` has it."""
    if isinstance(schema, list):
        return [closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(inner) for key, inner in schema.items()}
    if made.get("type") == "object" and "properties" in made and "x-kubernetes-preserve-unknown-fields" not in made:
        made.setdefault("additionalProperties", False)
    if made.get("x-kubernetes-int-or-string"):
        made = {key: inner for key, inner in made.items() if key not in ("type", "pattern")}
    return made


@pytest.mark.proof
@pytest.mark.skipif(CRDS is None, reason="KUBERAY_CRDS names no folder with KubeRay's CRDs")
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_the_operators_own_schema_accepts_the_file(objects, kind):
    (file,) = Path(CRDS or "").glob(f"ray.io_{kind.lower()}s.yaml")
    versions = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    schema = next(closed(v["schema"]["openAPIV3Schema"]) for v in versions if v["name"] == "v1")
    schema["properties"]["metadata"] = {}
    jsonschema.validate(objects[kind], schema)
    with pytest.raises(jsonschema.ValidationError, match="entrypiont"):
        jsonschema.validate(objects[kind] | {"spec": objects[kind]["spec"] | {"entrypiont": "x"}}, schema)


def test_the_cluster_grows_between_its_bounds_and_its_head_trains_nothing(objects):
    spec = objects["RayCluster"]["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert f"ray=={spec['rayVersion']}\n" in LOCK
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] < group["maxReplicas"]


def test_every_pod_has_the_same_image_and_environment_and_is_caged(pods):
    assert set(pods) == {"head", "cpu", "gpu"}
    containers = [container for pod in pods.values() for container in pod["containers"]]
    assert len({container["image"] for container in containers}) == 1
    assert all(container["env"] == containers[0]["env"] for container in containers)
    for pod in pods.values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert "nvidia.com/gpu" in pods["gpu"]["containers"][0]["resources"]["limits"]


def test_storage_is_shared_and_every_mount_has_its_volume(objects, pods):
    claim = objects["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods.values():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == set(volumes)
        assert volumes["home"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert {"name": "GYRE_HOME", "value": mounts["home"]} in container["env"]


def test_the_token_is_on_and_secrets_come_by_reference_alone(objects, pods):
    assert objects["RayCluster"]["spec"]["authOptions"] == {"mode": "token", "secretName": "gyre-ray"}
    for pod in pods.values():
        for variable in pod["containers"][0]["env"]:
            if NAMED_SO.search(variable["name"]):
                assert "value" not in variable
                assert "secretKeyRef" in variable["valueFrom"]
    assert "Secret" not in objects
    assert not re.search(r"[0-9a-f]{32,}", (DEPLOY / "kuberay.yaml").read_text())


def test_nothing_but_the_cluster_and_the_operator_reaches_a_port(objects):
    cluster = {"ray.io/cluster": objects["RayCluster"]["metadata"]["name"]}
    policy = objects["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == cluster
    (rule,) = policy["ingress"]
    assert {"podSelector": {"matchLabels": cluster}} in rule["from"]
    assert all(source.get("podSelector") for source in rule["from"])


def test_the_job_is_a_command_on_that_cluster(objects):
    spec = objects["RayJob"]["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": objects["RayCluster"]["metadata"]["name"]}
    words = spec["entrypoint"].split()
    assert words[:3] == ["python", "-m", "cluster.cli"]
    assert words[3] in commands()
    assert (ROOT / Path(words[4]).relative_to("/opt/gyre")).is_file()


def test_the_image_is_built_of_the_lock_by_a_user_without_rights_and_holds_no_secret():
    text = (DEPLOY / "Dockerfile").read_text()
    copied = re.findall(r"(?m)^COPY (?:--\S+ )*(\S+) ", text)
    assert copied == ["requirements.lock", "."]
    assert all((ROOT / source).exists() for source in copied)
    assert text.index("^torch==") < text.index("-r requirements.lock")
    assert text.index("USER gyre") < text.index("pip install")
    assert not re.search(r"(?mi)^(ARG|ENV) \S*(TOKEN|SECRET|PASSWORD)", text)
    ignored = GitIgnoreSpec.from_lines((ROOT / ".dockerignore").read_text().splitlines())
    for local in (".git/config", ".venv/bin/python", "runs/mlflow.db", "a/.env", "deploy/tls.key", "x/auth_token"):
        assert ignored.match_file(local), local
    assert not ignored.match_file("cluster/cli.py")
