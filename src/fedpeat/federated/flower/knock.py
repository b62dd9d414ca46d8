"""Whether a server's gate answers, and with a certificate that the device's authority signed."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from fedpeat.core.errors import ConfigError

__all__ = ["knock"]

_TIME_OUT_SECONDS = 10.0
_NO_SUCH_NAME = 62  # X509_V_ERR_HOSTNAME_MISMATCH of OpenSSL
_NO_SUCH_ADDRESS = 64  # X509_V_ERR_IP_ADDRESS_MISMATCH
_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED


def knock(host: str, port: int, ca: Path) -> str:
    """Say why nobody answers; nothing if the server does.

    Args:
        host: Name or address of the server.
        port: Its port.
        ca: Certificate of the authority.

    Returns:
        A reason that may pass: the server may not be up yet. Empty if it is.

    Raises:
        ConfigError: If who answers is not the server of these keys, which will not pass.
    """
    context = ssl.create_default_context(cafile=ca)
    place = f"{host}:{port}"
    try:
        with (
            socket.create_connection((host, port), _TIME_OUT_SECONDS) as link,
            context.wrap_socket(link, server_hostname=host),
        ):
            return ""
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"{place} {_meaning(error, host, ca)}") from error
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError):
        return "the connection was cut"  # a gate, or what is before it, that is just going down
    except ssl.SSLError as error:
        raise ConfigError(
            f"{place} must be a fedpeat server, which speaks TLS, got {error.reason or error}"
        ) from error
    except socket.gaierror as error:
        return f"no such host ({error.strerror})"
    except UnicodeError:
        raise ConfigError(f"the server must be a name or an address, got {host!r}") from None
    except OSError as error:
        return error.strerror or str(error)


def _meaning(error: ssl.SSLCertVerificationError, host: str, ca: Path) -> str:
    if error.verify_code == _EXPIRED:
        return "has a certificate that has expired; make its keys anew"
    if error.verify_code in {_NO_SUCH_NAME, _NO_SUCH_ADDRESS}:
        return f"has a certificate that does not name {host}; use a name that was given to --hosts"
    return f"must have a certificate of the authority of {ca}, got: {error.verify_message}"
