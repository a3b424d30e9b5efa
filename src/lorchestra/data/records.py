"""Files and hub data sets → rows: one mapping of columns each, with the place it was read at."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lorchestra.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One row.

    Args:
        origin: ``file:n``. n is the line on which the row begins (JSON Lines, CSV), else its place in the list; from 1.
        values: column → value.
    """

    origin: str
    values: Mapping[str, Any]


def read_records(path: Path, name: str | None = None) -> Iterator[Record]:
    """The rows of a ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet`` or ``.txt`` file, or of a data set
    directory (called ``name`` in origins and messages; a hub's directory has no telling name of its own).

    A trailing ``.gz`` is unpacked on the way. Text is UTF-8, with or without a byte order mark, or UTF-16 with one.

    Raises:
        DataError: a suffix that is not known, a file that is damaged or not what its suffix says (with the line).
    """
    if path.is_dir():
        yield from _data_set(path, name or path.name)
        return
    reader = READERS.get(_suffix(path))
    if reader is None:
        raise DataError(
            f"cannot read {path.name}: the suffix {_suffix(path) or '(none)'!r} is not known. "
            f"Expected one of {', '.join(READERS)} (or one of these with .gz); rename or convert the file."
        )
    try:
        yield from reader(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path.name} is not a whole gzip file ({error}); fetch or pack it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions") from error


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends, decoded one by one so that an error has its line."""
    with _open(path) as stream:
        head = stream.read(4)
    with _open(path) as stream:
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            try:
                text = stream.read().decode("utf-16")
            except UnicodeDecodeError as error:
                raise DataError(f"{path.name} begins as UTF-16 but is not ({error}); save it as UTF-8") from error
            yield from enumerate(io.StringIO(text), start=1)
            return
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path.name}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1}). "
                    f"Save the file as UTF-8: iconv -f ENCODING -t UTF-8 {path.name} > utf8-{path.name}, with the "
                    "file's ENCODING (often GB18030 for Chinese, WINDOWS-1252 for Western languages)"
                ) from error


def _object(value: Any, origin: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(
            f'{origin}: expected one JSON object per row ({{"column": value, …}}), got {type(value).__name__}: '
            f"{json.dumps(value, ensure_ascii=False)[:80]}"
        )
    return Record(origin, value)


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            detail = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(
                f"{path.name}:{number}{column}: broken JSON ({detail}): {line.strip()[:80]!r}. "
                "Expected one whole JSON object on each line; mend or remove this line."
            ) from error
        yield _object(value, f"{path.name}:{number}")


def _text(path: Path) -> Iterator[Record]:
    """One row a line, in the column ``text``; lines of white space are none."""
    for number, line in _lines(path):
        if text := line.strip():
            yield Record(f"{path.name}:{number}", {"text": text})


def _json(path: Path) -> Iterator[Record]:
    text = "".join(line for _, line in _lines(path))
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _jsonl(path)  # JSON Lines under the name .json, as many publish it
            return
        where = f":{error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"{path.name}{where}: broken JSON ({error}). Expected a list of objects, or one object per line."
        ) from error
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
        # {"data": [{…}, …]} is a wrapper; an object with several lists, or with turns as its only list, is a row.
        wrapped = len(lists) == 1 and not _looks_like_turns(lists[0])
        value = lists[0] if wrapped else [value]
    if not isinstance(value, list):
        raise DataError(f"{path.name}: expected a list of JSON objects, got {type(value).__name__}")
    for number, row in enumerate(value, start=1):
        yield _object(row, f"{path.name}:{number}")


def _looks_like_turns(value: list[Any]) -> bool:
    return all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)


def _csv(path: Path) -> Iterator[Record]:
    line = 0

    def numbered() -> Iterator[str]:
        nonlocal line
        for number, text in _lines(path):
            line = number
            yield text

    lines = numbered()
    first = next((text for text in lines if text.strip()), None)
    if first is None:
        raise DataError(f"{path.name} is empty; expected a header line with the names of the columns")
    delimiter = max(",;\t", key=first.count)  # spreadsheets of many countries write ; and call it CSV
    csv.field_size_limit(sys.maxsize)  # the module's default of 128 KiB is shorter than some documents

    def rest() -> Iterator[str]:
        yield first
        yield from lines

    reader = csv.reader(rest(), delimiter=delimiter, strict=True)
    start = 1
    try:
        header = [name.strip() for name in next(reader)]
        _check_header(header, path.name)
        start = line + 1
        for fields in reader:
            if any(field.strip() for field in fields):
                if len(fields) != len(header):
                    raise DataError(
                        f"{path.name}:{start}: got {len(fields)} fields, expected {len(header)} "
                        f"({', '.join(header)}). A text with a {delimiter!r} or a line break stands in double quotes."
                    )
                yield Record(f"{path.name}:{start}", dict(zip(header, fields, strict=True)))
            start = line + 1
    except csv.Error as error:
        raise DataError(
            f"{path.name}:{start}: broken CSV ({error}). A double quote inside a quoted text is written twice; "
            "an opening quote needs a closing one."
        ) from error


def _check_header(header: list[str], name: str) -> None:
    if twice := sorted({column for column in header if header.count(column) > 1}):
        raise DataError(f"{name}: the header names {', '.join(map(repr, twice))} twice; each column needs its own name")


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    with _open(path) as stream:
        try:
            for batch in pyarrow.parquet.ParquetFile(pyarrow.PythonFile(stream, mode="r")).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield Record(f"{path.name}:{number}", row)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path.name} is not a Parquet file that can be read: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}


def _data_set(directory: Path, name: str) -> Iterator[Record]:
    """A hub data set (its files, downloaded) or one written by ``Dataset.save_to_disk``: the ``train`` split.

    Our own splits are made by group, over everything that a stage names; a published ``test`` split stays unread
    unless it is named as a file of its own.
    """
    import datasets

    from lorchestra.base.locate import home

    try:
        if (directory / "state.json").exists() or (directory / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(directory))
        else:
            loaded = datasets.load_dataset(str(directory), cache_dir=str(home() / "datasets"))
    except Exception as error:  # datasets raises whatever its readers raise
        raise DataError(
            f"cannot read the data set {name}: {error}. Name one of its files instead "
            "(hf:org/name@revision/path/inside.parquet)."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        split = "train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None
        if split is None:
            raise DataError(
                f"the data set {name} has the splits {', '.join(map(str, loaded))} and none called train: "
                "name one of its files instead (hf:org/name@revision/path/inside.parquet)"
            )
        loaded, name = loaded[split], f"{name}/{split}"
    for number, row in enumerate(loaded, start=1):
        yield Record(f"{name}:{number}", row)
