"""Open the store that the options name. Each client library is imported only when its store is used."""

from __future__ import annotations

import os

from flanneld.options import Options
from subnet_lease.store import LeaseStore


def open_store(options: Options) -> LeaseStore:
    """The store; it connects when it is first asked. SetupError for what can never work."""
    if options.kube_subnet_mgr:
        return _open_kube(options)
    from subnet_lease.etcd import EtcdStore

    return EtcdStore(
        [e.strip() for e in options.etcd_endpoints.split(",") if e.strip()],
        options.etcd_prefix,
        keyfile=options.etcd_keyfile,
        certfile=options.etcd_certfile,
        cafile=options.etcd_cafile,
        username=options.etcd_username,
        password=options.etcd_password,
        renew_margin_minutes=options.subnet_lease_renew_margin,
    )


def _open_kube(options: Options) -> LeaseStore:
    from subnet_lease.kube import KubeStore

    return KubeStore(
        node_name=options.node_name,
        pod_name=os.environ.get("POD_NAME", ""),
        pod_namespace=os.environ.get("POD_NAMESPACE", ""),
        kubeconfig=options.kubeconfig_file,
        api_url=options.kube_api_url,
        annotation_prefix=options.kube_annotation_prefix,
        net_config_path=options.net_config_path,
        set_network_unavailable=options.set_node_network_unavailable,
        policy_notice=options.network_policy_notice,
    )
