"""HOST:PORT, [IPV6]:PORT or unix:PATH: where a listener listens and a client dials.

gRPC takes more and says less: it would listen at port 99999 modulo 65536. Imports nothing of ours;
`config` and `client` call it.
"""

import re
from ipaddress import IPv6Address

HOST = re.compile(r"[A-Za-z0-9_.-]+")
UNIX = "unix:"
MAX_UNIX_PATH_BYTES = 107
"""Of sockaddr_un, without its closing zero."""
FORMS = "HOST:PORT, [IPV6]:PORT or unix:PATH"


def check_address(address: str, min_port: int = 0) -> str:
    """Returns `address` if it has one of the three forms.

    Args:
        address: As a user wrote it.
        min_port: 0 where port 0 means any free one.

    Raises:
        ValueError: What is wrong with it, and what is expected.
    """
    if address.startswith(UNIX):
        _check_path(address.removeprefix(UNIX))
        return address
    host, colon, port = address.rpartition(":")
    if not colon or not host:
        raise ValueError(f"expected {FORMS}")
    is_number = port.isascii() and port.isdigit() and len(port) <= 5
    if not is_number or not min_port <= int(port) <= 65535:
        raise ValueError(f"the port is {port!r}, expected a number from {min_port} to 65535")
    if ":" in host or host.startswith("["):
        _check_ipv6(host, port)
    elif not HOST.fullmatch(host):
        raise ValueError(f"the host is {host!r}, expected a name or an IP address")
    return address


def _check_path(path: str) -> None:
    num_bytes = len(path.encode(errors="surrogateescape"))
    if not 0 < num_bytes <= MAX_UNIX_PATH_BYTES:
        raise ValueError(
            f"the path has {num_bytes} bytes, expected 1 to {MAX_UNIX_PATH_BYTES} after {UNIX!r}"
        )


def _check_ipv6(host: str, port: str) -> None:
    if not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"an IPv6 address goes in brackets: [{host.strip('[]')}]:{port}")
    try:
        IPv6Address(host[1:-1])
    except ValueError:
        raise ValueError(f"the host is {host!r}, expected an IPv6 address in brackets") from None
