"""Call the CNI plugin as a runtime does: environment, configuration on standard input, answer on standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEBIAN_PLUGINS = "/usr/lib/cni"

SUBNET_ENV = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.52.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"

# A delegate that writes down what it was asked, and answers what the file "answer.<verb>" says.
FAKE_DELEGATE = """#!/bin/sh
cat > "{directory}/stdin.$CNI_COMMAND"
env | grep ^CNI_ | sort > "{directory}/env.$CNI_COMMAND"
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME" >> "{directory}/calls"
if [ -e "{directory}/fail.$CNI_COMMAND" ]; then cat "{directory}/fail.$CNI_COMMAND"; exit 1; fi
[ "$CNI_COMMAND" != ADD ] || echo '{{"cniVersion": "1.0.0", "ips": [{{"address": "10.5.52.2/24"}}]}}'
"""


@dataclass
class Answer:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


class Plugin:
    """The plugin with a network of its own below ``directory``; ``prefix`` goes before its command line."""

    def __init__(self, directory: Path, *, command: list[str] | None = None, path: str = "", **fields: Any) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.command = command or [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r});"
                                   " from cni.__main__ import main; sys.exit(main())"]  # fmt: skip
        self.subnet_file = directory / "subnet.env"
        self.data_dir = directory / "data"
        self.networks = directory / "networks"
        self.path = path or str(directory / "bin")
        self.conf: dict[str, Any] = {
            "cniVersion": "1.0.0",
            "name": "cbr0",
            "type": "flannel",
            "subnetFile": str(self.subnet_file),
            "dataDir": str(self.data_dir),
            "ipam": {"dataDir": str(self.networks)},
            "delegate": {"hairpinMode": True, "isDefaultGateway": True},
            "waitSeconds": 0,
            **fields,
        }
        self.subnet_file.write_text(SUBNET_ENV)

    def fake_delegate(self, *names: str) -> Path:
        """Install fake delegates (bridge and host-local if none is named); the directory of what they write down."""
        log = self.directory / "delegate"
        log.mkdir(exist_ok=True)
        programs = Path(self.path)
        programs.mkdir(exist_ok=True)
        for name in names or ("bridge", "host-local"):
            (programs / name).write_text(FAKE_DELEGATE.format(directory=log))
            (programs / name).chmod(0o755)
        return log

    def __call__(
        self, verb: str, container: str = "c1", ifname: str = "eth0", netns: str = "/nowhere", **fields: Any
    ) -> Answer:
        environment = {
            "PATH": os.environ["PATH"],
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": container,
            "CNI_IFNAME": ifname,
            "CNI_NETNS": netns,
            "CNI_PATH": self.path,
        }
        document = {key: value for key, value in {**self.conf, **fields}.items() if value is not None}
        return self.raw(json.dumps(document), environment)

    def raw(self, stdin: str, environment: dict[str, str]) -> Answer:
        done = subprocess.run(
            self.command, input=stdin, capture_output=True, text=True, env=environment, timeout=60, check=False
        )
        return Answer(done.returncode, done.stdout, done.stderr)


def build(directory: Path, *flags: str) -> Path:
    """What ``script/cni`` makes: the executable, in ``directory``."""
    subprocess.run([str(ROOT / "script" / "cni"), *flags, str(directory)], check=True, timeout=120)
    return directory / "flannel"
