"""Render every kustomization of k8s/ and check what comes out against the published schemas; part of `make check`.

Kubernetes' own resources are checked strictly (no unknown field) against the oldest and the newest version that they are meant for, and
those of KEDA, Kueue and Kubeflow Trainer against k8s/schemas.yaml. Needs `kubectl` or `kustomize`; without either it says so and ends well.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[1] / "k8s"
VERSIONS = ("1.30", "1.37")
Resource = dict[str, Any]


def renderer() -> list[str] | None:
    """The command that renders the folder that is put after it; None: there is none on PATH."""
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    return ["kustomize", "build"] if shutil.which("kustomize") else None


def kustomizations() -> list[Path]:
    """What can be applied by itself."""
    return [*sorted((ROOT / "overlays").iterdir()), ROOT / "data-loader"]


def render(folder: Path, command: list[str]) -> list[Resource]:
    """The resources of a kustomization.

    Raises:
        ValueError: it can't be rendered; with what the command said.
    """
    result = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    if result.returncode != 0 or result.stderr:  # warnings are of fields that will be gone
        raise ValueError(result.stderr.strip() or f"{command[0]} ended with {result.returncode}")
    return list(yaml.safe_load_all(result.stdout))


def faults(resource: Resource, schemas: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a resource, one fault a string."""
    kind = f"{resource['apiVersion']} {resource['kind']}"
    if kind not in schemas:
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(resource, version, strict=True)
            except kubernetes_validate.ValidationError as invalid:
                yield f"in Kubernetes {version}: {'.'.join(str(part) for part in invalid.path)}: {invalid.message}"
            except kubernetes_validate.SchemaNotFoundError:
                yield f"{kind} is neither in Kubernetes {version} nor in k8s/schemas.yaml"
        return
    whole = {
        "type": "object",
        "additionalProperties": False,
        "required": ["spec"],
        "properties": {"apiVersion": {}, "kind": {}, **schemas[kind]},
    }
    for error in jsonschema.Draft202012Validator(whole).iter_errors(resource):
        yield f"{error.json_path}: {error.message}"
    for job in resource["spec"].get("template", {}).get("spec", {}).get("replicatedJobs", []):
        of_job = {"apiVersion": "batch/v1", "kind": "Job", **job["template"]}
        yield from faults(of_job, schemas)


def main() -> int:
    command = renderer()
    if command is None:
        print("check_k8s: skipped, since neither kubectl nor kustomize is on PATH; k8s/ was not checked")
        return 0
    schemas = yaml.safe_load((ROOT / "schemas.yaml").read_text())
    num_faults = num_resources = 0
    for folder in kustomizations():
        try:
            resources = render(folder, command)
        except ValueError as error:
            print(f"{folder.relative_to(ROOT.parent)}: {error}")
            num_faults += 1
            continue
        for resource in resources:
            num_resources += 1
            for fault in faults(resource, schemas):
                print(f"{folder.relative_to(ROOT.parent)}: {resource['kind']} {resource['metadata']['name']}: {fault}")
                num_faults += 1
    print(f"check_k8s: {num_resources} resources of {len(kustomizations())} kustomizations, {num_faults} faults")
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
