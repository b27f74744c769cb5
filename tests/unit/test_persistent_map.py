"""The map that snapshots are made of, against plain dictionaries."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from subnet_lease.persistent_map import PersistentMap

changes = st.dictionaries(st.integers(-3, 3000), st.none() | st.text(max_size=1), max_size=8)


@given(st.lists(changes, max_size=12))
def test_a_map_is_what_a_dictionary_with_the_same_changes_is_and_stays_so(script: list[dict[int, str | None]]) -> None:
    maps: list[tuple[PersistentMap[int, str], dict[int, str]]] = [(PersistentMap(), {})]
    for change in script:
        before, model = maps[-1]
        model = {key: value for key, value in {**model, **change}.items() if value is not None}
        maps.append((before.with_changes(change), model))
    for made, model in maps:
        assert dict(made) == model
        assert len(made) == len(model)
        assert all(made.get(key) == model.get(key) for key in range(-3, 10))
        for other, its in maps:
            expected = {key for key in model.keys() | its.keys() if model.get(key) is not its.get(key)}
            assert made.differences(other) == expected == PersistentMap(model).differences(other)
            assert dict(other.with_only(model)) == model


def test_changes_that_change_nothing_give_the_same_map() -> None:
    value = object()
    made = PersistentMap({"a": value})
    assert made.with_changes({"a": value, "b": None}) is made
    assert made.with_changes({"b": value}).with_changes({"b": None}) == made


def test_an_equal_value_does_not_take_the_place_of_the_one_that_is_there() -> None:
    value, equal = [1, 2], [1, 2]
    made = PersistentMap({"a": value, "b": [3]})
    assert made.with_only({"a": equal, "b": [3]}) is made
    assert made.with_only({"a": equal}).differences(made) == {"b"}
