"""The worker process: python -m flanneld.dataplane.udp_tunnel DEVICE LOCAL PORT UNDERLAY NETWORK [--no-offloads].

It says nothing on standard error and closes it once packets can flow, or says what is wrong and exits with 1. It then
runs until told to stop over its control socket: the daemon that started it may come and go.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import traceback


def main() -> int:
    parser = argparse.ArgumentParser(prog="flanneld.dataplane.udp_tunnel")
    for name in ("device", "local"):
        parser.add_argument(name)
    parser.add_argument("port", type=int)
    for name in ("underlay", "network"):
        parser.add_argument(name)
    parser.add_argument("--no-offloads", action="store_true")
    given = vars(parser.parse_args())
    name, offloads = given.pop("device"), not given.pop("no_offloads")

    from flanneld.dataplane.udp_tunnel.device import DeviceError
    from flanneld.dataplane.udp_tunnel.worker import DeviceGone, Tunnel

    # A signal to the daemon's group is not meant for the worker; SIGTERM still ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        tunnel = Tunnel(name, given, offloads)
    except DeviceError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    gc.freeze()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        tunnel.run()
    except DeviceGone as gone:
        tunnel.commands.say_why(str(gone))
        return 2
    except BaseException:
        tunnel.commands.say_why(traceback.format_exc())
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
