"""Print constraints.txt: what the direct pins of pyproject.toml pull in, as installed in this environment.

Run through ``make lock`` after a pin has changed and been installed.
"""

from __future__ import annotations

import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = "pi0rl[dev]"
OLDEST_PYTHON = "3.11.2"  # Debian 12's
# What torch pins itself, and which of its builds is installed, differ between machines with and without a GPU.
LEFT_TO_TORCH = ("nvidia-", "cuda-", "triton")


def closure(root: str) -> dict[str, str]:
    """name -> version of everything that ``root`` requires on this machine, without ``root`` itself.

    Ends with a message where a release does not run on ``OLDEST_PYTHON``.
    """
    pins: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(root)]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            distribution = metadata.distribution(name)
            pythons = distribution.metadata.get("Requires-Python", "")
            if OLDEST_PYTHON not in SpecifierSet(pythons):
                sys.exit(f"lock: {name} {distribution.version} wants Python {pythons}; pin one for {OLDEST_PYTHON}")
            pins[name] = distribution.version.partition("+")[0]
            for text in distribution.requires or ():
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    del pins[canonicalize_name(Requirement(root).name)]
    return {name: version for name, version in sorted(pins.items()) if not name.startswith(LEFT_TO_TORCH)}


if __name__ == "__main__":
    print("# Written by `make lock`: everything that pyproject.toml's pins pull in.")
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in closure(ROOT).items())
