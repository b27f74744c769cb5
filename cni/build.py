"""Make the executable ``flannel``: one file for hosts that have Python, or one with a directory for hosts that do not.

Not part of the plugin; ``script/cni`` runs it. Two costs dominate the start of a small Python program, compiling it
and searching the disk for its modules. So all modules travel inside the file, compiled, behind an importer of a few
lines. Another Python than the one it was built with finds the source in the same file and compiles that (slower, not
wrong).
"""

from __future__ import annotations
import __future__

import argparse
import base64
import importlib.util
import marshal
import os
import platform
import py_compile
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from types import CodeType

HERE = Path(__file__).resolve().parent
NOT_IN_THE_PLUGIN = {"build", "conflist"}

STUB = """\
{shebang}
# The CNI plugin flannel. Made by script/cni for Python {version}; runs on 3.10 and newer, fastest on the one it was
# made for. The lines at the end hold its modules: "#:" compiled, "#=" as source.
import sys
if sys.version_info < (3, 10):
    print('{{"cniVersion": "0.3.1", "code": 999, "msg": "the CNI plugin flannel needs Python 3.10 or newer, this is %d.%d",'
          ' "details": "build it with script/cni --standalone, or with --python for a newer one"}}' % sys.version_info[:2])
    sys.exit(1)
from binascii import a2b_base64
from marshal import loads
from _frozen_importlib import spec_from_loader
from _frozen_importlib_external import MAGIC_NUMBER

with open(__file__, "rb") as file:
    _, compiled, source = file.read().rsplit(b"\\n#", 2)
if MAGIC_NUMBER == {magic!r}:
    modules = loads(a2b_base64(compiled[1:]))
else:
    from zlib import decompress
    modules = loads(decompress(a2b_base64(source[1:])))


class Modules:
    def find_spec(self, name, path=None, target=None):
        return spec_from_loader(name, self, is_package=name == "cni") if name in modules else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        code = modules[module.__name__]
        exec(loads(code) if isinstance(code, bytes) else code, module.__dict__)


sys.meta_path.insert(0, Modules())
from cni.__main__ import main
from os import _exit
_exit(main())
"""

# Finds its directory, then has the bundled loader run the bundled interpreter: nothing of the host is used.
LAUNCHER = """\
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <limits.h>
int main(void) {
    static char here[PATH_MAX], loader[PATH_MAX + 64], libs[PATH_MAX + 64], python[PATH_MAX + 64], plugin[PATH_MAX + 64];
    ssize_t length = readlink("/proc/self/exe", here, sizeof here - 1);
    char *slash = length > 0 ? strrchr(here, '/') : 0;
    if (slash) {
        *slash = 0;
        snprintf(loader, sizeof loader, "%s/flannel.d/lib/LOADER", here);
        snprintf(libs, sizeof libs, "%s/flannel.d/lib", here);
        snprintf(python, sizeof python, "%s/flannel.d/bin/python3", here);
        snprintf(plugin, sizeof plugin, "%s/flannel.d/flannel.py", here);
        execl(loader, loader, "--library-path", libs, python, "-I", "-S", plugin, (char *)0);
    }
    printf("{\\"cniVersion\\":\\"0.1.0\\",\\"code\\":5,\\"msg\\":\\"cannot start %s\\","
           "\\"details\\":\\"the directory flannel.d must stand beside the program flannel\\"}\\n", loader);
    return 1;
}
"""


def plugin_sources() -> dict[str, str]:
    """The plugin's modules by their full names."""
    return {
        "cni" if path.stem == "__init__" else f"cni.{path.stem}": path.read_text(encoding="utf-8")
        for path in sorted(HERE.glob("*.py"))
        if path.stem not in NOT_IN_THE_PLUGIN
    }


def render(sources: dict[str, str], python: str) -> bytes:
    """The program as one file, compiled for the running interpreter. ``python`` goes into its first line."""
    compiled = {name: marshal.dumps(_compile(name, text)) for name, text in sources.items()}
    stub = STUB.format(
        # The kernel hands a script's interpreter one argument only: -I (no environment, no user paths), -S (no site).
        shebang=f"#!{python} -IS",
        version=platform.python_version(),
        magic=importlib.util.MAGIC_NUMBER,
    ).encode()
    plain = zlib.compress(marshal.dumps(sources, 2), 9)
    return (
        stub + b"#:" + base64.b64encode(marshal.dumps(compiled)) + b"\n#=" + base64.b64encode(plain) + b"\n"
    )  # fmt: skip


