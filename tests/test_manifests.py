"""What deploy/ describes for others' engines: containers, units and Kubernetes objects.

Manifests are rendered by kubectl and held against the API's schemas, and every command in them is
read by the command line itself, so that none can name an option that does not exist.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from deploy.cli import COMMANDS, midspan

DEPLOY = Path(__file__).parent.parent / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ["base", "overlays/cpu", "overlays/gpu", "overlays/keda"]
API = "1.32"
IMAGES = ("midspan-broker", "midspan-worker")
WITHOUT_TORCH = {"broker", "status", "keys", "autoscale"}

Object = dict[str, Any]

# what the CRDs of KEDA and of the Prometheus operator want of what stands here
CUSTOM = {
    "ScaledObject": {
        "type": "object",
        "required": ["scaleTargetRef", "triggers"],
        "additionalProperties": False,
        "properties": {
            "scaleTargetRef": {"type": "object", "required": ["name"]},
            "minReplicaCount": {"type": "integer", "minimum": 0},
            "maxReplicaCount": {"type": "integer", "minimum": 1},
            "pollingInterval": {"type": "integer"},
            "cooldownPeriod": {"type": "integer"},
            "advanced": {"type": "object"},
            "triggers": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["type", "metadata"],
                    "properties": {
                        "metricType": {"enum": ["AverageValue", "Value", "Utilization"]},
                        "metadata": {"additionalProperties": {"type": "string"}},
                    },
                },
            },
        },
    },
    "ServiceMonitor": {
        "type": "object",
        "required": ["selector", "endpoints"],
        "additionalProperties": False,
        "properties": {
            "selector": {"type": "object"},
            "endpoints": {"type": "array", "items": {"required": ["port"]}},
        },
    },
}


def require_kubectl() -> str:
    """Its path; where tests are to be complete it must be there."""
    found = shutil.which("kubectl")
    if found is None and not os.environ.get("CI"):
        pytest.skip("kubectl renders manifests, and is not here")
    assert found is not None, "kubectl is wanted"
    return found


def render(overlay: str) -> list[Object]:
    done = subprocess.run(
        [require_kubectl(), "kustomize", str(KUBERNETES / overlay)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def find(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = (o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name))
    return found


def containers(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """Each container with its pod's spec."""
    for each in objects:
        if each["kind"] == "Deployment":
            pod = each["spec"]["template"]["spec"]
            yield from ((pod, container) for container in pod["containers"])


