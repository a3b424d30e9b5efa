"""Who is next: the virtual token counter (Sheng et al. 2024, "Fairness in Serving LLMs", arXiv 2401.00588).

Every tenant has a counter of the tokens it was served, weighted by what they cost. Next is the waiting tenant with the
smallest one, and in it who came first. A tenant that comes back after a pause starts no lower than those that wait, so
nobody saves up. Of two tenants that always wait, with prompts of at most L tokens and M tokens in the batch, neither is
ever served more than ``2 max(prompt_weight · L, token_weight · M)`` ahead of the other (theorem 4.4).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from lorchestra.errors import counted
from lorchestra.serve.engine import OverloadedError

Item = TypeVar("Item", bound=Hashable)

SOONEST, LATEST = 1.0, 60.0  # seconds that a refused tenant is told to wait
REMEMBERED = 64  # turns, from which the pace is told


class FairQueue(Generic[Item]):
    """What waits, by tenant. Every method holds one lock for a moment, so any thread may call any of them.

    Args:
        per_tenant: so many may wait for one tenant.
        total: so many in all.
        assured: so many a tenant may always have waiting, however full the queue is with the others' (so in all there
            are at most ``total + assured · tenants``).
        prompt_weight: of a prompt's token.
        token_weight: of a generated one, which costs a step of its own (the paper's 2).
        clock: seconds.
    """

    def __init__(
        self,
        per_tenant: int = 256,
        total: int = 1024,
        assured: int = 8,
        prompt_weight: float = 1.0,
        token_weight: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.per_tenant, self.total, self.assured = per_tenant, total, min(assured, per_tenant)
        self.prompt_weight, self.token_weight = prompt_weight, token_weight
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: dict[str, OrderedDict[Item, None]] = {}  # none of them empty
        self._tenants: dict[Item, str] = {}
        self._served: dict[str, float] = {}
        self._turns: dict[str, int] = {}  # tenant → number of its last turn: among equals, who had it longest ago
        self._turn = 0
        self._last = ""  # the tenant that left the queue last
        self._times: deque[float] = deque(maxlen=REMEMBERED)

    def push(self, tenant: str, item: Item) -> None:
        """Let ``item`` wait for ``tenant``.

        Raises:
            OverloadedError: too many wait.
        """
        with self._lock:
            mine = len(self._waiting.get(tenant, ()))
            if mine >= self.per_tenant:
                raise OverloadedError(
                    f"{counted(mine, 'request')} of yours wait already, which is as many as may; send the next when "
                    "one is answered",
                    self._pace() * len(self._waiting),
                )
            if len(self._tenants) >= self.total and mine >= self.assured:
                raise OverloadedError(
                    f"{counted(len(self._tenants), 'request')} wait, which is as many as may; try again later",
                    self._pace(),
                )
            if tenant not in self._waiting:
                self._lift(tenant)
                self._waiting[tenant] = OrderedDict()
            self._waiting[tenant][item] = None
            self._tenants[item] = tenant

    def peek(self) -> Item | None:
        """What :meth:`pop` would give; ``None`` if nothing waits."""
        with self._lock:
            return next(iter(self._waiting[self._next()])) if self._waiting else None

    def pop(self) -> Item | None:
        """The next one, which waits no more; ``None`` if nothing waits. :meth:`charge` its prompt at once."""
        with self._lock:
            if not self._waiting:
                return None
            tenant = self._next()
            item = next(iter(self._waiting[tenant]))
            self._turn += 1
            self._turns[tenant] = self._turn
            self._times.append(self._clock())
            self._leave(item)
            return item

    def remove(self, item: Item) -> bool:
        """Whether ``item`` waited; it does so no more."""
        with self._lock:
            if item not in self._tenants:
                return False
            self._leave(item)
            return True

    def charge(self, tenant: str, prompt_tokens: int = 0, generated_tokens: int = 0) -> None:
        """Tokens that ``tenant`` was served: a prompt's when it is taken up, generated ones as they come."""
        with self._lock:
            cost = self.prompt_weight * prompt_tokens + self.token_weight * generated_tokens
            self._served[tenant] = self._served.get(tenant, 0.0) + cost

    def served(self, tenant: str) -> float:
        """The tenant's counter, in weighted tokens."""
        with self._lock:
            return self._served.get(tenant, 0.0)

    def waiting(self, tenant: str) -> int:
        """How many wait for ``tenant``."""
        with self._lock:
            return len(self._waiting.get(tenant, ()))

    def __len__(self) -> int:
        """How many wait in all."""
        with self._lock:
            return len(self._tenants)

    def _next(self) -> str:
        return min(self._waiting, key=lambda tenant: (self._served.get(tenant, 0.0), self._turns.get(tenant, 0)))

    def _lift(self, tenant: str) -> None:
        """A tenant that begins to wait: no lower than the lowest that waits, or than the last that did."""
        others = list(self._waiting) or [self._last]
        lowest = min(self._served.get(other, 0.0) for other in others)
        self._served[tenant] = max(self._served.get(tenant, 0.0), lowest)

    def _leave(self, item: Item) -> None:
        tenant = self._tenants.pop(item)
        del self._waiting[tenant][item]
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._last = tenant

    def _pace(self) -> float:
        """Seconds between turns of late, within what is fit to be told."""
        if len(self._times) < 2:
            return SOONEST
        return min(max((self._clock() - self._times[0]) / len(self._times), SOONEST), LATEST)
