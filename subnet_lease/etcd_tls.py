"""The TLS files for etcd: read, checked, and made into gRPC's credentials."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from subnet_lease.store import SetupError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What --etcd-keyfile, --etcd-certfile and --etcd-cafile name; "" for none."""

    keyfile: str = ""
    certfile: str = ""
    cafile: str = ""

    def marks(self) -> tuple[tuple[int, int] | None, ...]:
        """What changes when one of the files is written or replaced."""
        return tuple(_mark(path) for path in (self.keyfile, self.certfile, self.cafile) if path)

    def credentials(self) -> grpc.ChannelCredentials:
        """From the files as they are now; a CA alone, a client certificate, or both. SetupError names what is wrong."""
        import ssl  # only those who use TLS pay for it

        if bool(self.keyfile) != bool(self.certfile):
            raise SetupError("an etcd client certificate needs both --etcd-certfile and --etcd-keyfile")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Without a file gRPC uses the roots that it brings along; flannel uses the system's.
        authority = self.cafile or ssl.get_default_verify_paths().cafile
        roots = _read("cafile", authority) if authority else None
        key = _read("keyfile", self.keyfile) if self.keyfile else None
        certificate = _read("certfile", self.certfile) if self.certfile else None
        if self.cafile:
            try:
                context.load_verify_locations(cafile=self.cafile)
            except (ssl.SSLError, ValueError):
                raise SetupError(f"--etcd-cafile {self.cafile}: holds no certificate in PEM form") from None
        if self.certfile:
            try:
                context.load_cert_chain(self.certfile, self.keyfile, password=lambda: "")
            except (ssl.SSLError, ValueError) as error:
                raise SetupError(
                    f"--etcd-certfile {self.certfile} and --etcd-keyfile {self.keyfile}: "
                    f"not a certificate and its unencrypted key in PEM form ({getattr(error, 'reason', None) or error})"
                ) from None
        return grpc.ssl_channel_credentials(roots, key, certificate)


def _mark(path: str) -> tuple[int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _read(option: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SetupError(f"--etcd-{option} {path}: {error.strerror or error}") from None