def check_command(arguments: list[str]) -> click.Context:
    """Have the command line read it, without doing anything. Raises click.UsageError."""
    assert arguments[0] in COMMANDS
    context = click.Context(midspan, info_name="midspan")
    command = midspan.get_command(context, arguments[0])
    assert command is not None
    return command.make_context(arguments[0], list(arguments[1:]), parent=context)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_what_the_api_takes(overlay: str) -> None:
    from jsonschema import validate

    objects = render(overlay)
    kinds = [each["kind"] for each in objects]
    assert {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"} <= set(kinds)
    for each in objects:
        if each["kind"] in CUSTOM:
            validate(each["spec"], CUSTOM[each["kind"]])
        else:
            kubernetes_validate.validate(each, API, strict=True)
        assert each["metadata"].get("namespace", "midspan") == "midspan"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_containers_command_is_one_that_there_is(overlay: str) -> None:
    found = []
    for _, container in containers(render(overlay)):
        check_command(container["args"])
        found.append(container["args"][0])
        name = container["image"].partition(":")[0]
        assert name in IMAGES
        assert name == "midspan-worker" or container["args"][0] in WITHOUT_TORCH
    assert sorted(found) == ["broker", "serve", "worker"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_containers_are_nobody_and_write_nothing(overlay: str) -> None:
    for pod, container in containers(render(overlay)):
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        assert {"requests", "limits"} <= container["resources"].keys()
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_in_one_object_are_those_of_another(overlay: str) -> None:
    objects = render(overlay)
    deployments = [each for each in objects if each["kind"] == "Deployment"]
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in deployments]
    for each in objects:
        spec = each.get("spec", {})
        for key in ("selector", "podSelector"):
            wanted = spec.get(key, {})
            wanted = wanted.get("matchLabels", wanted)
            if wanted and "matchExpressions" not in wanted:
                assert any(wanted.items() <= have.items() for have in labels), each
        if each["kind"] == "ScaledObject":
            find(objects, "Deployment", spec["scaleTargetRef"]["name"])
    for pod, container in containers(objects):
        ports = {port["name"] for port in container["ports"]}
        probes = [container[p] for p in ("startupProbe", "readinessProbe", "livenessProbe")]
        assert {probe["httpGet"]["port"] for probe in probes} <= ports
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        for argument in container["args"]:
            for path in re.findall(r"=(/\w+)", argument):
                assert path in {mount["mountPath"] for mount in container["volumeMounts"]}
    services = {each["metadata"]["name"] for each in objects if each["kind"] == "Service"}
    for _, container in containers(objects):
        for host in re.findall(r"tcp://(midspan-[a-z]+)", " ".join(container["args"])):
            assert host in services


def test_keda_reads_a_metric_that_the_broker_has_and_lets_it_hold_steps() -> None:
    from broker.metrics import list_families
    from broker.state import BrokerState

    objects = render("overlays/keda")
    (scaled,) = (each for each in objects if each["kind"] == "ScaledObject")
    (trigger,) = scaled["spec"]["triggers"]
    (metric,) = re.findall(r"midspan_(\w+)", trigger["metadata"]["query"])
    families = list_families(BrokerState(), {}, 0, 0)
    assert metric in {family.name.removeprefix("midspan_") for family in families}
    broker = find(objects, "Deployment", "midspan-broker")
    context = check_command(broker["spec"]["template"]["spec"]["containers"][0]["args"])
    assert context.params["hold_s"] >= 60
    assert "replicas" not in find(objects, "Deployment", "midspan-worker")["spec"]
    (serve,) = (c for _, c in containers(objects) if c["name"] == "serve")
    assert serve["readinessProbe"]["httpGet"]["path"] == "/health"  # /ready would wake a worker


def test_the_secrets_that_pods_want_are_those_that_the_script_makes(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    make_keys(keys)
    api_keys = tmp_path / "api_keys"
    api_keys.write_text("a-key\n")
    require_kubectl()
    script = KUBERNETES / "make-secrets.sh"
    done = subprocess.run(
        [str(script), str(keys), "redis://redis:6379/0", str(api_keys)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    made = {}
    for secret in yaml.safe_load_all(done.stdout):
        kubernetes_validate.validate(secret, API, strict=True)
        made[secret["metadata"]["name"]] = set(secret["data"])
    wanted: dict[str, set[str]] = {}
    for pod, container in containers(render("base")):
        for volume in pod["volumes"]:
            if "secret" in volume:
                wanted.setdefault(volume["secret"]["secretName"], set())
            for source in volume.get("projected", {}).get("sources", []):
                items = {item["key"] for item in source["secret"].get("items", [])}
                wanted.setdefault(source["secret"]["name"], set()).update(items)
        for variable in container.get("env", []):
            source = variable["valueFrom"].get("secretKeyRef")
            if source is not None:
                wanted.setdefault(source["name"], set()).add(source["key"])
    assert made.keys() == wanted.keys()
    for name, names in wanted.items():
        assert names <= made[name]
    assert made["midspan-worker-key"] == {"worker.key_secret", "broker.key"}


def make_keys(directory: Path) -> None:
    from deploy.child import midspan_command

    runner = directory.parent / "midspan"
    runner.write_text(f'#!/bin/sh\nexec {shlex.join(midspan_command())} "$@"\n')
    runner.chmod(0o755)
    environment = {**os.environ, "MIDSPAN": str(runner)}
    for _ in range(2):  # a second time it changes nothing
        subprocess.run(
            [str(DEPLOY / "make_keys.sh"), str(directory)],
            env=environment, check=True, capture_output=True,
        )  # fmt: skip


def test_compose_starts_commands_that_there_are_with_what_it_mounts() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    assert services.keys() == {"redis", "broker", "worker", "serve"}
    for name in ("worker", "serve"):
        check_command(services[name]["command"])
    for service in services.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
    assert services["worker"]["deploy"]["replicas"] == 2
    for service in services.values():
        build = service.get("build")
        assert build is None or (DEPLOY.parent / build["dockerfile"]).exists()
    told = " ".join(map(str, services["worker"]["command"]))
    mounted = [volume.split(":")[1] for volume in services["worker"]["volumes"]]
    assert all(path in mounted for path in re.findall(r"/keys/\S+", told))
    hosts = set(re.findall(r"(?:tcp|redis)://(\w+):", json.dumps(services)))
    assert hosts <= services.keys()


@pytest.mark.parametrize("name", ["broker", "worker"])
def test_an_images_default_command_is_one_that_there_is(name: str) -> None:
    lines = read_dockerfile(name)
    (command,) = (json.loads(line[4:]) for line in lines if line.startswith("CMD "))
    check_command(command)
    assert command[0] == name
    assert 'ENTRYPOINT ["/opt/midspan/bin/midspan"]' in lines
    assert any(line.startswith("USER ") for line in lines)
    (health,) = (line for line in lines if line.startswith("HEALTHCHECK "))
    compile(json.loads(health[health.index("[") :])[2], "health", "exec")
    if name == "broker":
        assert "9100" in health
        assert "0.0.0.0:9100" in command


def read_dockerfile(name: str) -> list[str]:
    return (DEPLOY / "docker" / f"{name}.Dockerfile").read_text().splitlines()


def test_what_images_are_made_of_is_not_kept_from_them() -> None:
    ignore = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    packages = re.search(
        r"wheel\]\npackages = \[(.*?)\]", (DEPLOY.parent / "pyproject.toml").read_text(), re.S
    )
    assert packages is not None
    assert set(re.findall(r'"(\w+)"', packages[1])) <= kept
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "models"} <= kept


@pytest.mark.parametrize("unit", sorted(path.name for path in (DEPLOY / "systemd").iterdir()))
def test_a_units_command_is_one_that_there_is(unit: str) -> None:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "systemd" / unit)
    program, *arguments = shlex.split(parser["Service"]["ExecStart"])
    assert program == "/opt/midspan/bin/midspan"
    check_command(arguments)
    assert parser["Service"]["User"] == "midspan"


def test_a_wrong_option_would_be_noticed() -> None:
    with pytest.raises(click.UsageError, match="--no-such-option"):
        check_command(["broker", "--no-such-option", "1"])
