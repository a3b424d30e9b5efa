"""A matrix: shared stages once, every department's last stage, each delivered under its own name, one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorchestra.adapter.adapter import Adapter
from lorchestra.base.home import write_whole
from lorchestra.base.load import choose_device, choose_format
from lorchestra.errors import LorchestraError, StorageError, counted
from lorchestra.events import SILENT, Reporter
from lorchestra.pipeline.cache import write_json
from lorchestra.pipeline.delivering import place_with_lineage
from lorchestra.pipeline.publishing import Published, check_publish, open_registry, publish, push_stages, recorded
from lorchestra.recipe.publish import published_name
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sections import Fusion
from lorchestra.recipe.sources import masking
from lorchestra.recipe.unexpanded import Unexpanded, masked
from lorchestra.report.departments import render_departments
from lorchestra.report.values import metric_name
from lorchestra.sweep.executors import check_executor, executor
from lorchestra.sweep.matrix.outcome import Outcome, department_figures, remarks
from lorchestra.sweep.matrix.rows import Department, Matrix
from lorchestra.sweep.matrix.worker import DepartmentWorker
from lorchestra.sweep.place import held


@dataclass(frozen=True)
class MatrixResult:
    """What a matrix came to.

    Args:
        directory: ``departments/<name>/adapter``, ``departments.json``, ``departments.html``, ``adapters/``,
            ``events.jsonl``.
        recipe: its name.
        context: the last stage has one.
        shared: stage → content digest.
        base: fingerprint of the base.
        left_out: what the recipe asks for and departments do not get.
        outcomes: in the table's order.
        remarks: department → what should be known beside its figures.
        published: department → what it is in a registry, if the recipe publishes.
        unpublished: department → why it could not be published, or not take its alias.
        page: ``departments.html``.
    """

    directory: Path
    recipe: str
    context: bool
    shared: Mapping[str, str]
    base: Mapping[str, str]
    left_out: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    remarks: Mapping[str, tuple[str, ...]]
    page: Path
    published: Mapping[str, Published] = field(default_factory=dict)
    unpublished: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> tuple[str, ...]:
        """Departments that were not delivered."""
        return tuple(outcome.name for outcome in self.outcomes if outcome.state != "done")

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: ``departments.json``."""
        return {
            "recipe": self.recipe,
            "base": dict(self.base),
            "shared": dict(self.shared),
            "context": self.context,
            "left_out": list(self.left_out),
            "departments": {
                outcome.name: {
                    **outcome.as_dict(),
                    "adapter": _adapter(outcome.name) if outcome.state == "done" else None,
                    "remarks": list(self.remarks[outcome.name]),
                    **self._published(outcome.name),
                }
                for outcome in self.outcomes
            },
        }

    def _published(self, name: str) -> dict[str, Any]:
        """Of a matrix that publishes."""
        if not (self.published or self.unpublished):
            return {}
        found = self.published.get(name)
        return {"published": asdict(found) if found else None, "unpublished": self.unpublished.get(name, "")}


def run_matrix(
    matrix: Matrix,
    *,
    directory: Path | None = None,
    kind: str = "local",
    jobs: int = 1,
    reporter: Reporter = SILENT,
    inside: Reporter | None = None,
    wait: bool = False,
) -> MatrixResult:
    """Carry out a matrix; finished departments are reused, an unfinished one goes on where it stopped.

    A department that cannot be trained is told with its reason, and the others go on.

    Args:
        matrix: see :meth:`Matrix.load`.
        directory: of the results; ``runs/<recipe name>`` under the working directory by default.
        kind: ``local`` or ``ray``.
        jobs: departments at a time.
        reporter: progress.
        inside: progress within a department; ``reporter`` unless given.
        wait: wait for another run in the same directory instead of refusing.

    Raises:
        UserError: something in the shared part of the recipe, its sources or its data is to be mended.
        TrainingError: a shared stage could not be trained.
        StorageError: the disk is full or cannot be written.
        RegistryError: the registry that the recipe publishes to cannot be reached, before anything is trained.
    """
    check_executor(kind)
    recipe = matrix.shared()
    where = (directory or Path("runs") / recipe.name).resolve()
    texts = [text for _, text, _, _ in recipe.sources()]
    publish = recipe.deliver.publish
    texts += [publish.registry] if publish else []
    mask = masking([*texts, *(override for row in matrix.departments for override in row.overrides)])
    with held(where, "departments", reporter, inside, wait) as (journal, quiet):
        choose_format(choose_device(recipe.device), recipe.dtype)  # a mistake there is told before any fetch
        check_publish(recipe, [matrix.published_name(row) for row in matrix.departments])
        return _Run(matrix, where, kind, jobs, Unexpanded(journal, mask), Unexpanded(quiet, mask)).go()


