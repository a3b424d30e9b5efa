"""``Manifest``: everything of a version that never changes, in one canonical form.

What is stored, hashed and compared is :meth:`Manifest.canonical`: JSON with sorted keys and without spaces, UTF-8.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lorchestra.errors import UserError
from lorchestra.registry.mistakes import RegistryError
from lorchestra.registry.reference import check_name

FORMAT = 1
LARGEST = 8 << 20  # bytes of a manifest
_UNKEPT = re.compile("[\0\ud800-\udfff]")  # what no database keeps


def _text(value: str) -> str:
    if _UNKEPT.search(value):
        raise ValueError("it holds a NUL or half a surrogate pair, which no database keeps")
    return value


def _json(value: Any) -> Any:
    """As JSON has it: tuples are lists, keys are strings; NaN and what JSON does not know are refused."""
    try:
        plain = json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"it is not plain JSON: {error}") from None
    _text(json.dumps(plain, ensure_ascii=False))  # a NUL is escaped there
    return plain


Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, AfterValidator(_text)]
ModulePath = str  # of a module: there are hundreds, which are looked at together
Json = Annotated[dict[str, Any], BeforeValidator(_json)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Metric(_Value):
    """A measured number.

    Args:
        value: the estimate.
        low: lower end of its interval; ``None`` if there is none.
        high: the upper end.
        n: independent items it was measured on.
        better: which direction is.
        split: ``sealed`` or ``validation``; empty if unknown.
        sealed: digest of the sealed test's items; empty if unknown.
    """

    value: Number
    low: Number | None = None
    high: Number | None = None
    n: Count | None = None
    better: Literal["lower", "higher"] = "lower"
    split: Text = ""
    sealed: Text = ""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"the interval {self.low} to {self.high} is upside down")
        return self


class FileEntry(_Value):
    """A file: digest of its bytes, and how many."""

    sha256: Digest
    size: Count


class BaseEntry(_Value):
    """The base: a name for people, digests for the check (empty: unknown)."""

    name: Text = ""
    weights: Text = ""
    tokenizer: Text = ""
    template: Text = ""


class ParentEntry(_Value):
    """An adapter that this one was made from, or trained beside."""

    name: Text
    digest: Text
    coefficient: Number


class Manifest(_Value):
    """Everything of a version that never changes.

    Args:
        format: of the manifest itself.
        name: of the adapter.
        number: of the version: 2 of ``clinic@v2``.
        digest: of the folded factors (``Adapter.digest``).
        files: path → file; every file of the directory.
        base: which base it belongs to.
        ranks: module path → rank.
        scales: module path → the scale that the files' configuration asks for; 1 where it is folded.
        parameters: numbers held in all factors.
        made_by: ``stage``, ``fusion`` or ``foreign``.
        stage: name of the stage; empty for a fusion.
        task: ``sft``, ``dpo`` or ``pt``; empty if unknown.
        recipe: the recipe it came from, as run; empty if unknown.
        settings: of its stage or fusion.
        data: source → digest of its examples.
        parents: members of a fusion.
        context: adapters that were active while it was trained.
        metrics: name → what was measured.
        tools: name → version.
        serving: what lies beside the weights for serving: ``serve.yaml`` and whether there is a template.
        note: for people.
        tags: sorted words.
        created: when, ISO 8601 in UTC.
        created_by: who.
    """

    format: Literal[1] = 1
    name: Text
    number: Annotated[int, Field(ge=0, lt=10**9)]
    digest: Digest
    files: dict[Text, FileEntry]
    base: BaseEntry
    ranks: dict[ModulePath, Count]
    scales: dict[ModulePath, Number]
    parameters: Count
    made_by: Text
    stage: Text
    task: Text
    recipe: Json
    settings: Json
    data: dict[Text, Text]
    parents: list[ParentEntry]
    context: list[ParentEntry]
    metrics: dict[Text, Metric]
    tools: dict[Text, Text]
    serving: Json = Field(default_factory=dict)
    note: Text = ""
    tags: list[Text] = Field(default_factory=list)
    created: Text
    created_by: Text

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        try:
            check_name(self.name)
        except UserError as error:
            raise ValueError(str(error)) from None
        for paths in (self.ranks, self.scales):
            _text("".join(paths))
        if not self.files:
            raise ValueError("it names no file")
        if len(set(self.tags)) < len(self.tags):
            raise ValueError("it names a tag twice")
        return self

    @property
    def reference(self) -> str:
        """``clinic@v2``."""
        return f"{self.name}@v{self.number}"

    @property
    def content(self) -> str:
        """``sha256:…`` of the files: equal for directories that are equal byte by byte."""
        return content_digest(self.files)

    @property
    def manifest_digest(self) -> str:
        """``sha256:…`` of the canonical form."""
        return digest_of(self.canonical())

    def canonical(self) -> bytes:
        """Sorted keys, no spaces, UTF-8."""
        told = self.model_dump(mode="json")
        text = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()

    @classmethod
    def parse(cls, text: bytes | str) -> Self:
        """A manifest from its JSON, which may be anybody's.

        Raises:
            RegistryError: it is of a newer format.
            UserError: it is none, or does not hold together; the message names the field.
        """
        if len(text) > LARGEST:
            raise UserError(f"a manifest of {len(text):,} bytes; at most {LARGEST:,} may be")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            told = error
        except RecursionError:
            raise UserError("this is no manifest: it is nested too deeply") from None
        found = _format_of(text)
        if found is not None and found > FORMAT:
            raise RegistryError(
                f"a manifest of format {found}; this lorchestra reads up to {FORMAT}. Update lorchestra"
            )
        first = told.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise UserError(f"this is no manifest of format {FORMAT}: {where}: {first['msg']}") from None


def content_digest(files: dict[str, FileEntry]) -> str:
    """``sha256:…`` over path, digest and size of every file."""
    told = {path: [entry.sha256, entry.size] for path, entry in files.items()}
    return digest_of(json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def digest_of(data: bytes) -> str:
    """``sha256:…`` of bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _format_of(text: bytes | str) -> int | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = value.get("format") if isinstance(value, dict) else None
    return found if isinstance(found, int) else None
