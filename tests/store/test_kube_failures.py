"""KubeStore where the API server is away, refuses, forgets or is another one."""

from __future__ import annotations

import os
import random
import threading

import httpx2
import pytest

from flanneld.lab.wait import wait_until
from subnet_lease.kube import KubeStore
from subnet_lease.store import AccessDenied, SetupError, StoreUnavailable
from tests.store.kube_values import PREFIX, REQUEST, Watcher
from tests.testbed.fake_kube import FakeKube, peer_annotations


@pytest.mark.field_problem(8)
def test_an_unreachable_server_is_waited_for(fake, make_store):
    fake.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    fake.stop()
    store = make_store(fake)
    with pytest.raises(StoreUnavailable) as caught:
        store.acquire(store.read_config(), REQUEST)
    assert fake.url in str(caught.value)
    watcher = Watcher(store)
    wait_until(lambda: store.status.failure is not None)
    fake.start()
    watcher.sees("10.244.2.0-24")
    wait_until(lambda: store.status.failure is None)


@pytest.mark.field_problem(8)
def test_a_server_that_goes_away_takes_nothing_with_it(fake, make_store):
    fake.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    store = make_store(fake)
    watcher = Watcher(store)
    watcher.sees("10.244.2.0-24")
    fake.stop()
    wait_until(lambda: store.status.failure is not None)
    fake.add_peer("n3", "10.244.3.0/24", "192.0.2.3", "02:00:00:00:00:03")
    lists = fake.count("list", "nodes")
    fake.start()
    watcher.sees("10.244.2.0-24", "10.244.3.0-24")
    assert fake.count("list", "nodes") == lists, "the watch resumes where it was, without a new list"
    assert all("10.244.2.0-24" in snapshot.leases for snapshot in watcher.snapshots)


@pytest.mark.field_problem(4)
def test_after_compaction_a_new_list_finds_everything_that_changed(fake, make_store):
    for number in (2, 3):
        fake.add_peer(f"n{number}", f"10.244.{number}.0/24", f"192.0.2.{number}", f"02:00:00:00:00:0{number}")
    watcher = Watcher(make_store(fake))
    watcher.sees("10.244.2.0-24", "10.244.3.0-24")
    unchanged = watcher.snapshots[-1].leases["10.244.3.0-24"]
    fake.stop()
    fake.annotate("n2", peer_annotations("192.0.2.22", "02:00:00:00:00:22"))
    fake.add_peer("n4", "10.244.4.0/24", "192.0.2.4", "02:00:00:00:00:04")
    fake.store.compact()
    fake.start()
    snapshot = watcher.sees("10.244.2.0-24", "10.244.3.0-24", "10.244.4.0-24")
    assert snapshot.leases["10.244.2.0-24"].attrs.backend_data["VtepMAC"] == "02:00:00:00:00:22"
    assert snapshot.leases["10.244.3.0-24"] is unchanged


@pytest.mark.field_problem(14)
def test_a_cluster_restored_from_a_backup_is_listed_again(fake, make_store):
    for number in (2, 3):
        fake.add_peer(f"n{number}", f"10.244.{number}.0/24", f"192.0.2.{number}", f"02:00:00:00:00:0{number}")
    watcher = Watcher(make_store(fake))
    watcher.sees("10.244.2.0-24", "10.244.3.0-24")
    fake.stop()
    fake.delete_node("n3")
    fake.store.restore(500)
    fake.start()
    watcher.sees("10.244.2.0-24", timeout=20)


def test_silence_is_no_failure_but_a_reason_to_ask_again(fake, make_store, monkeypatch):
    monkeypatch.setattr("subnet_lease.kube_api.SILENCE", 0.5)
    fake.bookmark_every = 60
    fake.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    store = make_store(fake)
    watcher = Watcher(store)
    watcher.sees("10.244.2.0-24")
    wait_until(lambda: fake.count("watch", "nodes") >= 4, 20)
    fake.add_peer("n3", "10.244.3.0/24", "192.0.2.3", "02:00:00:00:00:03")
    watcher.sees("10.244.2.0-24", "10.244.3.0-24")
    assert fake.count("list", "nodes") == 1
    assert store.status.errors == {}


def test_a_server_that_answers_no_more_is_noticed_and_the_watch_goes_on_afterwards(fake, make_store, monkeypatch):
    monkeypatch.setattr("subnet_lease.kube_api.SILENCE", 0.5)
    monkeypatch.setattr("subnet_lease.kube_api._CALL_TIMEOUT", httpx2.Timeout(1.0))
    fake.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    watcher = Watcher(make_store(fake))
    watcher.sees("10.244.2.0-24")
    fake.silent.set()
    fake.add_peer("n3", "10.244.3.0/24", "192.0.2.3", "02:00:00:00:00:03")
    wait_until(lambda: watcher.store.status.failure is not None, 20)
    assert watcher.keys == {"10.244.2.0-24"}
    fake.silent.clear()
    watcher.sees("10.244.2.0-24", "10.244.3.0-24", timeout=20)


