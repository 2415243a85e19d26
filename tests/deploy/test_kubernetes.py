"""The manifests against the schemas of Kubernetes, and against what xllm-serve takes."""

from pathlib import Path

import pytest

from xllm_compile.scheduler.role_options import check_role_options
from xllm_compile.scheduler.serve import command, given_arguments

yaml = pytest.importorskip("yaml", reason="needs pyyaml, of the dev extra")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate, of the dev extra")

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
SECRETS = {"xllm-keys": {"api-key", "transfer-secret"}, "xllm-tls": {"tls.crt", "tls.key", "ca.crt"}}
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
OBJECTS = [each for name in KUSTOMIZATION["resources"] for each in yaml.safe_load_all((FOLDER / name).read_text())]
WORKLOADS = [each for each in OBJECTS if each["kind"] in ("Deployment", "StatefulSet")]


def name_of(each):
    return f"{each['kind']}-{each['metadata']['name']}"


def options_of(workload):
    """Of the container, with a pod's name and address in their places."""
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["xllm-serve"]
    arguments = [each.replace("$(POD_NAME)", "pod-0").replace("$(POD_IP)", "10.0.0.7") for each in container["args"]]
    assert not any("$(" in each for each in arguments)
    with command.make_context("xllm-serve", arguments) as context:
        check_role_options(context.params["role"], given_arguments(context))
        return container, context.params


@pytest.mark.parametrize("version", ["1.29.0", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("each", OBJECTS, ids=name_of)
def test_schema(each, version):
    kubernetes_validate.validate(each, version, strict=True)


def test_what_the_schema_refuses():
    broken = {**WORKLOADS[0], "spec": {**WORKLOADS[0]["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_every_file_is_in_use():
    assert {path.name for path in FOLDER.glob("*.yaml")} == {"kustomization.yaml", *KUSTOMIZATION["resources"]}


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_the_drain_fits_into_the_grace_period(workload):
    container, options = options_of(workload)
    _, pause_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (
        int(pause_s) + options["drain_timeout"] + 10
        < workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    )


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_names_meet(workload):
    container, options = options_of(workload)
    pod = workload["spec"]["template"]
    role = options["role"]
    assert workload["metadata"]["name"] == role
    assert workload["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    services = {each["metadata"]["name"]: each["spec"] for each in OBJECTS if each["kind"] == "Service"}
    assert services[role]["selector"].items() <= pod["metadata"]["labels"].items()
    if role != "gateway":
        namespace = KUSTOMIZATION["namespace"]
        assert workload["spec"]["serviceName"] == role
        assert options["host"] == f"pod-0.{role}.{namespace}.svc.cluster.local"
        host, _, port = options["registry"].partition(":")
        assert host == f"gateway.{namespace}.svc.cluster.local"
        assert int(port) in [each["port"] for each in services["gateway"]["ports"]]
    ports = {each["name"] for each in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        for handler in container.get(probe, {}).values():
            assert not isinstance(handler, dict) or handler["port"] in ports
    volumes = {each["name"] for each in pod["spec"]["volumes"]}
    assert {each["name"] for each in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_keys_and_certificates_come_from_the_secrets(workload):
    container, options = options_of(workload)
    references = [each["valueFrom"]["secretKeyRef"] for each in container["env"] if "secretKeyRef" in each["valueFrom"]]
    assert {"XLLM_API_KEY"} <= {each["name"] for each in container["env"]}
    for each in references:
        assert each["key"] in SECRETS[each["name"]]
    for option in ("tls_cert", "tls_key", "tls_ca"):
        assert options[option].parent == Path("/tls")
        assert options[option].name in SECRETS["xllm-tls"]
    # What kubelet's probes could not show.
    assert not options["tls_client_auth"]
