"""The Kubernetes manifests as plain data, and the two checks of a Ray object that need no cluster.

`schema_errors` is what the API server checks: the resource definition's schema. `operator_errors` is what the KubeRay
operator checks afterwards: rules that the schema cannot express.
"""

from __future__ import annotations

import copy
import functools
import lzma
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

Object = dict[str, Any]

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
DEFINITIONS = ROOT.parent / "shared/data/kuberay"


# --- loading ----------------------------------------------------------------------------------------------------------


def objects(directory: str | Path) -> list[Object]:
    """Every object that `kubectl apply -k` would send for a kustomization, or for all of those below a directory."""
    directory = Path(directory)
    if (directory / "kustomization.yaml").exists():
        return _rendered(directory)
    below = sorted({path.parent for path in directory.rglob("kustomization.yaml")})
    return [found for folder in below for found in _rendered(folder)]


def ray_objects(directory: str | Path) -> list[Object]:
    """The RayJobs and RayServices (any kind of ray.io) below a directory."""
    return [found for found in objects(directory) if found["apiVersion"].startswith("ray.io/")]


def entrypoint(rayjob: Object) -> str:
    """The shell command that a RayJob runs."""
    return rayjob["spec"]["entrypoint"].strip()


def serve_config(rayservice: Object) -> Object:
    """The Serve config file of a RayService."""
    return yaml.safe_load(rayservice["spec"]["serveConfigV2"])


def cluster_spec(ray_object: Object) -> Object | None:
    """The RayCluster inside of a Ray object; None for a job that picks a running cluster."""
    spec = ray_object["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig")


def _rendered(folder: Path) -> list[Object]:
    if shutil.which("kubectl"):
        return copy.deepcopy(_kustomized(folder.resolve()))
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if "patches" in kustomization:
        pytest.skip(f"kubectl is not here, and {folder.relative_to(ROOT)} has patches")
    return [found for name in kustomization["resources"] for found in _resource(folder / name)]


@functools.cache
def _kustomized(folder: Path) -> list[Object]:
    run = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return list(yaml.safe_load_all(run.stdout))


def _resource(path: Path) -> list[Object]:
    return _rendered(path.resolve()) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))


# --- the schema -------------------------------------------------------------------------------------------------------


def schema_errors(ray_object: Object) -> list[str]:
    """What the API server would refuse in a ray.io/v1 object, with the place of each error."""
    value = with_defaults(definition(ray_object["kind"]), copy.deepcopy(ray_object))
    return [f"{error.json_path}: {error.message}" for error in _validator(ray_object["kind"]).iter_errors(value)]


@functools.cache
def definition(kind: str) -> Object:
    """openAPIV3Schema of a kind's v1."""
    path = DEFINITIONS / f"ray.io_{kind.lower()}s.yaml.xz"
    if not path.exists():
        pytest.skip(f"no definitions of the KubeRay resources at {DEFINITIONS}")
    with lzma.open(path) as file:
        versions = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    return next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")


def with_defaults(schema: Object, value: Any) -> Any:
    """Drop nulls and fill in defaults, in place, as the API server does before it validates."""
    if isinstance(value, list):
        return [with_defaults(schema.get("items", {}), item) for item in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties")
    for key in list(value):
        inner = properties.get(key, others if isinstance(others, dict) else {})
        if value[key] is None:
            del value[key]
        else:
            value[key] = with_defaults(inner, value[key])
    for key, inner in properties.items():
        if "default" in inner:
            value.setdefault(key, copy.deepcopy(inner["default"]))
    return value


@functools.cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_closed(definition(kind)))


