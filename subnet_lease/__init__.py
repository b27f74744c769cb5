"""Who owns which subnet: leases, the network configuration, and the stores that hold them.

Nothing here knows of kernels, devices or routes; it never imports ``backends``, ``flanneld`` or pyroute2.
"""
