"""Which addresses are the internet's: what a program asks on others' behalf must be one of them."""

import ipaddress

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Local to a network, and global to Python before 3.11.10: RFC 8215's and, of old, RFC 3879's.
_LOCAL = (ipaddress.ip_network("64:ff9b:1::/48"), ipaddress.ip_network("fec0::/10"))


def is_public(address: str) -> bool:
    """Whether an IP address is the internet's; one that carries another counts as that.

    Raises:
        ValueError: it is no address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        carried = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if carried is None and ip in _NAT64:
            carried = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if carried is not None:
            return is_public(str(carried))
    return ip.is_global and not ip.is_multicast and not any(ip in one for one in _LOCAL)


def may_be_public(host: str) -> bool:
    """False for an address that is not; a name is for whoever resolves it to check."""
    try:
        return is_public(host)
    except ValueError:
        return True
