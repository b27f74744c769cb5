"""The udp backend's tunnel: IPv4 packets between a TUN device and one UDP socket, in a process of its own.

``flanneld.dataplane.udp`` runs in the daemon: it starts, adopts, commands and stops the worker. ``__main__.py`` is the
worker and ``worker.py`` its loop; ``packet.py`` and ``segments.py`` are its arithmetic, ``peers.py`` its table,
``device.py`` its descriptors, ``icmp.py`` its refusals. ``control.py`` is what both sides say to each other,
``commands.py`` the worker's answers. Only the worker imports numpy, so that the daemon does not pay for it.
"""
