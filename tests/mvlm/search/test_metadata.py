"""Columns made of metadata."""

import json

from mvlm.search.metadata import ColumnTypes, columns_of


def test_types_follow_from_all_items_and_odd_values_are_null():
    items = [
        {"width": 3, "share": 1, "name": "a", "good": True, "mixed": 1, "tags": ["x"], "id": "taken", "bad name": 1},
        {"width": 2**70, "share": 0.5, "name": None, "good": False, "mixed": "b", "inner": {"x": 1}},
        {"name": "c", "width": True, "share": "no"},
        {},
    ]
    types = ColumnTypes()
    types.see(json.dumps(item) for item in items[:2])
    types.see([])
    fields = types.fields()
    assert [(field.name, str(field.type)) for field in fields] == [
        ("good", "bool"), ("mixed", "string"), ("name", "string"), ("share", "double"), ("width", "int64"),
    ]  # fmt: skip
    columns = columns_of([json.dumps(item) for item in items], fields)
    assert columns["width"].to_pylist() == [3, None, None, None]
    assert columns["share"].to_pylist() == [1.0, 0.5, None, None]
    assert columns["name"].to_pylist() == ["a", None, "c", None]
    assert columns["good"].to_pylist() == [True, False, None, None]
    assert columns["mixed"].to_pylist() == ["1", "b", None, None]
