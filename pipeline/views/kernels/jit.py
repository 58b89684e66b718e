"""How the functions of views/ are compiled, and under which key those that numba keeps on disk are kept."""

import hashlib
from pathlib import Path

from numba import njit

# No fastmath: the same numbers on every machine.
compiled = njit(nogil=True, error_model="numpy")
kept = njit(nogil=True, error_model="numpy", cache=True)


def sources_digest() -> str:
    """Of all modules of views/: numba looks only at the file of a function that it keeps on disk, so those that
    call functions of other files have this in their closure, which is part of the key."""
    state = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        state.update(path.read_bytes())
    return state.hexdigest()
