"""Teachers that a checkpoint describes by their shapes and does not hold, so that inference needs no teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ackd_lightning.types import NetSpec


def describe_specs(specs: Sequence[NetSpec]) -> dict[str, Any]:
    """Return the shapes of teachers as plain data for a checkpoint.

    Args:
        specs: Shapes of networks that were given as they are.
    """
    plain: dict[str, Any] = json.loads(json.dumps({"specs": [asdict(each) for each in specs]}))
    return plain


def absent_specs(given: Any) -> tuple[NetSpec, ...]:
    """Return the shapes of teachers that a checkpoint describes and does not hold; none for teachers that are there.

    Args:
        given: Teacher as the training module gets it.
    """

    def spec(plain: Mapping[str, Any]) -> NetSpec:
        features = None if plain["features"] is None else tuple(tuple(each) for each in plain["features"])
        return NetSpec(plain["num_classes"], features, plain["embedding"], tuple(map(spec, plain["branches"])))

    return tuple(map(spec, given["specs"])) if isinstance(given, Mapping) and "specs" in given else ()
