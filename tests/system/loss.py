"""What a change on live hosts costs those who talk meanwhile: nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flanneld.lab.containers import Container
from flanneld.lab.wait import wait_until


@contextlib.contextmanager
def no_packet_lost(here: Container, *targets: Container | str) -> Iterator[None]:
    """A hundred pings a second to each of the targets, all of which must be answered."""
    with contextlib.ExitStack() as stack:
        addresses = [target if isinstance(target, str) else target.address for target in targets]
        streams = {address: stack.enter_context(here.ping_stream(address)) for address in addresses}
        for stream in streams.values():
            wait_until(lambda: len(stream.replies()) >= 20, 10, "twenty replies")
        yield
        for stream in streams.values():
            after = len(stream.replies())
            wait_until(lambda: len(stream.replies()) >= after + 30, 10, "replies afterwards")
        results = {address: stream.stop() for address, stream in streams.items()}
    lost = {address: f"{result.lost} of {result.sent}" for address, result in results.items() if result.lost}
    assert not lost, f"lost: {lost}"
