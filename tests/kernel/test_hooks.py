"""Hooks with a real shell: once, in order, remembered through a restart, in time."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest

from backends.kernel_state import Change, Hook, KernelState, Record, Scope, state_of
from flanneld.dataplane.dataplane import Dataplane
from flanneld.dataplane.hooks import CommandFailed, HookHandler, Memory, run_command, startup_output
from flanneld.lab.netns import Namespace
from flanneld.plan import plan


class Bench:
    """A handler whose commands write into one log."""

    def __init__(self, folder: Path, seconds: float = 20) -> None:
        self.state_file, self.log, self.seconds = folder / "state" / "hooks.json", folder / "log", seconds
        self.restart()

    def restart(self) -> None:
        self.handler = HookHandler(self.state_file, command_seconds=self.seconds)

    def hook(self, name: str, add: str = "", remove: str = "", stdin: str = "", **environment: str) -> Hook:
        say = f'echo "%s {name}" >> {self.log}; %s'
        return Hook(name, say % ("add", add), say % ("remove", remove), tuple(environment.items()), stdin)

    def one_pass(self, *wanted: Hook) -> list[str]:
        """What failed."""
        changes = plan(state_of(*wanted), self.handler.observe(Scope(), {}), lambda _: True)
        return [failure.message for failure in self.handler.apply(changes)] if changes else []

    def said(self) -> list[str]:
        """What the commands said since the last question."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_the_shell_is_real_and_the_environment_and_input_arrive(tmp_path: Path) -> None:
    out = run_command(
        'read line; for i in 1 2; do echo "$SUBNET $i \'$line\'"; done | sort -r; [ -n "$PATH" ] && echo path; echo e >&2',
        [("SUBNET", "10.5.2.0/24")],
        "two words\n",
    )
    assert out.splitlines() == ["10.5.2.0/24 2 'two words'", "10.5.2.0/24 1 'two words'", "path", "e"]


def test_a_command_that_fails_is_quoted_with_its_output() -> None:
    with pytest.raises(CommandFailed, match=r"'echo why >&2; exit 3': exit code 3: why"):
        run_command("echo why >&2; exit 3")
    with pytest.raises(CommandFailed, match=r"signal 9: no output"):
        run_command("kill -9 $$")
    with pytest.raises(CommandFailed) as error:
        run_command("seq 100000; exit 1")
    assert len(str(error.value)) < 3000
    assert str(error.value).endswith("100000")


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    for seconds in (0.5, 2, 8):  # a machine that does something else may not get to the note in time
        with pytest.raises(CommandFailed, match=rf"was ended after {seconds:g} s") as error:
            run_command(f"sleep 300 & echo $! > {note}; wait", timeout=seconds)
        assert error.value.timed_out
        if note.exists() and note.read_text():
            break
    pid = int(note.read_text())
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "its child lives on"
        time.sleep(0.02)


def test_what_stays_in_the_background_is_not_waited_for(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    start = time.monotonic()
    assert run_command(f"sleep 300 & echo $! > {note}; echo done", timeout=60) == "done"
    os.kill(int(note.read_text()), 9)
    assert time.monotonic() - start < 60


def test_a_hook_runs_once_and_its_removal_once(bench: Bench) -> None:
    peer = bench.hook("peer 10.5.2.0-24")
    assert bench.one_pass(peer) == []
    assert bench.one_pass(peer) == []
    assert bench.said() == ["add peer 10.5.2.0-24"]
    seen = bench.handler.observe(Scope(), {})
    assert seen == state_of(peer)
    assert bench.handler.observe(Scope(), {}) is seen
    assert bench.one_pass() == bench.one_pass() == []
    assert bench.said() == ["remove peer 10.5.2.0-24"]


def test_the_host_comes_first_and_goes_last(bench: Bench) -> None:
    hooks = [bench.hook(name) for name in ("peer b", "host", "peer a")]
    bench.one_pass(*hooks)
    bench.one_pass()
    assert bench.said() == [
        "add host",
        "add peer a",
        "add peer b",
        "remove peer b",
        "remove peer a",
        "remove host",
    ]


@pytest.mark.field_problem(28)
def test_a_restart_runs_nothing_again_and_removes_who_left_meanwhile(bench: Bench) -> None:
    stays, leaves = (
        bench.hook("peer a"),
        bench.hook("peer b", remove=f'echo "$PUBLIC_IP" >> {bench.log}', PUBLIC_IP="192.0.2.7"),
    )
    bench.one_pass(stays, leaves)
    bench.said()
    bench.restart()
    assert bench.one_pass(stays) == []
    assert bench.said() == ["remove peer b", "192.0.2.7"]


def test_without_the_file_everything_runs_again_even_under_a_running_daemon(bench: Bench) -> None:
    peer = bench.hook("peer a")
    bench.one_pass(peer)
    bench.state_file.unlink()
    bench.one_pass(peer)
    assert bench.said() == ["add peer a", "add peer a"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"hooks": [{}], "startup": null}', '{"hooks": 3}', '{"hooks":[],"startup":{}}']
)
def test_a_damaged_file_counts_as_none(bench: Bench, text: str) -> None:
    bench.state_file.parent.mkdir()
    bench.state_file.write_text(text)
    assert bench.one_pass(bench.hook("peer a")) == []
    assert bench.said() == ["add peer a"]


