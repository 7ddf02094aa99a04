# SPDX-License-Identifier: Apache-2.0
"""Where random choices take their seeds from."""

import hashlib

__all__ = ["derive_seed"]


def derive_seed(seed: int, name: str) -> int:
    """Return a seed that depends on the run's seed and on what it is for, and on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "big")
