"""Hooks: the operator's commands that stand for kernel state which nobody here can see (the extension backend's).

A Hook record is true when its ``add`` command has run with exit code 0 for exactly these values. That cannot be
observed, so it is remembered, in a small file below /run: it outlives a restart of the daemon, as the kernel state that
the commands made does, and goes with a reboot, as that does, too. So a restart runs nothing again, and a peer that left
meanwhile has its ``remove`` run with the values that ``add`` had. Whoever deletes the file has every ``add`` run again.

A record with other values is another state: ``remove`` runs with the old values, then ``add`` with the new. Commands run
one at a time, puts in the order of their names, removals in reverse: "host" comes before every "peer …" and goes last.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from backends.kernel_state import Change, Failure, Hook, Key, Link, Record, Scope
from flanneld.dataplane.handler import Answer

COMMAND_SECONDS: Final = 30
"""How long one command may take. It runs in the reconciler's thread: nothing else is repaired meanwhile."""

REMOVE_TRIES: Final = 3
"""After so many failures a ``remove`` is given up: what it should remove may be gone already."""

OUTPUT_BYTES: Final = 1 << 20
"""How much of a command's output is read: more than a store would take for BackendData."""

OUTPUT_LIMIT: Final = 2000
"""Characters of a failed command's output that an error shows; the last ones, where the reason usually is."""


SAVE_SECONDS: Final = 1
"""How much of what was done a daemon killed in the middle of many commands may forget, and so do again."""


class CommandFailed(Exception):
    """A command did not end with exit code 0 in time; the text has the command, the reason and its output."""

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


def run_command(
    command: str, environment: Iterable[tuple[str, str]] = (), stdin: str = "", timeout: float = COMMAND_SECONDS
) -> str:
    """Run ``sh -c command`` with our environment and ``environment``; trimmed stdout and stderr. Raises CommandFailed.

    Input and output are memory files, not pipes: what the command leaves running in the background may keep them.
    """
    with os.fdopen(os.memfd_create("input"), "w+b") as given, os.fdopen(os.memfd_create("output"), "w+b") as told:
        given.write(stdin.encode(errors="surrogateescape"))
        given.seek(0)
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            env={**os.environ, **dict(environment)},
            stdin=given,
            stdout=told,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the session: sh may have started others
            process.wait()
            raise CommandFailed(
                f"command {_quoted(command)} was ended after {timeout:g} s; let it finish sooner or go into the background",
                timed_out=True,
            ) from None
        told.seek(0)
        output = told.read(OUTPUT_BYTES).decode(errors="replace").strip()
    if code != 0:
        reason = f"exit code {code}" if code > 0 else f"signal {-code}"
        raise CommandFailed(f"command {_quoted(command)}: {reason}: {output[-OUTPUT_LIMIT:] or 'no output'}")
    return output


def startup_output(
    state_file: Path, command: str, environment: Iterable[tuple[str, str]] = (), timeout: float = COMMAND_SECONDS
) -> str:
    """The output of PreStartupCommand, which runs once between two reboots, like the other commands.

    It usually makes the device on which the others put their routes. So when it does run, all others must run again:
    they are forgotten first. When the last of them is removed (a cleanup, a switch to another backend), it is forgotten
    in turn. Raises CommandFailed, OSError.
    """
    memory = Memory(state_file)
    if not command:
        return ""
    known = memory.startup
    if known is not None and known["command"] == command:
        return str(known["output"])
    memory.save({}, None)
    output = run_command(command, environment, timeout=timeout)
    memory.save({}, {"command": command, "output": output})
    return output


