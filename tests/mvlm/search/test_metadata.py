"""Columns made of metadata."""

import json

import pyarrow as pa

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
        ("good", "bool"), ("mixed", "string"), ("name", "string"), ("share", "double"), ("width", "double"),
    ]  # fmt: skip
    columns = columns_of([json.dumps(item) for item in items], fields)
    assert columns["width"].to_pylist() == [3, 2.0**70, None, None]
    assert columns["share"].to_pylist() == [1.0, 0.5, None, None]
    assert columns["name"].to_pylist() == ["a", None, "c", None]
    assert columns["good"].to_pylist() == [True, False, None, None]
    assert columns["mixed"].to_pylist() == ["1", "b", None, None]


def test_whole_numbers_stay_whole_however_they_are_written_and_columns_that_are_too_narrow_are_named():
    fields = [pa.field("width", pa.int64()), pa.field("price", pa.int64()), pa.field("share", pa.float64())]
    items = [
        '{"width": 2.0, "price": 2.5, "share": 1}',
        '{"width": 3, "price": 2}',
        '{"width": NaN}',
        '{"width": 1e300}',
    ]
    columns = columns_of(items, fields)
    assert columns["width"].to_pylist() == [2, 3, None, None]
    assert columns["price"].to_pylist() == [None, 2, None, None]
    types = ColumnTypes()
    types.see(items[1:3])
    assert types.too_narrow(fields) == []
    types.see(items[:1])
    assert types.too_narrow(fields) == ["price"]
    types.see(items)
    assert types.too_narrow(fields) == ["width", "price"]
