"""Name → backend: the built-in ones and those of any installed package, all through one entry-point group.

A package joins by declaring ``name = module:Class`` in the group ``flanneld.backends``. Only the chosen one is imported.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, cast

from backends.backend import Backend, BackendError

GROUP: Final = "flanneld.backends"

_DEMANDED: Final = (
    "name",
    "needs",
    "mtu",
    "published",
    "accepts",
    "host_state",
    "peer_state",
)


def known_backends() -> tuple[str, ...]:
    """The names that can be given as Backend.Type, sorted. Imports none of them."""
    return tuple(sorted({point.name.lower() for point in entry_points(group=GROUP)}))


def backend_class(name: str) -> type[Backend]:
    """The backend called ``name`` (in any case, as flannel). BackendError names what is wrong and what there is."""
    points = [point for point in entry_points(group=GROUP) if point.name.lower() == name.lower()]
    if not points:
        known = ", ".join(known_backends()) or "none (is the package flanneld installed, not only copied?)"
        raise BackendError(f"Backend.Type {name!r} is not known here; known: {known}")
    if len({point.value for point in points}) > 1:
        claims = " and ".join(sorted(f"{point.value} of {_distribution(point)}" for point in points))
        raise BackendError(f"Backend.Type {name!r} is claimed by {claims}; uninstall all but one of these packages")
    return _load(points[0])


def _load(point: EntryPoint) -> type[Backend]:
    try:
        found: Any = point.load()
    except Exception as error:  # somebody else's module may raise anything while it is imported
        raise BackendError(
            f"backend {point.name!r} of {_distribution(point)} cannot be loaded from {point.value}: "
            f"{type(error).__name__}: {error}; repair or uninstall that package"
        ) from error
    missing = [word for word in _DEMANDED if not hasattr(found, word)]
    if missing:
        raise BackendError(
            f"backend {point.name!r} of {_distribution(point)}: {point.value} has no {', '.join(missing)}; "
            "see docs/backends.md for what a backend must offer"
        )
    return cast("type[Backend]", found)


def _distribution(point: EntryPoint) -> str:
    dist = point.dist
    return f"package {dist.name} {dist.version}" if dist else "an unknown package"
