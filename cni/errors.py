"""What the plugin answers when it cannot do what it was asked: the CNI specification's error object."""

from __future__ import annotations

INCOMPATIBLE_VERSION = 1
UNKNOWN_CONTAINER = 3
INVALID_ENVIRONMENT = 4
IO_FAILURE = 5
DECODING_FAILURE = 6
INVALID_CONFIG = 7
TRY_AGAIN_LATER = 11
UNAVAILABLE = 50  # STATUS: no ADD can be served now
LIMITED_CONNECTIVITY = 51  # STATUS: besides, containers that run may not reach each other
INTERNAL = 999  # flannel's plugin answers everything with this code


class CniError(Exception):
    """``code`` is one of the specification's; ``msg`` says what failed, ``details`` why and what to do about it."""

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        super().__init__(msg)
        self.code = code
        self.msg = msg
        self.details = details


class DelegateError(Exception):
    """The delegate failed and said so itself: ``output`` is its own error object, passed on as it stands."""

    def __init__(self, output: bytes, error: dict[str, object], exit_code: int) -> None:
        super().__init__(str(error.get("msg", "")))
        self.output = output
        self.error = error
        self.exit_code = exit_code
