"""The network configuration as a file: a mounted ConfigMap, which Kubernetes replaces by swapping a symbolic link."""

from __future__ import annotations

from pathlib import Path

from subnet_lease.network_config import NetworkConfig, parse_network_config
from subnet_lease.store import ConfigInvalid, ConfigMissing


class ConfigFile:
    """Reads the file, and tells whether it is another one than the one that was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: NetworkConfig | None = None
        self._mark: tuple[int, ...] | None = None

    def read(self) -> NetworkConfig:
        """Raises ConfigMissing or ConfigInvalid."""
        mark = self._look()
        self._mark = mark
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigMissing(
                f"the network configuration {self.path} does not exist; mount the ConfigMap kube-flannel-cfg there,"
                " or name the file with --net-config-path"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigInvalid(f"the network configuration {self.path} cannot be read: {error}") from None
        try:
            found = parse_network_config(text)
        except ConfigInvalid as error:
            raise ConfigInvalid(f"{self.path}: {error}") from None
        if found != self.last:
            self.last = found
        assert self.last is not None
        return self.last

    def changed(self) -> bool:
        """Whether the file has been replaced or written since ``read``; a missing file has not."""
        mark = self._look()
        return mark is not None and mark != self._mark

    def _look(self) -> tuple[int, ...] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
