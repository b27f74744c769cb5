"""A map that never changes, for what changes a little at a time: the leases from one snapshot to the next.

Entries lie in small dictionaries by the hash of their keys. A copy with changes shares all of them but those with the
changes, so that it costs what changed; and what differs between two copies lies only where they share nothing, however
many copies were between them (docs/adr/0009-what-differs-between-snapshots.md).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from itertools import chain
from typing import Final, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
T = TypeVar("T")

FAN: Final = 32
"""Branches, and leaves on each. A change copies one of either: 32 pointers and, of 5,000 entries, 5; of 65,536, which
are all the /24 of a /8, 64."""


class PersistentMap(Mapping[K, V]):
    """Safe to share between threads. Iterates in no particular order."""

    __slots__ = ("_branches", "_size")

    def __init__(self, entries: Mapping[K, V] | None = None) -> None:
        leaf: dict[K, V] = {}
        self._branches = [[leaf] * FAN] * FAN
        self._size = 0
        if entries:
            full = self.with_changes(entries)
            self._branches, self._size = full._branches, full._size

    def __getitem__(self, key: K) -> V:
        branch, leaf = _place(key)
        return self._branches[branch][leaf][key]

    def __iter__(self) -> Iterator[K]:
        return chain.from_iterable(chain.from_iterable(self._branches))

    def __len__(self) -> int:
        return self._size

    def with_changes(self, changes: Mapping[K, V] | Mapping[K, V | None]) -> PersistentMap[K, V]:
        """A copy with these values, where None takes a key out; this very map if it holds just these objects."""
        branches, size = self._branches.copy(), self._size
        for key, value in changes.items():
            place, spot = _place(key)
            leaf = branches[place][spot]
            if leaf.get(key) is value:
                continue
            if branches[place] is self._branches[place]:
                branches[place] = branches[place].copy()
            if leaf is self._branches[place][spot]:
                leaf = branches[place][spot] = leaf.copy()
            size += (value is not None) - (key in leaf)
            if value is None:
                del leaf[key]
            else:
                leaf[key] = value
        if all(mine is theirs for mine, theirs in zip(branches, self._branches, strict=True)):
            return self
        copy = PersistentMap[K, V]()
        copy._branches, copy._size = branches, size
        return copy

    def with_only(self, entries: Mapping[K, V]) -> PersistentMap[K, V]:
        """A map of these entries; where one equals what is here, the object that is here stays."""
        keys = self.keys() | entries.keys()
        return self.with_changes({key: entries.get(key) for key in keys if self.get(key) != entries.get(key)})

    def differences(self, other: PersistentMap[K, V]) -> set[K]:
        """The keys that only one of the two has, or with another object than the other one."""
        return {
            key
            for mine, theirs in _apart(self._branches, other._branches)
            for here, there in _apart(mine, theirs)
            for key in here.keys() | there.keys()
            if here.get(key) is not there.get(key)
        }


def _apart(mine: list[T], theirs: list[T]) -> Iterator[tuple[T, T]]:
    """The pairs that are not one object."""
    return ((a, b) for a, b in zip(mine, theirs, strict=True) if a is not b)


def _place(key: Hashable) -> tuple[int, int]:
    """The branch of a key, and the leaf on it."""
    return divmod(hash(key) % (FAN * FAN), FAN)
