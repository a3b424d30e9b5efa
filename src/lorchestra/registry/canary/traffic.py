"""Which version answers whom while an alias is split: by a sticky hash, without a memory.

Whoever asks is given a number, always the same, and the candidate answers the numbers below its share. So a user stays
on a version for as long as the split lasts, on every gateway and after every restart, and a share that grows only adds
users. Another salt draws other users: each rollout has one of its own, or the same few would try every candidate.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

from lorchestra.errors import UserError

Arm = Literal["stable", "candidate"]
ARMS: tuple[Arm, Arm] = ("stable", "candidate")
_NUMBERS = 2**64


def number_of(salt: str, tenant: str, user: str = "") -> int:
    """The number of whoever asks, uniform over 0 … 2⁶⁴−1: the first 64 bits, big-endian, of BLAKE2b (digest_size 8) of
    salt, tenant and user in UTF-8, each behind its length in bytes as 8 bytes, big-endian.

    Args:
        salt: of the rollout.
        tenant: the key's name.
        user: of the tenant, as the request names it; without one the tenant is one user.
    """
    hashed = hashlib.blake2b(digest_size=8)
    for part in (salt, tenant, user):
        written = part.encode("utf-8", "surrogatepass")
        hashed.update(len(written).to_bytes(8, "big") + written)
    return int.from_bytes(hashed.digest(), "big")


def arm_of(share: float, salt: str, tenant: str, user: str = "") -> Arm:
    """Who answers: the candidate, if the number lies below ``share`` of all. 0 is nobody, 1 everybody.

    Raises:
        UserError: ``share`` is not within 0 and 1.
    """
    check_share(share)
    # A power of two changes no digit of the share, and Python compares an integer with a float exactly.
    return "candidate" if number_of(salt, tenant, user) < share * _NUMBERS else "stable"


def check_share(share: float) -> None:
    """Whether ``share`` is one.

    Raises:
        UserError: it is not within 0 and 1.
    """
    if not (math.isfinite(share) and 0 <= share <= 1):
        raise UserError(f"a share of the traffic is between 0 and 1, not {share}; 0.05 is one user in twenty")


def pseudonym(realm: str, name: str) -> str:
    """What is kept of a tenant or user in place of its name: 32 hexadecimal digits, the same for the same name.

    Args:
        realm: the registry's id, so that the rows of two registries cannot be joined.
        name: of the tenant or user; empty stays empty.

    It keeps names out of tables and exports. It is no secret: whoever can read the registry and guess a name can check
    the guess.
    """
    if not name:
        return ""
    hashed = hashlib.blake2b(digest_size=16, key=hashlib.sha256(realm.encode()).digest(), person=b"lorchestra-who")
    hashed.update(name.encode("utf-8", "surrogatepass"))
    return hashed.hexdigest()
