"""The manifests under k8s/: what the API server, the KubeRay operator, Ray and Terrane itself would refuse in them."""

from __future__ import annotations

import copy
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # `tests` is not installed

from orchestrator import accelerators  # noqa: E402
from orchestrator.config import load_recipe  # noqa: E402
from tests.manifests import (  # noqa: E402
    K8S,
    Object,
    cluster_spec,
    entrypoint,
    objects,
    operator_errors,
    ray_objects,
    schema_errors,
    serve_config,
)

DIRECTORIES = sorted(path.parent for path in K8S.rglob("kustomization.yaml"))
TRAIN = [directory for directory in DIRECTORIES if directory.name == "train"]
SERVE = [directory for directory in DIRECTORIES if directory.name == "serve"]
KUBERNETES = "1.34"
SHELL_VALUES = {"TERRANE_STORAGE": "/storage"}


def folder_name(directory: Path) -> str:
    return str(directory.relative_to(K8S))


def each(directories: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("directory", directories, ids=folder_name)


def one(directory: Path, kind: str) -> Object:
    return next(found for found in objects(directory) if found["kind"] == kind)


def ray_object(directory: Path) -> Object:
    return one(directory, "RayJob" if directory.name == "train" else "RayService")


def groups(found: Object) -> dict[str, Object]:
    """The worker groups of a Ray object by name, and its head as `head`."""
    spec = cluster_spec(found)
    assert spec is not None
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def container(group: Object) -> Object:
    return group["template"]["spec"]["containers"][0]


@pytest.fixture
def job() -> Object:
    return one(K8S / "base/train", "RayJob")


@pytest.fixture
def service() -> Object:
    return one(K8S / "base/serve", "RayService")


# --- the API server ---------------------------------------------------------------------------------------------------


@each(DIRECTORIES)
def test_ray_objects_match_the_definitions_of_kuberay(directory: Path) -> None:
    assert {found["metadata"]["name"]: schema_errors(found) for found in ray_objects(directory)} == {
        found["metadata"]["name"]: [] for found in ray_objects(directory)
    }


@each(DIRECTORIES)
def test_core_objects_match_kubernetes(directory: Path) -> None:
    for found in objects(directory):
        if not found["apiVersion"].startswith("ray.io/"):
            kubernetes_validate.validate(found, KUBERNETES, strict=True)


def test_every_overlay_trains_and_serves() -> None:
    overlays = {directory.parent.name for directory in DIRECTORIES if directory.parents[1].name == "overlays"}
    for overlay in overlays:
        assert {found["kind"] for found in ray_objects(K8S / "overlays" / overlay)} == {"RayJob", "RayService"}
    assert overlays == {"local-cpu", "nvidia", "dcu"}


def test_unknown_key_is_refused(job: Object) -> None:
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    group["minReplica"] = group.pop("minReplicas")
    (error,) = schema_errors(job)
    assert "workerGroupSpecs[0]" in error and "'minReplica' was unexpected" in error


def test_unknown_key_of_a_container_is_refused(job: Object) -> None:
    container(groups(job)["cpu"])["volumeMount"] = []
    assert any("'volumeMount' was unexpected" in error for error in schema_errors(job))


def test_wrong_type_is_refused(job: Object) -> None:
    job["spec"]["backoffLimit"] = "3"
    assert schema_errors(job) == ["$.spec.backoffLimit: '3' is not of type 'integer'"]


def test_missing_key_is_refused(job: Object) -> None:
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert any("'template' is a required property" in error for error in schema_errors(job))


def test_quantity_may_be_a_number_or_a_string_but_not_nonsense(job: Object) -> None:
    limits = container(groups(job)["cpu"])["resources"]["limits"]
    limits["cpu"] = 4
    assert schema_errors(job) == []
    limits["cpu"] = "four"
    assert any("'four' does not match" in error for error in schema_errors(job))


def test_key_with_a_default_and_null_are_left_out_without_error(job: Object) -> None:
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    del group["minReplicas"]
    group["scaleStrategy"] = None
    assert schema_errors(job) == []


# --- the operator -----------------------------------------------------------------------------------------------------


@each(DIRECTORIES)
def test_ray_objects_keep_the_rules_of_the_operator(directory: Path) -> None:
    for found in ray_objects(directory):
        assert operator_errors(found) == []


def change(path: str, value: Any) -> Callable[[Object], None]:
    """A function that sets the value at a dotted path; numbers index lists, and None deletes."""

    def apply(found: Object) -> None:
        *parents, last = path.split("/")
        node: Any = found["spec"]
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[last] = value
        if value is None:
            del node[last]

    return apply


CLUSTER = "rayClusterSpec"
GROUP = f"{CLUSTER}/workerGroupSpecs/0"
V2_SWITCH = [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]
JOB_RULES = {
    "one of rayClusterSpec and clusterSelector": [change(CLUSTER, None)],
    "ttlSecondsAfterFinished needs": [change("shutdownAfterJobFinishes", False)],
    "deletionRules exclude": [change("deletionStrategy", {"deletionRules": [{"policy": "DeleteSelf"}]})],
    "suspend needs": [
        change("suspend", True),
        change("shutdownAfterJobFinishes", False),
        change("ttlSecondsAfterFinished", 0),
    ],
    "backoffLimit excludes clusterSelector": [change("clusterSelector", {"ray.io/cluster": "mine"})],
    "backoffLimit excludes InteractiveMode": [change("submissionMode", "InteractiveMode")],
    "SidecarMode excludes": [change("submissionMode", "SidecarMode")],
    "token authentication needs Ray 2.52": [change(f"{CLUSTER}/rayVersion", "2.51.1")],
    "autoscalerOptions.version excludes": [
        change(f"{CLUSTER}/headGroupSpec/template/spec/containers/0/env", V2_SWITCH)
    ],
    "RAY_enable_autoscaler_v2 needs": [
        change(f"{CLUSTER}/enableInTreeAutoscaling", False),
        change(f"{CLUSTER}/headGroupSpec/template/spec/containers/0/env", V2_SWITCH),
    ],
    "cpu: a pod needs a container": [change(f"{GROUP}/template/spec/containers", [])],
    "cpu: labels do not go into rayStartParams": [change(f"{GROUP}/rayStartParams/labels", "a=b")],
    "cpu: a label's value": [change(f"{GROUP}/labels/accelerator", "two words")],
    "head: resources stand in two places": [change(f"{CLUSTER}/headGroupSpec/rayStartParams/num-cpus", "0")],
    "cpu: minReplicas is negative": [change(f"{GROUP}/minReplicas", -1)],
    "cpu: minReplicas is more than maxReplicas": [change(f"{GROUP}/minReplicas", 9)],
    "cpu: autoscaler v2 needs restartPolicy": [change(f"{GROUP}/template/spec/restartPolicy", "Always")],
    "cpu: idleTimeoutSeconds needs": [
        change(f"{GROUP}/idleTimeoutSeconds", 60),
        change(f"{CLUSTER}/autoscalerOptions/version", "v1"),
    ],
}
INCREMENTAL = {"type": "NewClusterWithIncrementalUpgrade"}
SERVICE_RULES = {
    "an incremental upgrade needs the autoscaler": [
        change("upgradeStrategy", INCREMENTAL | {"clusterUpgradeOptions": {"gatewayClassName": "istio"}}),
        change("rayClusterConfig/enableInTreeAutoscaling", False),
    ],
    "an incremental upgrade needs a gatewayClassName": [change("upgradeStrategy", INCREMENTAL)],
    "the head service has no name": [change("rayClusterConfig/headGroupSpec/headService/metadata/name", "mine")],
}


@pytest.mark.parametrize("rule", JOB_RULES)
def test_job_against_a_rule_is_refused(job: Object, rule: str) -> None:
    for apply in JOB_RULES[rule]:
        apply(job)
    (error,) = operator_errors(job)
    assert rule in error


@pytest.mark.parametrize("rule", SERVICE_RULES)
def test_service_against_a_rule_is_refused(service: Object, rule: str) -> None:
    for apply in SERVICE_RULES[rule]:
        apply(service)
    (error,) = operator_errors(service)
    assert rule in error


@pytest.mark.parametrize("name", ["Terrane", "1-run", "run-", "r" * 48])
def test_name_that_cannot_name_a_cluster_is_refused(job: Object, name: str) -> None:
    job["metadata"]["name"] = name
    assert operator_errors(job) == ["metadata.name is no DNS label of at most 47 characters"]


def test_rules_leave_their_object_alone(job: Object) -> None:
    before = copy.deepcopy(job)
    operator_errors(job)
    schema_errors(job)
    assert job == before


# --- Terrane ----------------------------------------------------------------------------------------------------------


@each(TRAIN)
def test_entrypoint_runs_a_job_of_this_repository_on_a_recipe_of_it(directory: Path) -> None:
    python, flag, module, recipe, *overrides = shlex.split(entrypoint(one(directory, "RayJob")))
    package, name = module.split(".")
    assert (python, flag, package) == ("python", "-m", "jobs")
    assert (ROOT / "jobs" / f"{name}.py").is_file()
    assert load_recipe(ROOT / recipe, [expand(override) for override in overrides]).storage == "/storage"


@each(TRAIN)
def test_variables_of_the_entrypoint_are_set_where_its_shell_runs(directory: Path) -> None:
    job = one(directory, "RayJob")
    (submitter,) = job["spec"]["submitterPodTemplate"]["spec"]["containers"]
    assert [source["configMapRef"]["name"] for source in submitter["envFrom"]] == ["terrane-settings"]
    assert set(re.findall(r"\$(\w+)", entrypoint(job))) <= one(directory, "ConfigMap")["data"].keys()


def test_a_retry_names_the_same_run(job: Object) -> None:
    """The name and the storage are what finds the last commit: neither may depend on the try."""
    overrides = dict(part.split("=", 1) for part in shlex.split(entrypoint(job))[4:])
    assert overrides["name"] == "tiny" and overrides["storage"] == "$TERRANE_STORAGE"
    assert job["spec"]["backoffLimit"] > 0 and job["spec"]["shutdownAfterJobFinishes"]


@each(SERVE)
def test_arguments_of_the_service_are_fields_of_serve_args(directory: Path) -> None:
    from serve.args import ServeArgs

    (application,) = serve_config(one(directory, "RayService"))["applications"]
    assert application["import_path"] == "serve.app:build"
    assert application["args"].keys() <= ServeArgs.model_fields.keys()
    ServeArgs.model_validate(application["args"])


def test_import_path_of_the_service_is_a_function(service: Object) -> None:
    (application,) = serve_config(service)["applications"]
    module, name = application["import_path"].split(":")
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert re.search(rf"^def {name}\(", source, re.MULTILINE)


@each([directory for directory in SERVE if (directory.parent / "train").is_dir()])
def test_service_serves_the_model_that_the_job_exports(directory: Path) -> None:
    (application,) = serve_config(one(directory, "RayService"))["applications"]
    storage = one(directory.parent / "train", "ConfigMap")["data"]["TERRANE_STORAGE"]
    overrides = dict(
        part.split("=", 1) for part in shlex.split(entrypoint(one(directory.parent / "train", "RayJob")))[4:]
    )
    assert application["args"]["model"] == f"{storage}/{overrides['name']}/model"


@each(SERVE)
def test_a_worker_has_room_for_a_replica(directory: Path) -> None:
    (application,) = serve_config(one(directory, "RayService"))["applications"]
    for name, group in groups(one(directory, "RayService")).items():
        if name != "head":
            assert float(container(group)["resources"]["limits"]["cpu"]) >= application["args"]["cpus_per_replica"]


@each(TRAIN + SERVE)
def test_labels_name_known_accelerators(directory: Path) -> None:
    for name, group in groups(ray_object(directory)).items():
        if name != "head":
            assert group["labels"][accelerators.LABEL] in accelerators.ACCELERATORS


@each(TRAIN + SERVE)
def test_head_takes_no_work(directory: Path) -> None:
    assert groups(ray_object(directory))["head"]["resources"] == {"CPU": "0"}


@each(TRAIN + SERVE)
def test_pods_get_settings_and_keys_by_reference_only(directory: Path) -> None:
    assert not [found for found in objects(directory) if found["kind"] == "Secret"]
    for group in groups(ray_object(directory)).values():
        sources = container(group)["envFrom"]
        assert {"configMapRef": {"name": "terrane-settings"}} in sources
        assert {"secretRef": {"name": "terrane-s3", "optional": True}} in sources
        assert "env" not in container(group)


@each(TRAIN + SERVE)
def test_shared_memory_holds_the_object_store(directory: Path) -> None:
    for group in groups(ray_object(directory)).values():
        (mount,) = [mount for mount in container(group)["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        memory = volumes[mount["name"]]["emptyDir"]
        assert memory["medium"] == "Memory"
        assert int(group["rayStartParams"]["object-store-memory"]) < in_bytes(memory["sizeLimit"])
        assert in_bytes(memory["sizeLimit"]) < in_bytes(container(group)["resources"]["limits"]["memory"])


@each(TRAIN + SERVE)
def test_worker_drains_within_its_grace_period(directory: Path) -> None:
    for name, group in groups(ray_object(directory)).items():
        if name == "head":
            continue
        command = container(group)["lifecycle"]["preStop"]["exec"]["command"][-1]
        found = re.search(r"--deadline-remaining-seconds (\d+)", command)
        assert found and int(found[1]) < group["template"]["spec"]["terminationGracePeriodSeconds"]


@each(TRAIN + SERVE)
def test_disruption_budget_protects_the_head(directory: Path) -> None:
    wanted = one(directory, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
    labels = groups(ray_object(directory))["head"]["template"]["metadata"]["labels"]
    assert wanted == labels | {"ray.io/node-type": "head"}


@each(TRAIN + SERVE)
def test_all_images_of_a_cluster_hold_the_ray_that_is_declared(directory: Path) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    base = re.search(r"^ARG RAY_IMAGE=rayproject/ray:([\d.]+)-py311", (K8S / "Dockerfile").read_text(), re.MULTILINE)
    assert pinned and base
    assert {cluster_spec(ray_object(directory))["rayVersion"], base[1]} == {pinned[1]}


def expand(word: str) -> str:
    """A word as the shell of the submitter would see it."""
    return re.sub(r"\$(\w+)", lambda found: SHELL_VALUES[found[1]], word)


def in_bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()
    return int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]


# --- Ray's own reading of them ----------------------------------------------------------------------------------------


@each(TRAIN + SERVE)
def test_autoscaler_sees_devices_and_labels(directory: Path) -> None:
    """Private to Ray, and the only place that tells what KubeRay's autoscaler makes of a worker group."""
    kuberay = pytest.importorskip("ray.autoscaler._private.kuberay.autoscaling_config")
    cluster = {"metadata": {"name": "c", "namespace": "n"}, "spec": cluster_spec(ray_object(directory))}
    types = kuberay._derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    head = types.pop("headgroup")
    assert head["resources"]["CPU"] == 0
    devices = {name: kind["resources"].get("GPU", 0) for name, kind in types.items()}
    assert devices == {name: {"cpu": 0, "nvidia": 1, "dcu": 4}[name] for name in types}
    assert all(accelerators.LABEL in kind["labels"] for kind in types.values())


@each(SERVE)
def test_serve_reads_the_config(directory: Path) -> None:
    schema = pytest.importorskip("ray.serve.schema")
    config = schema.ServeDeploySchema.model_validate(serve_config(one(directory, "RayService")))
    assert config.applications[0].route_prefix == "/" and config.http_options.host == "0.0.0.0"
