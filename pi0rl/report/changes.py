"""Which params a run changed, against the params file it is nearest to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pi0rl.errors import UserError
from pi0rl.params import Params, load_params


@dataclass(frozen=True)
class Changes:
    """The nearest params file, and key -> (its value, the run's)."""

    base: str
    values: dict[str, tuple[Any, Any]]


def params_changes(params: Params, folder: Path) -> Changes | None:
    """Compare with every params file in ``folder``; the one with the fewest differences counts. None without any."""
    found = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            base = load_params(path)
        except UserError:  # a file that is broken, or made for other code, is no base
            continue
        values = dict(_differences(base.model_dump(mode="json"), params.model_dump(mode="json")))
        found.append(Changes(path.stem, values))
    return min(found, key=lambda changes: len(changes.values), default=None)


def _differences(base: Any, other: Any, key: str = "") -> list[tuple[str, tuple[Any, Any]]]:
    if isinstance(base, dict) and isinstance(other, dict):
        names = [*base, *(name for name in other if name not in base)]
        pairs = [(f"{key}.{name}".lstrip("."), base.get(name), other.get(name)) for name in names]
        return [difference for name, one, two in pairs for difference in _differences(one, two, name)]
    return [] if base == other else [(key, (base, other))]
