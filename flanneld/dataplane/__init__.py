"""The only code that touches the kernel: netlink, netfilter, sysctls, tunnels.

It knows records (``backends.kernel_state``), never leases, plans or stores.
"""
