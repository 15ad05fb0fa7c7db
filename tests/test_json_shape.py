"""Limits on values and lists: refused by name, and by any validator of the JSON Schema that is written of them."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest

from pifa_deploy.errors import InputRefusedError
from pifa_deploy.json_shape import Fields, Many, One, Shape, schema_of, validate

COUNT = One(type="integer", least=1)
HASH = One(type="string", pattern="[0-9a-f]{4}|none")


@pytest.mark.parametrize(
    ("shape", "sound", "broken", "message"),
    [
        (COUNT, [1, 7], 0, "x is 0, expected at least 1"),
        (COUNT, [], "many", "x is 'many', expected an integer"),
        (COUNT, [], True, "x is True, expected an integer"),
        (One(type="integer", least=0, null=True), [None, 0], -1, "x is -1, expected at least 0"),
        (HASH, ["00ff", "none"], "00ff0", "x is '00ff0', expected text that matches [0-9a-f]{4}|none"),
        (HASH, [], "g0ff", "x is 'g0ff', expected text that matches"),
        (HASH, [], 1, "x is 1, expected text"),
        (Many(item=COUNT, least=2), [[1, 2], [1, 2, 3]], [1], "x is [1], expected at least 2"),
        (Many(item=COUNT), [[]], [1, 0], "x[1] is 0, expected at least 1"),
        (Fields(required={"a": COUNT}, optional={"b": HASH}), [{"a": 1}], {"a": 1, "b": ""}, "x.b is '', expected"),
    ],
)
def test_a_value_outside_its_limits_is_refused_and_its_schema_refuses_it_too(
    shape: Shape, sound: list[Any], broken: Any, message: str
) -> None:
    schema = schema_of(shape)
    for value in sound:
        validate(value, shape, "x")
        jsonschema.validate(value, schema)
    with pytest.raises(InputRefusedError, match=re.escape(message)):
        validate(broken, shape, "x")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)
