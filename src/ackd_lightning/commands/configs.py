"""``ackd configs``: list the packaged configurations."""

from __future__ import annotations

from ackd_lightning.config.files import describe_config, method_names, packaged_names, recipe_names
from ackd_lightning.errors import ACKDError, near_matches


def configs(part: str = "") -> None:
    """Print names and descriptions of the packaged runs, methods and recipes.

    Args:
        part: Text that a name must contain; default: all names.

    Raises:
        ACKDError: When no name contains it.
    """
    known = (*packaged_names(), *method_names(), *recipe_names())
    if not any(part in name for name in known):
        stems = [name.removesuffix(".yaml") for name in known]
        raise ACKDError(f"no packaged configuration contains {part!r}; {near_matches(part, stems)}")
    width = max(map(len, known))
    for title, names in (
        ("runs (ackd fit --config NAME):", packaged_names()),
        (
            "methods (a second --config replaces the method and keeps pair, data and schedule; kd+crd adds two):",
            method_names(),
        ),
        ("recipes (another --config replaces optimizer, schedule or augmentation):", recipe_names()),
    ):
        if found := [name for name in names if part in name]:
            print(title, *(f"  {name:<{width}}  {describe_config(name)}" for name in found), sep="\n")
