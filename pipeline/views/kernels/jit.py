"""How the functions of views/ are compiled, and under which key those that numba keeps on disk are kept."""

import hashlib
from pathlib import Path

from numba import njit

# No fastmath: the same numbers on every machine.
compiled = njit(nogil=True, error_model="numpy")
kept = njit(nogil=True, error_model="numpy", cache=True)

# The modules of views/ that no compiled function depends on. A new one counts as one that they depend on.
UNCOMPILED = {"__init__.py", "batch.py", "contact_sheet.py", "golden.py", "loader.py", "selection.py"}


def compiled_sources() -> list[Path]:
    """The modules of views/ that compiled functions and their constants come from."""
    views = Path(__file__).parents[1]
    return [path for path in sorted(views.rglob("*.py")) if str(path.relative_to(views)) not in UNCOMPILED]


def sources_digest() -> str:
    """Of the modules that compiled functions come from.

    numba looks only at the file of a function that it keeps on disk, so those that call functions of other files have
    this in their closure, which is part of the key.
    """
    state = hashlib.blake2b(digest_size=8)
    for path in compiled_sources():
        state.update(path.read_bytes())
    return state.hexdigest()