def _compile(name: str, text: str) -> CodeType:
    # The future import is asked for here, so that the module __future__ need not be found and read at every start.
    text = text.replace("from __future__ import annotations\n", "\n", 1)
    flags = __future__.annotations.compiler_flag
    code: CodeType = compile(text, f"<flannel>/{name}", "exec", flags=flags, dont_inherit=True, optimize=2)
    return code


def install(path: Path, content: bytes) -> None:
    """Replace the file in one step, so that a runtime that calls it meanwhile sees the old or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o755)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def build_plain(directory: Path, python: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    install(directory / "flannel", render(plugin_sources(), python))


def build_standalone(directory: Path) -> None:
    """``flannel`` and ``flannel.d/``: the interpreter, the C library and the few modules that the plugin loads."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".flannel.d.") as work:
        root = Path(work, "flannel.d")
        (root / "bin").mkdir(parents=True)
        interpreter = Path(sys.executable).resolve()
        shutil.copy(interpreter, root / "bin" / "python3")
        modules = _needed_modules()
        _copy_modules(root, modules)
        loader = _copy_libraries(root / "lib", [interpreter, *(path for path in modules if path.suffix == ".so")])
        (root / "flannel.py").write_bytes(render(plugin_sources(), sys.executable))
        for path in root.rglob("*"):
            # The temporary directory is private; its content is for everybody.
            path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" or path.name == loader else 0o644)
        launcher = _compile_launcher(Path(work), loader)
        target = directory / "flannel.d"
        if target.exists():
            target.rename(Path(work, "old"))
        root.chmod(0o755)
        root.rename(target)
        install(directory / "flannel", launcher)


def _needed_modules() -> list[Path]:
    """The files that a bare interpreter reads when it imports every module of the plugin."""
    names = sorted(name for name in plugin_sources() if name != "cni.__main__")
    script = (
        f"import sys; sys.path.insert(0, {str(HERE.parent)!r})\n"
        f"import {', '.join(names)}, ctypes, encodings.utf_8, encodings.ascii, encodings.latin_1, fcntl, zlib, time\n"
        "print('\\n'.join(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)))"
    )
    command = [sys.executable, "-I", "-S", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [path for line in done.stdout.splitlines() if not (path := Path(line)).is_relative_to(HERE)]


def _copy_modules(root: Path, modules: list[Path]) -> None:
    library = root / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    dynload = library / "lib-dynload"
    dynload.mkdir(parents=True)  # the interpreter looks for it, empty or not
    standard = Path(os.__file__).parent
    for path in modules:
        if path.suffix == ".so":
            shutil.copy(path, dynload / path.name)
            continue
        target = library / path.relative_to(standard).with_suffix(".pyc")
        target.parent.mkdir(parents=True, exist_ok=True)
        py_compile.compile(
            str(path), str(target), optimize=2, doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )  # fmt: skip
    # The file by which the interpreter recognises its library; it is frozen into the interpreter itself.
    (library / "os.py").touch()


def _copy_libraries(target: Path, binaries: list[Path]) -> str:
    """The shared libraries of the binaries, and the dynamic loader, whose name is returned."""
    loader = ""
    for binary in binaries:
        listed = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=True).stdout
        for line in listed.splitlines():
            path = next((Path(word) for word in line.split() if word.startswith("/")), None)
            if path is None or not path.exists():
                continue
            shutil.copy(path, target / path.name)
            if path.name.startswith("ld-"):
                loader = path.name
    if not loader:
        raise SystemExit("script/cni: ldd names no dynamic loader; --standalone needs a Python linked dynamically")
    return loader


def _compile_launcher(work: Path, loader: str) -> bytes:
    source, binary = work / "launcher.c", work / "launcher"
    source.write_text(LAUNCHER.replace("LOADER", loader), encoding="ascii")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-static", "-Os", "-s", "-o", str(binary), str(source)], check=True)
    return binary.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="script/cni", description="Build the CNI plugin: put an executable 'flannel' into DIR."
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="for example /opt/cni/bin")
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="for hosts without Python: bring the interpreter along, in DIR/flannel.d",
    )
    parser.add_argument(
        "--python", default="/usr/bin/python3", metavar="PATH", help="Python of the hosts (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.standalone:
        build_standalone(options.directory)
    else:
        build_plain(options.directory, options.python)


if __name__ == "__main__":
    main()
