"""The catalog's tables. What changes here needs a migration in ``migrations/versions``, and a new ``REVISION``.

A version's manifest is one text, canonical and hashed, in a table of its own: it has a line for every module, and who
lists versions reads none of it. The columns of ``versions`` and the tables beside it repeat parts of the manifest, so
that versions are found and listed by them; ``verify`` holds them to the manifest. Ids of versions, accepts and
derivations are the ids of the audit entries that tell of them: they are never used twice, and need no sequence.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

FORMAT = "1"  # of the catalog as a whole, in ``meta``
REVISION = "0001"  # of the tables, kept by Alembic
REVISIONS = ("0001",)  # all that this version can upgrade from

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _text(name: str, **more: object) -> Column[str]:
    return Column(name, Text, nullable=False, **more)  # type: ignore[arg-type]


meta = Table(
    "meta",
    metadata,
    Column("key", Text, primary_key=True),  # format, registry_id, head (id and hash of the last audit entry)
    _text("value"),
)

names = Table(
    "names",
    metadata,
    Column("name", Text, primary_key=True),
    Column("last", Integer, nullable=False),  # the highest number given so far, removed versions included
)

versions = Table(
    "versions",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("name", Text, ForeignKey("names.name"), nullable=False),
    Column("number", Integer, nullable=False),
    _text("digest"),  # of the adapter
    _text("content"),  # of the files
    _text("manifest_digest"),
    _text("base_name"),
    _text("base_weights"),
    _text("made_by"),
    _text("task"),
    _text("tags"),  # sorted, as canonical JSON: what a list shows; ``version_tags`` is what finds them
    Column("rank", Integer, nullable=False),  # the largest
    Column("parameters", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    _text("created"),
    _text("created_by"),
    _text("state"),  # ready, revoked
    Column("revoked_at", Text),
    Column("revoked_by", Text),
    Column("revoked_why", Text),
    UniqueConstraint("name", "number"),
    UniqueConstraint("name", "content"),
    Index(None, "digest"),
    Index(None, "base_name"),
    Index(None, "base_weights"),
    Index(None, "created"),
)

manifests = Table(
    "manifests",
    metadata,
    Column("version_id", Integer, ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    _text("text"),  # canonical; ``versions.manifest_digest`` is of it
)

version_files = Table(
    "version_files",
    metadata,
    Column("version_id", Integer, ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True),
    Column("path", Text, primary_key=True),
    _text("blob"),
    Column("size", BigInteger, nullable=False),
    Index(None, "blob"),
)

version_parents = Table(
    "version_parents",
    metadata,
    Column("version_id", Integer, ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True),
    Column("kind", Text, primary_key=True),  # parent, context
    Column("position", Integer, primary_key=True),
    _text("name"),
    _text("digest"),
    Column("coefficient", Float(53), nullable=False),
    Index(None, "digest"),
)

version_tags = Table(
    "version_tags",
    metadata,
    Column("version_id", Integer, ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True),
    Column("tag", Text, primary_key=True),
    Index(None, "tag"),
)

version_metrics = Table(
    "version_metrics",
    metadata,
    Column("version_id", Integer, ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("value", Float(53), nullable=False),
    Column("low", Float(53)),
    Column("high", Float(53)),
    Column("n", BigInteger),
    _text("better"),
    _text("split"),
    _text("sealed"),
    Index(None, "name", "value"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("name", Text, ForeignKey("names.name"), primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("version_id", Integer, ForeignKey("versions.id"), nullable=False),
    _text("since"),
    _text("by"),
    Column("generation", Integer, nullable=False),
    Index(None, "version_id"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    _text("at"),
    _text("actor"),
    _text("action"),
    _text("name"),
    _text("alias"),
    _text("before"),
    _text("after"),
    _text("why"),
    _text("details"),  # canonical JSON
    _text("hash"),
    Index(None, "name", "id"),
)

accepts = Table(
    "accepts",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    _text("name"),  # of adapters; empty: any
    _text("kind"),  # tokenizer, template
    _text("base_name"),
    _text("digest"),  # of the tokenizer or template that is accepted
    _text("why"),
    _text("at"),
    _text("by"),
    UniqueConstraint("name", "kind", "digest"),
)

derivations = Table(
    "derivations",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    _text("base_weights"),  # what adapters were trained on
    _text("name"),
    _text("weights"),  # of the sibling
    _text("tokenizer"),
    _text("template"),
    _text("method"),
    _text("drift"),  # canonical JSON
    _text("why"),
    _text("at"),
    _text("by"),
    UniqueConstraint("base_weights", "weights"),
)

leases = Table(
    "leases",  # who needs that nothing is removed for a while: backups, long copies
    metadata,
    Column("id", Text, primary_key=True),
    _text("kind"),
    _text("by"),
    Column("until", Float(53), nullable=False),  # seconds since 1970
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, ForeignKey("names.name"), nullable=False),
    _text("alias"),
    Column("stable_version", Integer, nullable=False),
    Column("candidate_version", Integer, nullable=False),
    _text("salt"),
    Column("share", Float(53), nullable=False),
    Column("step", Integer, nullable=False),
    _text("state"),
    Column("plan", JSON, nullable=False),
    Column("guards", JSON, nullable=False),
    _text("started"),
    _text("stepped"),
    Column("ended", Text),  # NULL while it runs
    _text("by"),
    _text("why"),
    Column("evidence", JSON),
    Index(  # one at a time
        "ix_rollouts_running",
        "name",
        "alias",
        unique=True,
        sqlite_where=text("ended IS NULL"),
        postgresql_where=text("ended IS NULL"),
    ),
    Index(None, "name", "alias"),
    sqlite_autoincrement=True,
)

feedback = Table(
    "feedback",
    metadata,
    Column("id", Integer, primary_key=True),
    _text("at"),
    _text("request_id"),
    _text("name"),
    Column("version_id", Integer),
    _text("arm"),
    _text("tenant_hash"),
    _text("user_hash"),
    Column("score", Float(53), nullable=False),
    _text("comment"),
    Column("prompt", Text),
    Column("answer", Text),
    UniqueConstraint("request_id", "tenant_hash"),
    Index(None, "name", "at"),
    sqlite_autoincrement=True,
)

served = Table(
    "served",
    metadata,
    Column("request_id", Text, primary_key=True),
    _text("at"),
    _text("name"),
    Column("version_id", Integer),
    _text("arm"),
    Column("tenant_hash", Text, primary_key=True),
    _text("user_hash"),
    Column("prompt", Text),
    Column("answer", Text),
    Index(None, "at"),
)

observations = Table(
    "observations",
    metadata,
    Column("rollout_id", Integer, primary_key=True, autoincrement=False),
    Column("arm", Text, primary_key=True),
    Column("gateway", Text, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),
    Column("latency_sum", Float(53), nullable=False),
    Column("latency_sq", Float(53), nullable=False),
    Column("latency_n", BigInteger, nullable=False),
    Column("score_sum", Float(53), nullable=False),
    Column("score_sq", Float(53), nullable=False),
    Column("score_n", BigInteger, nullable=False),
    _text("updated"),
    ForeignKeyConstraint(["rollout_id"], ["rollouts.id"], ondelete="CASCADE"),
)
