"""What `kubectl kustomize` makes of k8s/: restricted pods, one version everywhere, and nothing that dangles."""

from __future__ import annotations

import importlib.util
import os
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from service.settings import Settings
from service.stack_secrets import make_secrets
from worker.settings import WorkerSettings

REPOSITORY = Path(__file__).parents[2]
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
BESIDE_THE_BASE = ("multi-node", "data-loader")
"""What is applied beside an overlay and uses its claims."""
SECRETS = {"cliprd-addresses", "cliprd-postgres", "cliprd-redis"}
"""What docs/kubernetes.md tells to make."""
Resource = dict[str, Any]


def load_checks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_k8s", REPOSITORY / "scripts/check_k8s.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checks = load_checks()
FOLDERS = [folder.name for folder in checks.kustomizations()]
WITH_BASE = [name for name in FOLDERS if name not in BESIDE_THE_BASE]


@cache
def rendered(name: str) -> tuple[Resource, ...]:
    command = checks.renderer()
    if command is None:
        pytest.skip("neither kubectl nor kustomize is on PATH")
    (folder,) = (folder for folder in checks.kustomizations() if folder.name == name)
    return tuple(checks.render(folder, command))


def of_kind(name: str, *kinds: str) -> list[Resource]:
    return [resource for resource in rendered(name) if resource["kind"] in kinds]


def pods(name: str) -> Iterator[tuple[str, Resource]]:
    """Every pod template, with the name of what makes pods of it."""
    for resource in of_kind(name, "Deployment", "StatefulSet", "Job"):
        yield resource["metadata"]["name"], resource["spec"]["template"]
    for resource in of_kind(name, "Pod"):
        yield resource["metadata"]["name"], resource
    for resource in of_kind(name, "TrainingRuntime"):
        for job in resource["spec"]["template"]["spec"]["replicatedJobs"]:
            yield resource["metadata"]["name"], job["template"]["spec"]["template"]


def containers(name: str) -> Iterator[tuple[str, Resource]]:
    for owner, pod in pods(name):
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            yield owner, container


