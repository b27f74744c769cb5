"""The daemon: options, underlay choice, planning, the reconciler, health and the composition root.

Only ``flanneld.dataplane`` touches the kernel; only ``flanneld.daemon`` knows every part.
"""
