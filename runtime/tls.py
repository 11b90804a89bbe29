"""TLS: gRPC's credentials from PEM files, which may be renewed while the server runs."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from .config import Settings
from .errors import ConfigError
from .security import stamp

_log = logging.getLogger(__name__)


class PemFiles(NamedTuple):
    """Where the server's certificate, its key, and the authorities of clients' certificates lie."""

    cert: Path
    key: Path
    client_ca: Path | None

    def read(self) -> Any:
        """gRPC's configuration of what the files hold.

        Raises: ConfigError where one cannot be read or does not fit the others.
        """
        # gRPC itself would only say that it cannot listen, and take a key of another certificate without a word
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert, self.key, password="")
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
            pair = self.key.read_bytes(), self.cert.read_bytes()
            authority = self.client_ca.read_bytes() if self.client_ca is not None else None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
            raise ConfigError(f"TLS files {', '.join(str(f) for f in self if f)} cannot be used: {reason}") from None
        return grpc.ssl_server_certificate_configuration([pair], authority)

    def stamp(self) -> tuple[tuple[int, ...], ...]:
        return tuple(stamp(file) for file in self if file is not None)


class Certificates:
    """The PEM files' content, read again when a client connects after they changed.

    Files that cannot be used, as when one of a pair is not renewed yet, leave the certificates as they were.

    Raises: ConfigError.
    """

    def __init__(self, files: PemFiles) -> None:
        self._files = files
        self._stamp = files.stamp()
        self.first = files.read()

    def renewed(self) -> Any:
        """gRPC's new configuration where there is one, else None. Called in gRPC's threads, at every handshake."""
        stamped = self._files.stamp()
        if stamped == self._stamp:
            return None
        self._stamp = stamped
        try:
            found = self._files.read()
        except ConfigError as error:
            _log.error("the certificates stay as they were: %s", error)
            return None
        _log.info("certificates read again")
        return found


def server_credentials(settings: Settings) -> Any:
    """gRPC's credentials of the settings' certificates; None where there are none.

    Raises: ConfigError where a file cannot be read or does not fit the others.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    files = PemFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    certificates = Certificates(files)
    return grpc.dynamic_ssl_server_credentials(
        certificates.first, certificates.renewed, require_client_authentication=files.client_ca is not None
    )
