"""Random JSON schemas whose documents end: texts, digits and arrays are bounded, objects take no other properties."""

import random
from typing import Any

MAX_DEPTH = 3
NAMES = ("id", "name", "tags", "price", "is open", "größe", "a-b", "x", "items", "note")
PATTERNS = ("^[a-z]{1,6}$", "^[0-9]{3}-[0-9]{2}$", "^(red|green|blue)$", "^#[0-9A-F]{6}$")


def random_schema(seed: int) -> dict[str, Any]:
    """The same schema for the same seed. It can be satisfied."""
    rng = random.Random(seed)
    schema = _object(rng, MAX_DEPTH)
    if rng.random() < 0.2:
        schema["properties"]["shared"] = {"$ref": "#/$defs/shared"}
        schema["required"].append("shared")
        schema["$defs"] = {"shared": _value(rng, 1)}
    return schema


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    makers = [_string, _integer, _number, _boolean, _null, _enum, _const, _nullable]
    if depth > 0:
        makers += [_object, _object, _array, _array, _any_of]
    return rng.choice(makers)(rng, depth)


def _string(rng: random.Random, _depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    shortest = rng.randrange(4)
    return {"type": "string", "minLength": shortest, "maxLength": shortest + rng.randrange(10)}


def _integer(rng: random.Random, _depth: int) -> dict[str, Any]:
    lowest = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": lowest, "maximum": lowest + rng.randrange(5000)}


def _number(rng: random.Random, _depth: int) -> dict[str, Any]:
    lowest = rng.randint(-50, 50)
    # A step bounds the digits, which a model may otherwise repeat for as long as it wants.
    return {"type": "number", "minimum": lowest, "maximum": lowest + rng.randint(1, 100), "multipleOf": 0.25}


def _boolean(_rng: random.Random, _depth: int) -> dict[str, Any]:
    return {"type": "boolean"}


def _null(_rng: random.Random, _depth: int) -> dict[str, Any]:
    return {"type": "null"}


def _enum(rng: random.Random, _depth: int) -> dict[str, Any]:
    return {"enum": rng.sample(["a", "b b", 'say "c"', "ü", 1, 2.5, True, None, [1], {"k": "v"}], rng.randint(1, 5))}


def _const(rng: random.Random, _depth: int) -> dict[str, Any]:
    return {"const": rng.choice(["fixed", 7, False, None])}


def _nullable(rng: random.Random, depth: int) -> dict[str, Any]:
    schema = rng.choice([_string, _integer])(rng, depth)
    return {**schema, "type": [schema["type"], "null"]}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    shortest = rng.randrange(3)
    schema = {"type": "array", "items": _value(rng, depth - 1), "minItems": shortest}
    if rng.random() < 0.3:
        schema["prefixItems"] = [_value(rng, depth - 1) for _ in range(rng.randint(1, 2))]
    return schema | {"maxItems": shortest + rng.randint(1, 3)}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_value(rng, depth - 1) for _ in range(rng.randint(2, 3))]}
