"""What people say of answers, by the id of the request; kept, counted for canaries, and written out for training.

Only what was served can be judged, and only by the tenant it was served to. Prompts and answers are kept where the
operator logs them, and nowhere else: without them feedback still guards a canary, but nothing can be learnt from it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import select

from lorchestra.base.home import write_whole
from lorchestra.errors import UserError
from lorchestra.registry.canary.observations import stamp, upsert
from lorchestra.registry.canary.traffic import Arm, pseudonym
from lorchestra.registry.sql.audit import plain_text
from lorchestra.registry.sql.schema import feedback, served

if TYPE_CHECKING:
    from lorchestra.registry.registry import Registry

Thumb = Literal["up", "down"]
THUMBS: dict[str, float] = {"up": 1.0, "down": 0.0}
LONGEST_COMMENT = 4000  # characters
Prompt = str | Sequence[Mapping[str, Any]]  # a text, or turns with role and content


class UnknownRequestError(UserError):
    """Feedback on a request that was not served to this tenant, or so long ago that it is forgotten."""


@dataclass(frozen=True)
class Answered:
    """A request that was answered.

    Args:
        request_id: as the client was told it.
        name: of the adapter that it asked for.
        version_id: of the version that answered; ``None`` for what is in no registry.
        tenant: the key's name.
        user: of the tenant; empty if the request names none.
        arm: that the version answered as; empty where no canary was running.
        prompt: where prompts are logged: everything before the answer.
        answer: the same.
    """

    request_id: str
    name: str
    version_id: int | None
    tenant: str
    user: str = ""
    arm: Arm | Literal[""] = ""
    prompt: Prompt | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Args:
        pairs: answers to one prompt, a better and a worse one.
        singles: answers with a score that are in no pair.
        without_prompt: feedback that nothing can be learnt from, since prompts were not logged then.
    """

    pairs: int
    singles: int
    without_prompt: int


def remember(registry: Registry, answered: Iterable[Answered], now: datetime | None = None) -> None:
    """Keep what was answered, so that it can be judged. The same request again replaces what was kept of it.

    Args:
        registry: where to.
        answered: requests; many at a time are one write.
        now: the time; by default the clock's.
    """
    realm = registry.catalog.registry_id()
    rows = {
        (one.request_id, one.tenant): {
            "request_id": one.request_id,
            "at": stamp(now),
            "name": one.name,
            "version_id": one.version_id,
            "arm": one.arm,
            "tenant_hash": pseudonym(realm, one.tenant),
            "user_hash": pseudonym(realm, one.user),
            "prompt": None if one.prompt is None else _kept(one.prompt),
            "answer": None if one.answer is None else _kept(one.answer),
        }
        for one in answered
    }
    if rows:
        with registry.catalog.writing() as connection:
            connection.execute(upsert(connection, served, list(rows.values()), ("request_id", "tenant_hash")))


def forget(registry: Registry, before: datetime) -> int:
    """Remove what was served before that time: it can be judged no longer. Feedback that was given stays.

    Returns:
        How many requests were forgotten.
    """
    with registry.catalog.writing() as connection:
        return connection.execute(served.delete().where(served.c.at < stamp(before))).rowcount


def record(
    registry: Registry,
    request_id: str,
    tenant: str,
    *,
    score: float | None = None,
    thumb: str | None = None,
    comment: str = "",
    now: datetime | None = None,
) -> None:
    """Keep what a tenant says of an answer; what it said of it before is replaced.

    Args:
        registry: that remembers the request.
        request_id: as the client was told it.
        tenant: the key's name.
        score: from 0 to 1; either this or ``thumb``.
        thumb: ``up`` (1) or ``down`` (0).
        comment: in words.
        now: the time; by default the clock's.

    Raises:
        UnknownRequestError: nothing was served to this tenant under that id. Nobody learns whether it was to another.
        UserError: no score and no thumb, or both; a score outside 0 … 1; a comment that is too long.
    """
    value = _value(score, thumb)
    if len(comment) > LONGEST_COMMENT:
        raise UserError(f"the comment has {len(comment):,} characters; at most {LONGEST_COMMENT:,} may be")
    plain_text(comment, "comment")
    who = pseudonym(registry.catalog.registry_id(), tenant)
    wanted = select(served).where(served.c.request_id == request_id, served.c.tenant_hash == who)
    with registry.catalog.writing() as connection:
        row = None if _unkeepable(request_id) else connection.execute(wanted).first()
        if row is None:
            raise UnknownRequestError(
                "there is no such request of yours to give feedback on; send the id of an answer ('id' in it) that "
                "this key was given, while the server remembers it"
            )
        known = {name: getattr(row, name) for name in ("request_id", "name", "version_id", "arm", "tenant_hash",
                                                       "user_hash", "prompt", "answer")}  # fmt: skip
        entry = {**known, "at": stamp(now), "score": value, "comment": comment}
        connection.execute(upsert(connection, feedback, [entry], ("request_id", "tenant_hash")))


