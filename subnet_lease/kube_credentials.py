"""Who we are to the Kubernetes API, and where it is."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import structlog
import yaml
from lightkube import KubeConfig
from lightkube.config.kubeconfig import SERVICE_ACCOUNT, SingleConfig
from lightkube.config.models import Cluster, User
from lightkube.core.exceptions import ConfigError

from subnet_lease.kube_api import Api
from subnet_lease.store import SetupError

_log = structlog.get_logger("kube")

CLOSE_AFTER: Final = 60.0
"""Seconds for which connections that were left may still be used: longer than any call takes."""


class Connection:
    """The API to call now: made anew when the kubeconfig has changed, so that an operator can mend credentials.

    A service account's token is read again by lightkube itself when the API server refuses the old one.
    """

    def __init__(self, kubeconfig: str, api_url: str) -> None:
        self._kubeconfig = kubeconfig
        self._api_url = api_url
        self._mark = self._file_mark()
        self._api = Api(credentials(kubeconfig, api_url))
        self._renewal = threading.Lock()
        self.leave: Callable[[], None] = lambda: None
        """Ends the watches on the old connections; called after each change, from any thread."""

    def __call__(self) -> Api:
        mark = self._file_mark()
        if mark is not None and mark != self._mark:
            self._mark = mark
            try:
                self.renew()
                _log.info("the kubeconfig has changed and is used", file=self._kubeconfig)
            except SetupError as error:
                _log.warning("the changed kubeconfig is not used", error=str(error))
        return self._api

    def renew(self) -> None:
        """Connect anew, with what the files say now. SetupError: they cannot be used, and all stays as it is.

        Calls that are under way on the old connections end by themselves, or by their time limit; then those are closed.
        """
        with self._renewal:
            before, self._api = self._api, Api(credentials(self._kubeconfig, self._api_url))
        self.leave()
        closing = threading.Timer(CLOSE_AFTER, before.close)
        closing.daemon = True
        closing.start()

    def _file_mark(self) -> tuple[int, int] | None:
        if not self._kubeconfig:
            return None
        try:
            found = Path(self._kubeconfig).expanduser().stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


def credentials(kubeconfig: str, api_url: str, account: str = SERVICE_ACCOUNT) -> SingleConfig:
    """Where the API server is and who we are: the kubeconfig, else the pod's service account. Raises SetupError.

    ``api_url`` replaces the server's address; with neither kubeconfig nor service account it is used without
    credentials.
    """
    try:
        found = _found(kubeconfig, api_url, account)
    except (
        ConfigError,
        OSError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        yaml.YAMLError,
        msgspec.MsgspecError,
    ) as error:
        where = f"--kubeconfig-file={kubeconfig}" if kubeconfig else f"the service account in {account}"
        raise SetupError(
            f"no Kubernetes credentials: {where} cannot be used ({type(error).__name__}: {error});"
            " run as a pod with a service account, or give --kubeconfig-file or --kube-api-url"
        ) from error
    if api_url:
        cluster = msgspec.structs.replace(found.cluster, server=api_url)
        found = found._replace(cluster=cluster)
    return found if found.user is not None else found._replace(user=User())


def _found(kubeconfig: str, api_url: str, account: str) -> SingleConfig:
    if kubeconfig:
        return _chosen(KubeConfig.from_file(kubeconfig))
    token = Path(account, "token")
    if token.exists():
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "")
        if not api_url and not (host and port):
            raise ConfigError("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set")
        server = api_url or f"https://{f'[{host}]' if ':' in host else host}:{port}"
        return _chosen(
            KubeConfig.from_one(
                cluster=Cluster(server=server, certificate_auth=str(Path(account, "ca.crt"))),
                user=User(token_file=str(token)),
            )
        )
    if api_url:
        return _chosen(KubeConfig.from_server(api_url))
    raise ConfigError(f"{token} does not exist")


def _chosen(config: KubeConfig) -> SingleConfig:
    chosen = config.get()
    if chosen is None:
        raise ConfigError("no context is chosen; set current-context")
    return chosen
