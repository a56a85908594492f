# h5py ships no types; this says that its names exist.
from typing import Any

def __getattr__(name: str) -> Any: ...