def export(
    registry: Registry, out: Path, singles: Path | None = None, *, name: str = "", since: datetime | None = None
) -> Exported:
    """Write feedback as data for the next stage, JSON lines: pairs for ``dpo``, the rest for ``sft``.

    Answers of one adapter to the same prompt of the same tenant make pairs where their scores differ: the best one is
    chosen over each that is worse. Several opinions of the same answer are averaged.

    Args:
        registry: of the feedback.
        out: for ``prompt``, ``chosen``, ``rejected``, and both scores.
        singles: for ``prompt``, ``completion``, ``score`` of the answers that are in no pair; ``None`` leaves them out.
        name: of one adapter alone.
        since: given at that time or later.

    Raises:
        OSError: a file cannot be written.
    """
    query = select(feedback).order_by(feedback.c.id)
    if name:
        query = query.where(feedback.c.name == name)
    if since is not None:
        query = query.where(feedback.c.at >= stamp(since))
    opinions: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    without = 0
    with registry.catalog.reading() as connection:
        for row in connection.execute(query):
            if row.prompt is None or row.answer is None:
                without += 1
            else:
                opinions[row.name, row.tenant_hash, row.prompt][json.loads(row.answer)].append(row.score)
    pairs: list[dict[str, Any]] = []
    alone: list[dict[str, Any]] = []
    for (adapter, _, prompt), answers in opinions.items():
        scored = {answer: sum(given) / len(given) for answer, given in answers.items()}
        best = max(scored, key=scored.__getitem__)
        worse = [answer for answer in scored if scored[answer] < scored[best]]
        asked = {"prompt": json.loads(prompt)}
        for answer in worse:
            pairs.append({
                **asked, "chosen": best, "rejected": answer, "chosen_score": scored[best],
                "rejected_score": scored[answer], "adapter": adapter,
            })  # fmt: skip
        rest = [answer for answer in scored if scored[answer] == scored[best] and not (worse and answer == best)]
        alone += [{**asked, "completion": answer, "score": scored[answer], "adapter": adapter} for answer in rest]
    for path, rows in ((out, pairs), (singles, alone)):
        if path is not None:
            write_whole(path, "".join(_line(row) for row in rows))
            path.chmod(0o600)  # what people typed is nobody else's
    return Exported(len(pairs), len(alone), without)


def _value(score: float | None, thumb: str | None) -> float:
    if (score is None) == (thumb is None):
        raise UserError("feedback is either a score from 0 to 1 or a thumb, up or down")
    if thumb is not None:
        if thumb not in THUMBS:
            raise UserError(f"a thumb is up or down, not {thumb!r}")
        return THUMBS[thumb]
    assert score is not None
    if isinstance(score, bool) or not math.isfinite(score) or not 0 <= score <= 1:
        raise UserError(f"a score is a number from 0 (bad) to 1 (good), not {score}")
    return float(score)


def _kept(value: Prompt) -> str:
    """As JSON without letters that a database cannot keep: NUL and surrogates are escaped in it."""
    return json.dumps(value, ensure_ascii=True)


def _line(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    return (json.dumps(row) if _unkeepable(text) else text) + "\n"


def _unkeepable(text: str) -> bool:
    return "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text)