def test_errors_of_the_server_are_retried(fake, make_store):
    fake.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    fake.failing = 3
    store = make_store(fake)
    Watcher(store).sees("10.244.2.0-24")
    assert store.status.errors["unavailable"] == 3


@pytest.mark.parametrize(
    ("verb", "resource", "act"),
    [
        ("get", "nodes", lambda store: store.acquire(store.read_config(), REQUEST)),
        ("patch", "nodes/status", lambda store: store.acquire(store.read_config(), REQUEST)),
        ("patch", "nodes/status", lambda store: store.report(True, ())),
    ],
)
def test_a_forbidden_call_names_the_rule_that_is_missing(fake, make_store, verb, resource, act):
    fake.add_node("n1", "10.244.1.0/24")
    fake.forbidden.add((verb, resource))
    with pytest.raises(AccessDenied) as caught:
        act(make_store(fake))
    assert f'resources ["{resource}"], verbs ["{verb}"]' in str(caught.value)


def test_a_forbidden_watch_shows_in_the_status_and_heals(fake, make_store):
    fake.add_peer("n2", "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    fake.forbidden.add(("list", "nodes"))
    store = make_store(fake)
    watcher = Watcher(store)
    wait_until(lambda: 'verbs ["list"]' in str(store.status.failure))
    assert store.status.errors["access_denied"] >= 1
    fake.forbidden.clear()
    watcher.sees("10.244.2.0-24")


def test_a_wrong_token_is_access_denied_and_a_mended_kubeconfig_is_used(make_store, tmp_path):
    kubeconfig = tmp_path / "kubeconfig"

    def write(token: str) -> None:
        kubeconfig.write_text(
            f"apiVersion: v1\nkind: Config\ncurrent-context: it\n"
            f"contexts: [{{name: it, context: {{cluster: it, user: it}}}}]\n"
            f"clusters: [{{name: it, cluster: {{server: '{server.url}'}}}}]\n"
            f"users: [{{name: it, user: {{token: '{token}'}}}}]\n"
        )

    with FakeKube(token="right") as server:
        server.add_node("n1", "10.244.1.0/24")
        write("wrong")
        store = make_store(server, api_url="", kubeconfig=str(kubeconfig))
        with pytest.raises(AccessDenied, match="401"):
            store.hints()
        write("right")
        os.utime(kubeconfig, ns=(1, 1))
        assert store.hints().public_ip is None


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "not found"), ("{", "kubeconfig"), ("clusters: []\ncontexts: []\n", "current"), ("[]", "kubeconfig")],
)
def test_an_unusable_kubeconfig_is_a_setup_error_that_names_it(tmp_path, text, words):
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SetupError, match=words) as caught:
        KubeStore(node_name="n1", kubeconfig=str(path))
    assert str(path) in str(caught.value)


def test_something_that_is_no_api_server_is_named(make_store, tmp_path):
    import http.server

    class Web(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = KubeStore(node_name="n1", api_url=f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(StoreUnavailable, match="--kube-api-url"):
            store.hints()
        store.close()
        server.shutdown()


def test_closing_ends_the_watch_at_once(fake, make_store):
    fake.bookmark_every = 60
    store = make_store(fake)
    watcher = Watcher(store)
    watcher.sees()
    store.close()
    watcher.thread.join(5)
    assert not watcher.thread.is_alive()


@pytest.mark.field_problem(18)
def test_a_storm_of_changes_with_cuts_and_compactions_ends_exact(fake, make_store):
    chance = random.Random(18)
    watcher = Watcher(make_store(fake))
    watcher.sees()
    known: dict[str, str] = {}
    for step in range(2000):
        name, number = f"p{chance.randrange(200)}", chance.randrange(250)
        if name not in known:
            known[name] = f"192.0.2.{number}"
            fake.add_peer(name, f"10.244.{name[1:]}.0/24", known[name], "02:00:00:00:00:02")
        elif chance.random() < 0.4:
            del known[name]
            fake.delete_node(name)
        else:
            known[name] = f"192.0.2.{number}"
            fake.annotate(name, {PREFIX + "public-ip": known[name]})
        if step % 400 == 200:
            fake.drop()
        if step % 400 == 399:
            fake.store.compact()
    wanted = {f"10.244.{name[1:]}.0-24": address for name, address in known.items()}

    def seen() -> dict[str, str]:
        return {key: str(lease.attrs.public_ip) for key, lease in watcher.snapshots[-1].leases.items()}

    wait_until(lambda: seen() == wanted, 20, lambda: f"{set(seen().items()) ^ set(wanted.items())}")
