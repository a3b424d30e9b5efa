"""What each tenant used, by model: counted from the lines that the request log gets, one for each request."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lorchestra.serve.metrics import MIXTURE, OTHER, UNKNOWN
from lorchestra.serve.request_log import RequestLog

MOST = 5_000  # pairs of tenant and model with a row of their own
MINUTES = 60  # of the recent past


@dataclass
class Row:
    """One tenant on one model, since the server began.

    Args:
        requests: that ended.
        errors: of them, those that failed through the server's fault (5xx).
        refused: of them, those that were refused (4xx, but for clients that left).
        prompt_tokens: read.
        generated_tokens: written.
        seconds: that they took, all together.
        last: when the last one ended, seconds since 1970.
    """

    requests: int = 0
    errors: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    last: float = 0.0


@dataclass
class Minutes:
    """Requests of one tenant in each of the last minutes."""

    counts: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=MINUTES))

    def add(self, minute: int) -> None:
        """One more."""
        if self.counts and self.counts[-1][0] >= minute:
            self.counts[-1] = (self.counts[-1][0], self.counts[-1][1] + 1)
        else:
            self.counts.append((minute, 1))

    def until(self, minute: int) -> list[int]:
        """A count for each minute up to ``minute``, the oldest first."""
        found = dict(self.counts)
        return [found.get(minute - back, 0) for back in range(MINUTES - 1, -1, -1)]


class Usage(RequestLog):
    """A request log that counts, and passes every line on.

    Args:
        log: where lines go.
        base: what the base is called.
        clock: seconds since 1970.
    """

    def __init__(self, log: RequestLog, base: str, clock: Callable[[], float] = time.time) -> None:
        super().__init__(log.out, log.prompts)
        self._log, self._base, self._clock = log, base, clock
        self._rows: dict[tuple[str, str], Row] = {}
        self._minutes: dict[str, Minutes] = {}
        self.since = clock()

    def write(self, line: Mapping[str, Any]) -> None:
        """Count a line that tells of a question to a model, and pass it on."""
        if line.get("kind") in ("chat", "completion") and line.get("tenant"):
            self._count(line)
        self._log.write(line)

    def report(self) -> dict[str, Any]:
        """As plain JSON; those who asked most are first."""
        rows = sorted(self._rows.items(), key=lambda item: (-item[1].requests, item[0]))
        minute = int(self._clock() // 60)
        return {
            "since": self.since,
            "rows": [{"tenant": tenant, "model": model, **asdict(row)} for (tenant, model), row in rows],
            "minutes": {tenant: found.until(minute) for tenant, found in self._minutes.items()},
        }

    def _count(self, line: Mapping[str, Any]) -> None:
        now, status, tenant = self._clock(), line["status"], line["tenant"]
        pair = (tenant, self._model(line))
        if pair not in self._rows and len(self._rows) >= MOST:
            pair = (OTHER, OTHER)
        row = self._rows.setdefault(pair, Row())
        row.requests += 1
        row.errors += status >= 500
        row.refused += 400 <= status < 499
        row.prompt_tokens += line["prompt_tokens"]
        row.generated_tokens += line["generated_tokens"]
        row.seconds += line["seconds"]
        row.last = now
        if tenant in self._minutes or len(self._minutes) < MOST:
            self._minutes.setdefault(tenant, Minutes()).add(int(now // 60))

    def _model(self, line: Mapping[str, Any]) -> str:
        members = line["adapters"]
        if len(members) == 1 and members[0]["coefficient"] == 1.0:
            return str(members[0].get("version") or members[0]["adapter"])
        if members:
            return MIXTURE
        return self._base if line["model"] == self._base or line["status"] == 200 else UNKNOWN