class Memory:
    """The file. Its contents, read again only when it has changed; a file that cannot be understood counts as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = (0, 0, 0)
        self._hooks: dict[Key, Hook] = {}
        self._startup: dict[str, Any] | None = None

    @property
    def hooks(self) -> Mapping[Key, Hook]:
        """The same object as long as the file is the same."""
        self._refresh()
        return self._hooks

    @property
    def startup(self) -> dict[str, Any] | None:
        self._refresh()
        return self._startup

    def save(self, hooks: Mapping[Key, Hook], startup: dict[str, Any] | None) -> None:
        """Write all of it, whole or not at all; only root may read it, since peers' data is in it. Raises OSError."""
        if not hooks and startup is None:
            self._path.unlink(missing_ok=True)
            self._hooks, self._startup, self._seen = {}, None, None
            return
        text = json.dumps({"startup": startup, "hooks": [asdict(hook) for hook in hooks.values()]}, indent=1)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).rename(self._path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        self._hooks, self._startup, self._seen = dict(hooks), startup, self._stamp()

    def _refresh(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._hooks, self._startup, self._seen = {}, None, stamp
        if stamp is None:
            return
        try:
            told = json.loads(self._path.read_text(encoding="utf-8"))
            hooks = [_hook(item) for item in told["hooks"]]
            startup = told["startup"]
            if startup is not None and not {"command", "output"} <= startup.keys():
                raise ValueError("startup has no command or no output")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        self._hooks, self._startup = {hook.key: hook for hook in hooks}, startup

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


class HookHandler:
    """The dataplane's handler for Hook records."""

    def __init__(self, state_file: Path, *, command_seconds: float = COMMAND_SECONDS) -> None:
        self._memory = Memory(state_file)
        self._seconds = command_seconds
        self._failed_removals: dict[Key, int] = {}
        self._slow: set[Key] = set()
        self._told: Mapping[Key, Hook] = {}
        self._answer = Answer()

    def handles(self, record: Record) -> bool:
        return isinstance(record, Hook)

    def observe(self, scope: Scope, links: Mapping[str, Link]) -> Answer:  # noqa: ARG002 - the protocol's
        hooks = self._memory.hooks
        if hooks is not self._told:
            self._told, self._answer = hooks, self._answer.with_only(hooks)
        return self._answer

    def apply(self, changes: Sequence[Change]) -> list[Failure]:
        """Run the commands. After one that took too long the rest waits for the next pass, in which it comes last."""
        hooks = dict(self._memory.hooks)
        failures: list[Failure] = []
        saved = time.monotonic()
        hung = ""
        for change in self._ordered(changes):
            if hung:
                failures.append(Failure(change, "postponed", f"not run yet, since {hung}"))
                continue
            try:
                failures += self._apply(change, hooks)
            except CommandFailed as error:
                failures.append(_failure(change, error))
                if error.timed_out:
                    hung = str(error)
                    self._slow.add(change.record.key)
            else:
                self._slow.discard(change.record.key)
            if time.monotonic() - saved > SAVE_SECONDS:
                failures += self._save(change, hooks)
                saved = time.monotonic()
        return failures + self._save(changes[-1], hooks)

    def fileno(self) -> int | None:
        return None

    def invalidate(self) -> None:
        """Nothing is remembered but what the file says."""

    def close(self) -> None:
        """Nothing is held open."""

    def _ordered(self, changes: Sequence[Change]) -> list[Change]:
        by_name = sorted(changes, key=lambda change: str(change.record.key[1]))
        puts = [change for change in by_name if change.op == "put"]
        gone = [change for change in reversed(by_name) if change.op == "remove"]
        return sorted([*puts, *gone], key=lambda c: c.record.key in self._slow)

    def _apply(self, change: Change, hooks: dict[Key, Hook]) -> list[Failure]:
        """Run what this change asks for, and say in ``hooks`` what is true then. Raises CommandFailed."""
        key, wanted, before = change.record.key, change.record, hooks.get(change.record.key)
        assert isinstance(wanted, Hook)
        failures: list[Failure] = []
        if before is not None and before.remove:
            try:
                run_command(before.remove, before.environment, before.stdin, self._seconds)
            except CommandFailed as error:
                tries = self._failed_removals[key] = self._failed_removals.get(key, 0) + 1
                if change.op == "remove" and tries < REMOVE_TRIES:
                    raise
                failures.append(_failure(change, error, " (not tried again)"))
        self._failed_removals.pop(key, None)
        hooks.pop(key, None)
        if change.op == "put":
            if wanted.add:
                run_command(wanted.add, wanted.environment, wanted.stdin, self._seconds)
            hooks[key] = wanted
        return failures

    def _save(self, change: Change, hooks: dict[Key, Hook]) -> list[Failure]:
        if hooks == self._memory.hooks:
            return []
        try:
            # With the last of them goes what PreStartupCommand made: it was theirs.
            self._memory.save(hooks, self._memory.startup if hooks else None)
        except OSError as error:
            told = f"what the commands have done cannot be remembered: {error.strerror}: {error.filename}"
            return [Failure(change, "state_file", told)]
        return []


def _failure(change: Change, error: CommandFailed, remark: str = "") -> Failure:
    return Failure(change, "timeout" if error.timed_out else "command", f"{error}{remark}")


def _hook(told: dict[str, Any]) -> Hook:
    texts = [told[name] for name in ("name", "add", "remove", "stdin")]
    environment = tuple((name, value) for name, value in told["environment"])
    if not all(isinstance(text, str) for text in [*texts, *(word for pair in environment for word in pair)]):
        raise ValueError("a hook is made of texts")
    name, add, remove, stdin = texts
    return Hook(name, add, remove, environment, stdin)


def _quoted(command: str) -> str:
    shown = command if len(command) <= 200 else command[:197] + "..."
    return repr(shown)
