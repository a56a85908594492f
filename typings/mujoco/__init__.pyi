# MuJoCo 3.3.2 ships no types for its compiled module; this says that its names exist.
from typing import Any

def __getattr__(name: str) -> Any: ...