class _Run:
    def __init__(
        self, matrix: Matrix, directory: Path, kind: str, jobs: int, reporter: Unexpanded, inside: Reporter
    ) -> None:
        self.matrix = matrix
        self.directory = directory
        self.kind, self.jobs = kind, jobs
        self.reporter, self.inside = reporter, inside
        self.found: dict[str, Outcome] = {}
        self.published: dict[str, Published] = {}
        self.unpublished: dict[str, str] = {}

    def go(self) -> MatrixResult:
        """Shared stages, then every row."""
        matrix, left_out = self.matrix, tuple(self.matrix.left_out())
        for line in left_out:
            self.reporter.say(f"note: {line}")
        worker = DepartmentWorker(matrix, self.reporter)
        prepared, stages = worker.shared()
        for line in prepared.check.warnings:
            self.reporter.say(f"warning: {line}")
        for name, trained in stages.items():
            own = self.directory / "adapters" / name
            place_with_lineage(trained.step.directory / "adapter", own, trained.adapter.lineage)
        publishes = matrix.shared().deliver.publish
        if publishes is not None and publishes.stages and stages:
            self._push_stages(list(stages))
        if (self.kind, self.jobs) != ("local", 1):
            worker.trainer.release()  # the others hold it
        worker.quieten(self.inside)
        context = bool(matrix.recipe_of(matrix.departments[0]).stage(matrix.stage).context)
        shared = {name: trained.adapter.digest for name, trained in stages.items()}
        start = MatrixResult(
            self.directory, prepared.recipe.name, context, shared, asdict(prepared.base), left_out, (), {},
            self.directory / "departments.html",
        )  # fmt: skip
        total = len(matrix.departments)
        with (
            executor(self.kind, worker, self.jobs, self.reporter) as run,
            self.reporter.task("departments", total, "department") as task,
        ):
            for number, (department, outcome) in enumerate(run.run(matrix.departments), start=1):
                self._place(outcome)
                if publishes is not None and outcome.state == "done":
                    self._publish(department, outcome)
                self.reporter.event("department", number=number, total=total, **_brief(outcome))
                self.reporter.say(f"{number}/{total} {department.name}: {_line(outcome)}")
                task.advance()
                self._write(start)
        return self._write(start)

    def _place(self, outcome: Outcome) -> None:
        """Put the adapter under the department's name, with where it comes from and how it did."""
        self.found[outcome.name] = outcome
        if outcome.state != "done":
            return
        source = Path(outcome.directory) / "adapter"
        tests = {test.metric: {**test.as_dict(), "sealed": outcome.sealed} for test in outcome.tests}
        metrics = {"validation_loss": outcome.after, **tests, **department_figures(self.matrix.stage, outcome)}
        lineage = Adapter.load(source).lineage
        told = replace(lineage, data=dict(outcome.data), metrics=metrics, tools=dict(outcome.tools))
        place_with_lineage(source, self.directory / _adapter(outcome.name), told)

    def _push_stages(self, names: list[str]) -> None:
        """Of what all departments share, under the recipe's name."""
        recipe = Recipe.load(self.matrix.recipe, self.matrix.overrides)
        with open_registry(recipe) as registry:
            push_stages(
                registry, recipe, published_name(recipe), {name: self.directory / "adapters" / name for name in names}
            )

    def _publish(self, department: Department, outcome: Outcome) -> None:
        """Push the adapter under the department's own name; what goes wrong is told in its row, and others go on."""
        recipe, name = self.matrix.recipe_of(department), self.matrix.published_name(department)
        fusion = Fusion(members=tuple(outcome.weights), weights=dict(outcome.weights), rank=recipe.fusion.rank)
        told = recorded(recipe.model_copy(update={"fusion": fusion}))
        adapter = self.directory / _adapter(outcome.name)
        try:
            self.published[outcome.name] = publish(recipe, adapter, {}, self.inside, name=name, told=told)
        except StorageError:
            raise
        except LorchestraError as error:
            self.unpublished[outcome.name] = str(error)

    def _write(self, start: MatrixResult) -> MatrixResult:
        """Results so far."""
        rows: list[Department] = [row for row in self.matrix.departments if row.name in self.found]
        outcomes = tuple(self.found[row.name] for row in rows)
        said = remarks(outcomes, start.context)
        said |= {name: (*said[name], why) for name, why in self.unpublished.items()}
        result = replace(
            start, outcomes=outcomes, remarks=said, published=dict(self.published), unpublished=dict(self.unpublished)
        )
        made = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "lorchestra": version("lorchestra")}
        told = masked(
            self.reporter.mask, {**made, "departments_in_all": len(self.matrix.departments), **result.as_dict()}
        )
        write_json(self.directory / "departments.json", told)
        write_whole(result.page, render_departments(told))
        return result


def _adapter(name: str) -> str:
    return f"departments/{name}/adapter"


def _brief(outcome: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.name,
        "state": outcome.state,
        "reason": outcome.reason,
        "digest": outcome.digest,
        "cached": outcome.cached,
        "seconds": round(outcome.seconds, 2),
    }


def _line(outcome: Outcome) -> str:
    if outcome.state != "done":
        return f"{outcome.state}: {outcome.reason}"
    parts = [counted(outcome.examples["train"], "example")]
    if outcome.before is not None and outcome.after is not None:
        parts.append(f"validation loss {outcome.before:.3f} → {outcome.after:.3f}")
    if (test := outcome.test) is not None:
        models = test.models
        parts.append(
            f"test {metric_name(test.metric)} {models['base'].estimate:.3f} → {models['delivered'].estimate:.3f}"
        )
    return ", ".join([*parts, "done before" if outcome.cached else f"{outcome.seconds:.0f} s"])
