"""Which addresses are the internet's: what a program asks on others' behalf must be one of them."""

import ipaddress

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Nobody's on the internet, and global to some release of Python that this runs with.
_OTHERS = tuple(
    map(
        ipaddress.ip_network,
        (
            "64:ff9b:1::/48",  # local to a network: RFC 8215
            "fec0::/10",  # and of old: RFC 3879
            "::/96",  # carries an IPv4 address, and nobody routes it any more: RFC 4291
            "::ffff:0:0:0/96",  # carries one to a translator: RFC 2765
            "192.0.0.0/24",  # for protocols, to the last address: RFC 6890
            "3fff::/20",  # for documents: RFC 9637
            "5f00::/16",  # within networks that route by segments: RFC 9602
        ),
    )
)


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
    return ip.is_global and not ip.is_multicast and not any(ip in one for one in _OTHERS)


def may_be_public(host: str) -> bool:
    """False for an address that is not; a name is for whoever resolves it to check."""
    try:
        return is_public(host)
    except ValueError:
        return True
