"""The CNI plugin ``flannel``: subnet.env in, a delegate's configuration out.

Standard library only (and ``subnet_lease.subnet_file``), so that it starts fast on a host's bare Python.
"""
