"""images -> views -> labels -> shards."""

import os

# Decoding threads and torch's threads share the cores. An OpenMP thread that spins while it waits for one that has no
# core makes a training step many times slower; one that sleeps costs next to nothing. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