def _closed(schema: Any) -> Any:
    """The schema with unknown keys forbidden, save in `metadata`, which Kubernetes checks by itself."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        closed["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
        closed["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return closed


# --- the operator's rules ---------------------------------------------------------------------------------------------

_RESOURCE_PARAMETERS = ("num-cpus", "num-gpus", "memory", "resources")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")  # 47: the operator appends to it
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_V2_SWITCH = "RAY_enable_autoscaler_v2"


def operator_errors(ray_object: Object) -> list[str]:
    """What KubeRay 1.7 would refuse in an object that the schema accepts. Pure."""
    kind, cluster = ray_object["kind"], cluster_spec(ray_object)
    is_name = _NAME.fullmatch(ray_object["metadata"]["name"])
    errors = _broken(("metadata.name is no DNS label of at most 47 characters", not is_name))
    if kind == "RayJob":
        errors += _job_errors(ray_object["spec"], cluster)
    if kind == "RayService":
        errors += _service_errors(ray_object["spec"], cluster or {})
    return errors + (_cluster_errors(cluster) if cluster else [])


def _job_errors(spec: Object, cluster: Object | None) -> list[str]:
    stays, mode = not spec.get("shutdownAfterJobFinishes", False), spec.get("submissionMode", "K8sJobMode")
    ttl, rules = spec.get("ttlSecondsAfterFinished", 0) > 0, "deletionRules" in spec.get("deletionStrategy", {})
    retries, selects = spec.get("backoffLimit", 0) > 0, bool(spec.get("clusterSelector"))
    return _broken(
        ("one of rayClusterSpec and clusterSelector is needed", not cluster and not selects),
        ("ttlSecondsAfterFinished needs shutdownAfterJobFinishes", ttl and stays),
        ("deletionRules exclude shutdownAfterJobFinishes", rules and not stays),
        ("suspend needs shutdownAfterJobFinishes", spec.get("suspend", False) and stays),
        ("backoffLimit excludes clusterSelector", retries and selects),
        ("backoffLimit excludes InteractiveMode", retries and mode == "InteractiveMode"),
        ("SidecarMode excludes submitterPodTemplate", mode == "SidecarMode" and "submitterPodTemplate" in spec),
    )


def _service_errors(spec: Object, cluster: Object) -> list[str]:
    upgrade = spec.get("upgradeStrategy", {})
    incremental = upgrade.get("type") == "NewClusterWithIncrementalUpgrade"
    options = upgrade.get("clusterUpgradeOptions", {})
    head_service = cluster.get("headGroupSpec", {}).get("headService", {})
    return _broken(
        ("an incremental upgrade needs the autoscaler", incremental and not cluster.get("enableInTreeAutoscaling")),
        ("an incremental upgrade needs a gatewayClassName", incremental and not options.get("gatewayClassName")),
        ("the head service has no name of its own", "name" in head_service.get("metadata", {})),
    )


def _cluster_errors(cluster: Object) -> list[str]:
    head, workers = cluster["headGroupSpec"], cluster.get("workerGroupSpecs", [])
    autoscaler = cluster.get("autoscalerOptions", {}) if cluster.get("enableInTreeAutoscaling") else {}
    v2, switched = autoscaler.get("version") == "v2", _V2_SWITCH in _environment(head)
    token, version = cluster.get("authOptions", {}).get("mode") == "token", cluster.get("rayVersion", "0.0")
    errors = _broken(
        ("token authentication needs Ray 2.52", token and _version(version) < (2, 52)),
        (f"autoscalerOptions.version excludes {_V2_SWITCH}", switched and "version" in autoscaler),
        (f"{_V2_SWITCH} needs enableInTreeAutoscaling", switched and not cluster.get("enableInTreeAutoscaling")),
    )
    for name, group in [("head", head), *((group["groupName"], group) for group in workers)]:
        errors += [f"{name}: {error}" for error in _group_errors(group, v2)]
    return errors


def _group_errors(group: Object, autoscaler_v2: bool) -> list[str]:
    parameters, pod, labels = group.get("rayStartParams", {}), group["template"]["spec"], group.get("labels", {})
    resources_twice = bool(group.get("resources")) and any(parameters.get(key) for key in _RESOURCE_PARAMETERS)
    return _broken(
        ("a pod needs a container", not pod.get("containers")),
        ("labels do not go into rayStartParams", "labels" in parameters),
        ("a label's value has a wrong form", not all(_LABEL_VALUE.fullmatch(value) for value in labels.values())),
        ("resources stand in two places", resources_twice),
        ("minReplicas is negative", group.get("minReplicas", 0) < 0),
        ("minReplicas is more than maxReplicas", group.get("minReplicas", 0) > group.get("maxReplicas", 2**31)),
        ("autoscaler v2 needs restartPolicy Never", autoscaler_v2 and pod.get("restartPolicy", "Never") != "Never"),
        ("idleTimeoutSeconds needs autoscaler v2", "idleTimeoutSeconds" in group and not autoscaler_v2),
    )


def _broken(*rules: tuple[str, bool]) -> list[str]:
    return [message for message, is_broken in rules if is_broken]


def _environment(group: Object) -> set[str]:
    containers = group["template"]["spec"].get("containers") or [{}]
    return {variable["name"] for variable in containers[0].get("env", [])}


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