def matches(selector: Resource, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", []))


@pytest.mark.parametrize("name", FOLDERS)
def test_pods_are_restricted_and_know_nothing_of_kubernetes(name: str) -> None:
    assert list(pods(name))
    for owner, pod in pods(name):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, owner
        assert spec["enableServiceLinks"] is False, "a service called cliprd-… would set variables CLIPRD_…"
        assert spec["securityContext"]["runAsNonRoot"] is True, owner
        assert spec["securityContext"]["runAsUser"] > 0, owner
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, owner
        kinds = {next(key for key in volume if key != "name") for volume in spec.get("volumes", [])}
        assert kinds <= {"emptyDir", "secret", "configMap", "persistentVolumeClaim", "ephemeral"}, owner
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostPath"} & set(spec), owner
    for owner, container in containers(name):
        context = container["securityContext"]
        assert context == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}, owner
        assert "memory" in container["resources"]["limits"], owner
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), owner
    for account in of_kind(name, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert not of_kind(name, "Secret", "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")


@pytest.mark.parametrize("name", FOLDERS)
def test_images_are_of_this_version_and_of_the_compose_file_s(name: str) -> None:
    compose = (REPOSITORY / "docker-compose.yml").read_text()
    for owner, container in containers(name):
        repository, _, tag = container["image"].partition(":")
        assert tag not in ("", "latest"), owner
        if repository.startswith("cliprd-"):
            assert tag == VERSION, f"{owner}: set newTag in k8s/version to the version of pyproject.toml"
        else:
            assert f"IMAGE:-{repository}:{tag}}}" in compose, owner
    for job in of_kind(name, "Job"):
        assert job["metadata"]["name"] == f"cliprd-migrate-{VERSION.replace('.', '-')}", "each version's Job has a name of its own"


@pytest.mark.parametrize("name", WITH_BASE)
def test_nothing_dangles(name: str) -> None:
    def names(kind: str) -> set[str]:
        return {one["metadata"]["name"] for one in of_kind(name, kind)}

    for owner, pod in pods(name):
        spec = pod["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        claims = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "persistentVolumeClaim" in volume}
        assert claims <= names("PersistentVolumeClaim"), owner
        assert {volume["secret"]["secretName"] for volume in volumes.values() if "secret" in volume} <= SECRETS, owner
        (container,) = spec["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == volumes.keys() | volume_templates(name, owner), f"{owner}: all is mounted, and all that is mounted is there"
        for source in container.get("envFrom", []):
            assert source.get("configMapRef", {}).get("name") in names("ConfigMap") or source["secretRef"]["optional"], owner
    assert {pod["spec"]["serviceAccountName"] for _, pod in pods(name)} == names("ServiceAccount"), "none lacks, none is left over"
    for service in of_kind(name, "Service"):
        assert any(service["spec"]["selector"].items() <= pod["metadata"]["labels"].items() for _, pod in pods(name)), service["metadata"]


def volume_templates(name: str, owner: str) -> set[str]:
    (owned,) = (one["spec"] for one in of_kind(name, "Deployment", "StatefulSet", "Job") if one["metadata"]["name"] == owner)
    return {template["metadata"]["name"] for template in owned.get("volumeClaimTemplates", [])}


@pytest.mark.parametrize("name", WITH_BASE)
def test_each_deployment_has_pods_and_a_disruption_budget_of_its_own(name: str) -> None:
    deployments, budgets = of_kind(name, "Deployment"), of_kind(name, "PodDisruptionBudget")
    for deployment in deployments:
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert [one for one in deployments if matches(one["spec"]["selector"], labels)] == [deployment]
        assert len([one for one in budgets if matches(one["spec"]["selector"], labels)]) == 1, "two budgets would forbid every eviction"
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
    assert len(budgets) == len(deployments)


@pytest.mark.parametrize("name", WITH_BASE)
def test_all_that_needs_the_databases_reaches_them_and_nobody_else_does(name: str) -> None:
    policies = of_kind(name, "NetworkPolicy")
    assert any(one["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} for one in policies), "what is not named is denied"

    def ports(labels: dict[str, str], direction: str) -> set[int]:
        found = [one["spec"] for one in policies if matches(one["spec"]["podSelector"], labels)]
        return {port["port"] for spec in found for rule in spec.get(direction, []) for port in rule["ports"]}

    everything = {53, 80, 443, 5432, 6379}
    expected = {"api": everything, "worker": everything, "migrate": {53, 5432}, "postgres": {53}, "redis": {53}}
    if name == "managed":
        expected["migrate"] |= {443, 6379}  # one policy for all databases
    for owner, pod in pods(name):
        labels = pod["metadata"]["labels"]
        assert ports(labels, "egress") == expected[labels["app.kubernetes.io/component"]], owner
    assert ports({"app.kubernetes.io/component": "api"}, "ingress") == {8000}
    assert ports({"app.kubernetes.io/component": "worker"}, "ingress") == set()
    own = ("postgres", "redis") if name != "managed" else ()
    for component, port in zip(own, (5432, 6379), strict=False):
        assert ports({"app.kubernetes.io/component": component}, "ingress") == {port}


@pytest.mark.parametrize("name", FOLDERS)
def test_settings_exist_and_give_a_worker_time_to_save(name: str) -> None:
    known = {f"CLIPRD_{field.upper()}" for settings in (Settings, WorkerSettings) for field in settings.model_fields}
    variables = {entry["name"] for _, container in containers(name) for entry in container.get("env", [])}
    variables |= {key for one in of_kind(name, "ConfigMap") for key in one["data"]}
    assert {variable.removesuffix("_FILE") for variable in variables if variable.startswith("CLIPRD_")} <= known
    for owner, pod in pods(name):
        environment = {entry["name"]: entry["value"] for entry in pod["spec"]["containers"][0].get("env", [])}
        if owner.startswith("cliprd-worker"):
            assert pod["spec"]["terminationGracePeriodSeconds"] >= float(environment["CLIPRD_GRACE_SECONDS"]) + 60
            assert environment["CLIPRD_QUEUES"] == pod["metadata"]["labels"]["app.kubernetes.io/instance"]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_secrets_that_are_made_are_the_ones_that_are_read(name: str, tmp_path: Path) -> None:
    folders = {part: tmp_path / part for part in ("postgres", "redis", "cliprd")}
    for folder in folders.values():
        folder.mkdir()
    make_secrets(**folders)
    read = yaml.safe_dump([container for _, container in containers(name)])
    for part, folder in folders.items():
        made = {file.name for file in folder.iterdir()}
        assert set(re.findall(rf"/run/secrets/{part}/([\w.]+)", read)) == made
    services = {one["metadata"]["name"]: {port["port"] for port in one["spec"]["ports"]} for one in of_kind(name, "Service")}
    for file in folders["cliprd"].iterdir():
        address = urlsplit(file.read_text().strip())
        assert (address.port or 5432) in services[str(address.hostname)]


@pytest.mark.parametrize("name", ["keda", "kueue"])
def test_keda_scales_the_workers_of_each_queue_by_that_queue_s_jobs(name: str) -> None:
    workers = {one["metadata"]["name"]: one for one in of_kind(name, "Deployment") if one["metadata"]["name"] != "cliprd-api"}
    scaled = {one["spec"]["scaleTargetRef"]["name"]: one for one in of_kind(name, "ScaledObject")}
    assert scaled.keys() == workers.keys()
    (service,) = (one["metadata"] for one in of_kind(name, "Service") if one["metadata"]["name"] == "postgres")
    for target, worker in workers.items():
        assert "replicas" not in worker["spec"], "an apply would set it back"
        (trigger,) = scaled[target]["spec"]["triggers"]
        queue = worker["spec"]["selector"]["matchLabels"]["app.kubernetes.io/instance"]
        assert re.findall(r"queue = '([^']*)'", trigger["metadata"]["query"]) == [queue]
        assert trigger["metadata"]["host"].startswith(f"{service['name']}.{service['namespace']}.svc")


def test_kueue_has_quota_of_every_gpu_that_a_worker_may_run_on() -> None:
    label = "nvidia.com/gpu.product"
    (queue,) = of_kind("kueue", "ClusterQueue")
    with_quota = {flavor["name"] for group in queue["spec"]["resourceGroups"] for flavor in group["flavors"]}
    flavors = {one["metadata"]["name"]: one["spec"]["nodeLabels"][label] for one in of_kind("kueue", "ResourceFlavor")}
    assert with_quota == flavors.keys()
    products = {
        product
        for one in of_kind("kueue", "Deployment")
        if (affinity := one["spec"]["template"]["spec"].get("affinity"))
        for term in affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        for expression in term["matchExpressions"]
        if expression["key"] == label
        for product in expression["values"]
    }
    assert products == set(flavors.values())


def test_the_example_of_an_overlay_of_one_s_own_works(tmp_path: Path) -> None:
    command = checks.renderer()
    if command is None:
        pytest.skip("neither kubectl nor kustomize is on PATH")
    (example,) = re.findall(r"```yaml\n# kustomization.yaml\n(.*?)```", (REPOSITORY / "docs/kubernetes.md").read_text(), flags=re.DOTALL)
    (tmp_path / "kustomization.yaml").write_text(example.replace("../cliprd", os.path.relpath(REPOSITORY, tmp_path.resolve())))
    resources = checks.render(tmp_path, command)
    images = {
        container["image"]
        for one in resources
        if one["kind"] == "Deployment"
        for container in one["spec"]["template"]["spec"]["containers"]
    }
    assert images == {f"registry.example.org/cliprd-{part}:{VERSION}" for part in ("service", "worker")}
    (settings,) = (one["data"] for one in resources if one["kind"] == "ConfigMap")
    assert settings["CLIPRD_ARTIFACTS_URL"] == "s3://pictures/cliprd"
    assert settings["CLIPRD_LOG_FORMAT"] == "json", "what the base sets stays"


def test_the_train_job_fits_its_runtime() -> None:
    (runtime,), (job,) = of_kind("multi-node", "TrainingRuntime"), of_kind("multi-node", "TrainJob")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    ((_, pod),) = pods("multi-node")
    (container,) = pod["spec"]["containers"]
    assert container["name"] == "node", "where Trainer puts torchrun's variables"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == job["spec"]["trainer"]["numProcPerNode"]
    (policy,) = of_kind("multi-node", "NetworkPolicy")
    assert matches(policy["spec"]["podSelector"], pod["metadata"]["labels"])


SCHEMAS = yaml.safe_load((REPOSITORY / "k8s/schemas.yaml").read_text())
CONFIG_MAP = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}}
LOCAL_QUEUE = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "metadata": {"name": "x", "namespace": "y"}}


@pytest.mark.parametrize(
    ("resource", "fault"),
    [
        (CONFIG_MAP | {"dta": {}}, "dta"),
        (CONFIG_MAP | {"data": {"a": 1}}, "is not of type"),
        (LOCAL_QUEUE | {"spec": {"clusterQueue": "x", "clusterqueue": "x"}}, "clusterqueue"),
        (LOCAL_QUEUE, "'spec' is a required property"),
        (
            {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue", "metadata": {"name": "x"}},
            "LocalQueue is neither in Kubernetes 1.30",
        ),
    ],
)
def test_the_check_finds_faults(resource: Resource, fault: str) -> None:
    assert any(fault in found for found in checks.faults(resource, SCHEMAS))


def test_a_runtime_s_pods_are_checked_as_a_job_s() -> None:
    (runtime,) = of_kind("multi-node", "TrainingRuntime")
    assert list(checks.faults(runtime, SCHEMAS)) == []
    container = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    faulty = yaml.safe_load(yaml.safe_dump(runtime).replace(f"name: {container['name']}\n", "nam: node\n", 1))
    assert list(checks.faults(faulty, SCHEMAS))


def test_without_kubectl_the_check_says_that_it_checks_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda _: None)
    assert checks.main() == 0
    assert "skipped" in capsys.readouterr().out
