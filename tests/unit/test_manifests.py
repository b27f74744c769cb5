"""The manifests: valid Kubernetes, equal in their three forms, within bounds, and with flags that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from flanneld.options import parse
from subnet_lease.network_config import parse_network_config

Object = dict[str, Any]

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
VERSIONS = ("1.25", "1.37")
"""The oldest and the newest Kubernetes whose schemas we have."""

FLANNELS = {
    ("Namespace", "kube-flannel"),
    ("ServiceAccount", "flannel"),
    ("ClusterRole", "flannel"),
    ("ClusterRoleBinding", "flannel"),
    ("ConfigMap", "kube-flannel-cfg"),
    ("DaemonSet", "kube-flannel-ds"),
}


def plain() -> list[Object]:
    return [document for document in yaml.safe_load_all((MANIFESTS / "kube-flannel.yml").read_text()) if document]


def chart(values: Object | None = None, namespace: str = "kube-flannel") -> list[Object]:
    """Rendered by Helm's own library."""
    with helm_python.Chart.load(MANIFESTS / "chart") as loaded:
        rendered = loaded.render(values, name="flannel", namespace=namespace)
    return [document for text in rendered.values() for document in yaml.safe_load_all(text) if document]


def overlay(name: str) -> list[Object]:
    """Rendered by kubectl's kustomize."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: overlays are not rendered")
    version = subprocess.run(
        ["kubectl", "version", "--client", "-o", "json"], capture_output=True, text=True, check=True
    )
    number = json.loads(version.stdout)["clientVersion"]["minor"]
    if int(re.sub(r"\D", "", number)) < 24:
        pytest.skip(f"kubectl 1.{number} is too old for today's kustomizations; 1.24 is not")
    done = subprocess.run(["kubectl", "kustomize", str(MANIFESTS / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def one(objects: list[Object], kind: str, name: str = "") -> Object:
    (found,) = [o for o in objects if o["kind"] == kind and name in ("", o["metadata"]["name"])]
    return found


def pod(objects: list[Object]) -> Object:
    found: Object = one(objects, "DaemonSet")["spec"]["template"]["spec"]
    return found


def daemon(objects: list[Object]) -> Object:
    (found,) = [c for c in pod(objects)["containers"] if c["name"] == "kube-flannel"]
    return found


def net_conf(objects: list[Object]) -> str:
    text: str = one(objects, "ConfigMap")["data"]["net-conf.json"]
    return text


def rules(objects: list[Object]) -> set[tuple[str, str, str]]:
    """RBAC as (group, resource, verb)."""
    return {
        (group, resource, verb)
        for rule in one(objects, "ClusterRole")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


VALUES: dict[str, Object] = {
    "defaults": {},
    "everything vxlan": {
        "podCidrv6": "fd00:10::/48",
        "flannel": {
            "backendPort": 4789, "vni": 7, "GBP": True, "directRouting": True, "mtu": 9000, "enableNFTables": True,
            "nodeSelector": {"disk": "ssd"}, "skipCNIConfigInstallation": True, "cniBinDir": "/usr/lib/cni",
        },
        "global": {"imagePullSecrets": [{"name": "registry"}]},
    },
    "wireguard": {
        "flannel": {
            "backend": "wireguard", "backendPort": 5000, "backendPortv6": 5001, "psk": "c2VjcmV0", "tunnelMode": "auto",
            "keepaliveInterval": 25,
        },
    },
    "udp": {"flannel": {"backend": "udp", "backendPort": 8000}},
    "host-gw": {"flannel": {"backend": "host-gw"}},
    "IPv6 only": {"podCidr": "", "podCidrv6": "fd00:10::/48"},
    "network policies": {"netpol": {"enabled": True}},
    "no health port": {"flannel": {"healthz": {"port": 0}}},
}  # fmt: skip


def everything() -> Iterator[tuple[str, list[Object]]]:
    yield "kube-flannel.yml", plain()
    for name, values in VALUES.items():
        yield f"chart, {name}", chart(values)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_kubernetes(version):
    for where, objects in everything():
        for document in objects:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                pytest.fail(f"{where}: {document['kind']}: {error}")


def test_names_and_labels_are_flannels_so_that_it_is_replaced_in_place():
    objects = plain()
    assert {(o["kind"], o["metadata"]["name"]) for o in objects} == FLANNELS
    for found in (objects, chart()):
        daemon_set = one(found, "DaemonSet")
        # A selector cannot be changed later, so it must be the same from the start.
        assert daemon_set["spec"]["selector"] == {"matchLabels": {"app": "flannel"}}
        assert daemon_set["metadata"]["labels"] == {"tier": "node", "app": "flannel"}


def test_the_three_forms_are_one():
    assert (MANIFESTS / "base" / "kube-flannel.yml").read_text() == (MANIFESTS / "kube-flannel.yml").read_text()
    ours, theirs = plain(), chart()
    assert rules(ours) == rules(theirs)
    assert json.loads(net_conf(ours)) == json.loads(net_conf(theirs))
    cni = "cni-conf.json"
    assert json.loads(one(ours, "ConfigMap")["data"][cni]) == json.loads(one(theirs, "ConfigMap")["data"][cni])
    for key in ("args", "env", "volumeMounts", "livenessProbe", "readinessProbe", "resources", "ports", "command"):
        assert daemon(ours)[key] == daemon(theirs)[key], key
    for key in ("volumes", "initContainers", "hostNetwork", "priorityClassName", "affinity"):
        assert pod(ours)[key] == pod(theirs)[key], key


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_chart_makes_a_network_configuration_that_the_daemon_accepts(values):
    found = parse_network_config(net_conf(chart(values)))
    assert found.backend_type == values.get("flannel", {}).get("backend", "vxlan")
    assert found.unknown_keys == ()


def test_chart_values_reach_the_configuration_under_flannels_names():
    everything_vxlan = json.loads(net_conf(chart(VALUES["everything vxlan"])))
    assert everything_vxlan["Backend"] == {
        "Type": "vxlan", "Port": 4789, "VNI": 7, "GBP": True, "DirectRouting": True, "MTU": 9000,
    }  # fmt: skip
    assert everything_vxlan["EnableNFTables"] is True
    assert everything_vxlan["EnableIPv6"] is True
    wireguard = json.loads(net_conf(chart(VALUES["wireguard"])))
    assert wireguard["Backend"] == {
        "Type": "wireguard", "ListenPort": 5000, "ListenPortV6": 5001, "PSK": "c2VjcmV0", "Mode": "auto",
        "PersistentKeepaliveInterval": 25,
    }  # fmt: skip
    only_v6 = json.loads(net_conf(chart(VALUES["IPv6 only"])))
    assert only_v6["EnableIPv4"] is False
    assert "Network" not in only_v6


def test_chart_values_reach_the_pod():
    objects = chart(VALUES["everything vxlan"], namespace="elsewhere")
    assert pod(objects)["nodeSelector"] == {"disk": "ssd"}
    assert pod(objects)["imagePullSecrets"] == [{"name": "registry"}]
    assert [c["name"] for c in pod(objects)["initContainers"]] == ["install-cni-plugin"]
    assert {"name": "cni-plugin", "hostPath": {"path": "/usr/lib/cni", "type": "DirectoryOrCreate"}} in pod(objects)[
        "volumes"
    ]
    assert one(objects, "ClusterRoleBinding")["subjects"][0]["namespace"] == "elsewhere"
    assert one(objects, "DaemonSet")["metadata"]["namespace"] == "elsewhere"
    assert "livenessProbe" not in daemon(chart(VALUES["no health port"]))


def test_the_flags_exist_and_mean_something_to_the_daemon():
    for where, objects in everything():
        options, warnings = parse(daemon(objects)["args"], {})
        assert not warnings, where
        assert options.kube_subnet_mgr, where
        assert options.ip_masq, where
        if "livenessProbe" in daemon(objects):
            assert options.healthz_port == daemon(objects)["ports"][0]["containerPort"], where


def test_nothing_of_ours_is_privileged_and_capabilities_are_the_two_that_are_needed():
    for where, objects in everything():
        ours = [*pod(objects)["initContainers"], daemon(objects)]
        for container in ours:
            security = container["securityContext"]
            assert security["privileged"] is False, where
            assert security["allowPrivilegeEscalation"] is False, where
            assert security["readOnlyRootFilesystem"] is True, where
            assert security["capabilities"]["drop"] == ["ALL"], where
        assert daemon(objects)["securityContext"]["capabilities"]["add"] == ["NET_ADMIN", "NET_RAW"], where


def test_probes_and_requests_are_there():
    container = daemon(plain())
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "healthz"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "healthz"}
    assert container["resources"]["requests"] == {"cpu": "100m", "memory": "128Mi"}
    # A limit would kill the daemon in the moment in which the cluster grows.
    assert "limits" not in container["resources"]


FLANNELS_RULES = {
    ("", "pods", "get"),
    ("", "nodes", "get"),
    ("", "nodes", "list"),
    ("", "nodes", "watch"),
    ("", "nodes/status", "patch"),
}
NOTICE_RULES = {
    ("networking.k8s.io", "networkpolicies", "list"),
    ("networking.k8s.io", "networkpolicies", "watch"),
    ("", "pods", "list"),
}


@pytest.mark.field_problem(43)
def test_rights_are_flannels_and_what_a_named_feature_needs():
    events = {("", "events", "create")}
    assert rules(plain()) == FLANNELS_RULES | events | NOTICE_RULES
    assert rules(chart({"networkPolicyNotice": False})) == FLANNELS_RULES | events
    with_policies = chart(VALUES["network policies"])
    assert "--network-policy-notice" not in daemon(with_policies)["args"]
    assert "--network-policy-notice" in daemon(chart())["args"]
    assert "kube-network-policies" in [c["name"] for c in pod(with_policies)["containers"]]


def test_each_rule_says_why():
    for path in (MANIFESTS / "kube-flannel.yml", MANIFESTS / "chart" / "templates" / "rbac.yaml"):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if line.startswith("- apiGroups"):
                assert lines[number - 1].startswith("# "), f"{path.name}:{number + 1}: a rule without its reason"


def test_the_chart_passes_helms_lint():
    report = helm_python.chart.lint(MANIFESTS / "chart", strict=True)
    assert not report["errors"]
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("name", ["base", "examples/kubeadm", "examples/k3s", "examples/kind"])
def test_overlays_render_to_the_same_objects(name):
    objects = overlay(name)
    assert {(o["kind"], o["metadata"]["name"]) for o in objects} == FLANNELS
    for document in objects:
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
    parse(daemon(objects)["args"], {})


def test_examples_agree_with_the_pod_network_that_they_configure():
    def network(name: str) -> str:
        return str(parse_network_config(net_conf(overlay(name))).network)

    examples = MANIFESTS / "examples"
    kubeadm = yaml.safe_load((examples / "kubeadm" / "kubeadm.yaml").read_text())
    assert kubeadm["networking"]["podSubnet"] == network("examples/kubeadm")
    k3s = yaml.safe_load((examples / "k3s" / "config.yaml").read_text())
    assert k3s["flannel-backend"] == "none"
    assert k3s["cluster-cidr"] == network("examples/k3s")
    assert "--network-policy-notice" not in daemon(overlay("examples/k3s"))["args"]
    kind = yaml.safe_load((examples / "kind" / "cluster.yaml").read_text())
    assert kind["networking"] == {"disableDefaultCNI": True, "podSubnet": network("examples/kind")}