def test_other_values_are_removal_with_the_old_and_addition_with_the_new(bench: Bench) -> None:
    show = f'echo "$PUBLIC_IP" >> {bench.log}'
    bench.one_pass(bench.hook("peer a", show, show, PUBLIC_IP="192.0.2.1"))
    bench.one_pass(bench.hook("peer a", show, show, PUBLIC_IP="192.0.2.2"))
    assert bench.said() == ["add peer a", "192.0.2.1", "remove peer a", "192.0.2.1", "add peer a", "192.0.2.2"]


def test_an_addition_that_fails_is_tried_until_it_succeeds_and_stops_nobody_else(bench: Bench, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    hooks = bench.hook("peer a", f"test -e {flag}"), bench.hook("peer b")
    (failure,) = bench.one_pass(*hooks)
    assert "exit code 1" in failure
    flag.touch()
    assert bench.one_pass(*hooks) == []
    assert bench.said() == ["add peer a", "add peer b", "add peer a"]


def test_a_removal_that_cannot_succeed_is_given_up(bench: Bench) -> None:
    bench.one_pass(bench.hook("peer a", remove="false"))
    failures = [bench.one_pass() for _ in range(4)]
    assert [len(found) for found in failures] == [1, 1, 1, 0]
    assert "not tried again" in failures[2][0]
    assert bench.said() == ["add peer a"] + 3 * ["remove peer a"]


def test_one_that_hangs_holds_up_the_others_once_only(tmp_path: Path) -> None:
    bench = Bench(tmp_path, seconds=0.5)
    hooks = bench.hook("peer a", "exec sleep 300"), bench.hook("peer b"), bench.hook("peer c")
    assert ["not run yet" in message for message in bench.one_pass(*hooks)] == [False, True, True]
    (failure,) = bench.one_pass(*hooks)
    assert "was ended after 0.5 s" in failure
    assert bench.said() == ["add peer a", "add peer b", "add peer c", "add peer a"]


def test_a_file_that_cannot_be_written_is_a_failure_and_the_commands_still_ran(tmp_path: Path) -> None:
    wall = tmp_path / "wall"
    wall.write_text("")
    bench = Bench(tmp_path)
    bench.handler = HookHandler(wall / "hooks.json")
    (failure,) = bench.one_pass(bench.hook("peer a"))
    assert "cannot be remembered" in failure
    assert bench.said() == ["add peer a"]


def test_the_file_is_for_root_alone_and_complete(bench: Bench) -> None:
    bench.one_pass(bench.hook("peer a", stdin="secret of a peer\n"))
    assert stat.S_IMODE(bench.state_file.stat().st_mode) == 0o600
    assert json.loads(bench.state_file.read_text())["hooks"][0]["stdin"] == "secret of a peer\n"
    assert [entry.name for entry in bench.state_file.parent.iterdir()] == ["hooks.json"]


def test_the_startup_command_runs_once_a_boot_and_makes_the_others_run_again(bench: Bench) -> None:
    command = f"echo pre >> {bench.log}; printf ' published \\n'; echo \"$NETWORK\""
    assert startup_output(bench.state_file, command, [("NETWORK", "10.5.0.0/16")]) == "published \n10.5.0.0/16"
    bench.one_pass(bench.hook("host"))
    assert startup_output(bench.state_file, command) == "published \n10.5.0.0/16", (
        "remembered with its environment then"
    )
    bench.restart()
    assert bench.one_pass(bench.hook("host")) == []
    assert bench.said() == ["pre", "add host"]
    startup_output(bench.state_file, f"echo changed >> {bench.log}")
    assert bench.one_pass(bench.hook("host")) == [], "noticed by a handler that runs already"
    assert bench.said() == ["changed", "add host"]
    assert startup_output(bench.state_file, "") == ""


def test_the_startup_command_is_forgotten_with_the_last_hook_and_the_file_goes(bench: Bench) -> None:
    command = f"echo pre >> {bench.log}"
    startup_output(bench.state_file, command)
    bench.one_pass(bench.hook("host"), bench.hook("peer a"))
    bench.one_pass(bench.hook("host"))
    startup_output(bench.state_file, command)
    assert bench.said() == ["pre", "add host", "add peer a", "remove peer a"]
    bench.one_pass()
    assert not bench.state_file.exists()
    startup_output(bench.state_file, command)
    assert bench.said() == ["remove host", "pre"]


def test_a_startup_command_that_fails_is_not_remembered(bench: Bench) -> None:
    with pytest.raises(CommandFailed):
        startup_output(bench.state_file, "exit 1")
    assert Memory(bench.state_file).startup is None


def test_routes_by_commands_through_the_dataplane(tmp_path: Path) -> None:
    with Namespace("hooks") as namespace, namespace.inside():
        namespace.run("ip link add br0 type bridge")
        namespace.run("ip link set br0 up")
        dataplane = Dataplane([HookHandler(tmp_path / "hooks.json")])
        try:

            def one_pass(desired: KernelState) -> None:
                def owned(record: Record) -> bool:
                    return isinstance(record, Hook)

                assert dataplane.apply(plan(desired, dataplane.observe(Scope()).state, owned)) == []

            peer = Hook(
                "peer", "ip route add $SUBNET dev br0", "ip route del $SUBNET dev br0", (("SUBNET", "10.5.2.0/24"),)
            )
            one_pass(state_of(peer))
            one_pass(state_of(peer))
            assert "10.5.2.0/24" in namespace.run("ip route")
            one_pass({})
            assert "10.5.2.0/24" not in namespace.run("ip route")
        finally:
            dataplane.close()


def test_changes_are_reported_in_their_own_failures(bench: Bench) -> None:
    bad = bench.hook("peer a", "false")
    (failure,) = bench.handler.apply([Change("put", bad)])
    assert (failure.change.record, failure.cause) == (bad, "command")
