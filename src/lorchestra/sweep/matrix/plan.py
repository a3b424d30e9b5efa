"""What a matrix would do: shared stages and departments, what is there already, what the rest will roughly cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lorchestra.adapter.adapter import Adapter
from lorchestra.base.locate import NotHereError
from lorchestra.errors import LorchestraError, StorageError, counted
from lorchestra.events import SILENT
from lorchestra.pipeline.costs import Costs, Outlook, outlook_of
from lorchestra.pipeline.estimate import Machine
from lorchestra.pipeline.plan import Planner
from lorchestra.pipeline.planned import Plan, PlannedStep
from lorchestra.pipeline.prepare import prepare_beside
from lorchestra.pipeline.publishing import check_publish
from lorchestra.pipeline.training import context_of, stage_digest, stage_inputs
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sources import is_here
from lorchestra.recipe.unexpanded import as_written
from lorchestra.sweep.matrix.rows import Department, Matrix
from lorchestra.sweep.matrix.worker import department_digest
from lorchestra.sweep.trainer import sealed_test

State = Literal["to fetch", "failed", "to do", "begun", "trained", "cached", "diverged"]


@dataclass(frozen=True)
class PlannedDepartment:
    """One row.

    Args:
        name: of the department.
        origin: its row, ``departments.csv:3``.
        settings: column → cell.
        state: ``to do``, ``begun`` (goes on from a checkpoint), ``trained`` (what is left is to deliver and judge it),
            ``cached``, ``diverged`` (a run finds it so again), ``to fetch`` (its data), or ``failed``: it cannot be
            trained, for ``note``.
        note: what is to be known of the state.
        digest: of its step; empty where it depends on an unfinished one.
        outlook: of its stage.
        seconds: still to spend, estimated; ``None`` if it cannot be said.
        memory: bytes at its peak, estimated.
        warnings: what should be looked at in its data.
    """

    name: str
    origin: str
    settings: Mapping[str, str]
    state: State
    note: str = ""
    digest: str = ""
    outlook: Outlook | None = None
    seconds: float | None = None
    memory: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class MatrixPlan:
    """The whole of it.

    Args:
        stage: the last one, which every department trains.
        plan: of all steps, those of the departments too.
        shared: how many of these steps come before any department.
        departments: in the table's order.
        left_out: what the recipe asks for and departments do not get.
    """

    stage: str
    plan: Plan
    shared: int
    departments: tuple[PlannedDepartment, ...]
    left_out: tuple[str, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Departments that a run could not deliver as they are."""
        return tuple(row.name for row in self.departments if row.state in ("failed", "diverged"))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            **self.plan.as_dict(),
            "steps": [asdict(step) for step in self.plan.steps[: self.shared]],
            "stage": self.stage,
            "left_out": list(self.left_out),
            "departments": {row.name: asdict(row) for row in self.departments},
        }


def plan_matrix(matrix: Matrix, machine: Machine | None = None) -> MatrixPlan:
    """Look ahead. Nothing is fetched and nothing is trained; a row that cannot be trained is told, as a run tells it.

    Args:
        matrix: see :meth:`Matrix.load`.
        machine: rates to estimate with; measured here by default.

    Raises:
        UserError: something in the shared part of the recipe, its sources or its data is to be mended.
        RegistryError: the registry that the recipe publishes to cannot be reached.
    """
    recipe = matrix.shared()
    check_publish(recipe, [matrix.published_name(row) for row in matrix.departments])
    planner = _begun(recipe, machine)
    adapters = planner.stages()
    shared = len(planner.steps)
    rows = _Rows(matrix, planner, adapters)
    found = [rows.look(matrix.recipe_of(row), row) for row in matrix.departments]
    whole = planner.plan()  # times are as trainings went so far, of the departments too
    departments = []
    for row in found:
        steps = whole.steps[row.first : row.last]
        departments.append(
            replace(
                row.planned,
                seconds=sum(step.seconds or 0.0 for step in steps) if steps and planner.costs else None,
                memory=max((step.memory for step in steps if step.memory and not step.finished), default=None),
            )
        )
    whole = replace(whole, notes=(*_notes(matrix, departments, planner.costs is not None), *whole.notes))
    return MatrixPlan(matrix.stage, whole, shared, tuple(departments), tuple(matrix.left_out()))


@as_written
def _begun(recipe: Recipe, machine: Machine | None) -> Planner:
    """With the sources and the data that all share."""
    planner = Planner(recipe, machine)
    planner.begin()
    return planner


@dataclass(frozen=True)
class _Looked:
    """A row, and where its steps are among the planner's."""

    planned: PlannedDepartment
    first: int
    last: int


@dataclass
class _Rows:
    """Looks at one row after the other.

    Args:
        matrix: recipe and departments.
        planner: has looked at what is shared.
        adapters: the shared stages that are finished, and those that were brought in.
        trainings: digest of a training → the department that comes to it first.
    """

    matrix: Matrix
    planner: Planner
    adapters: Mapping[str, Adapter]
    trainings: dict[str, str] = field(default_factory=dict)

    def look(self, recipe: Recipe, department: Department) -> _Looked:
        """One row; ``recipe`` is its own."""
        first = len(self.planner.steps)
        known = PlannedDepartment(department.name, department.origin, dict(department.settings), "to do")
        try:
            planned = self._row(recipe, department, known)
        except StorageError:
            raise
        except NotHereError as error:
            planned = replace(known, state="to fetch", note=str(error))
        except LorchestraError as error:
            planned = replace(known, state="failed", note=str(error))
        if planned.state == "to fetch":
            self.planner.add(PlannedStep(department.name, "source", (), "to fetch", planned.note))
        return _Looked(planned, first, len(self.planner.steps))

    def _row(self, recipe: Recipe, department: Department, known: PlannedDepartment) -> PlannedDepartment:
        name, planner = self.matrix.stage, self.planner
        _all_here(recipe, name)
        if planner.prepared is None or planner.shape is None or planner.machine is None:
            stage = recipe.stage(name)
            return replace(known, outlook=outlook_of(recipe, stage, planner.model, planner.counts(stage)))
        prepared = prepare_beside(recipe, planner.prepared, SILENT, fetch=False)
        recipe, stage = prepared.recipe, prepared.recipe.stage(name)
        known = replace(known, warnings=next(s.warnings for s in prepared.check.stages if s.name == name))
        own = replace(prepared, data={name: prepared.data[name]})
        costs = Costs(own, planner.model, planner.shape, planner.machine)
        outlook, cost = costs.stage(stage)
        counts = {part: len(examples) for part, examples in prepared.data[name].splits.parts()}
        outlook = replace(outlook, examples=counts)
        needs = ("data", *(other.name for other in recipe.stages[:-1]))
        digest = trains = ""
        inputs = None
        if stage.context.keys() <= self.adapters.keys():
            inputs = stage_inputs(prepared, stage, context_of(recipe, stage, self.adapters))
            trains = stage_digest(prepared, inputs, planner.device.type, str(planner.format))
        if trains and {*needs[1:]} <= self.adapters.keys():
            domain = sealed_test(prepared, name, recipe.evaluate.test_limit)
            digest = department_digest(recipe, department, trains, self.adapters, domain)
        done = planner.cache.lookup("department", digest) if digest else None
        known = replace(known, digest=digest, outlook=outlook)
        if done is not None:
            planner.add(PlannedStep(department.name, "department", needs, "cached", digest=digest, seconds=0.0))
            if done.info["state"] == "diverged":
                reason = json.loads((done.directory / "outcome.json").read_text(encoding="utf-8"))["reason"]
                return replace(known, state="diverged", note=reason)
            return replace(known, state="cached")
        state: State = "to do"
        note = ""
        if trains and (other := self.trainings.setdefault(trains, department.name)) != department.name:
            note = f"trained once for both, with {other}"
        else:
            planner.training(prepared, department.name, needs, inputs, outlook, cost)
            step = planner.steps[-1]
            state = {"cached": "trained", "begun": "begun"}.get(step.state, "to do")  # type: ignore[assignment]
            note = step.note
        delivered, judged = costs.fuse(), None
        if counts["test"]:
            judged = costs.judging(recipe.evaluate.test_limit, 3 if stage.context else 2)
        planner.add(
            PlannedStep(
                f"{department.name}: delivered", "department", (department.name,), "to do", digest=digest,
                seconds=delivered.seconds + (judged.seconds if judged else 0.0),
                memory=max(delivered.memory, judged.memory if judged else 0.0),
            )
        )  # fmt: skip
        return replace(known, state=state, note=note)


def _all_here(recipe: Recipe, name: str) -> None:
    """Whether a department's data can be read.

    Raises:
        NotHereError: a source would have to be fetched first.
    """
    for entry in recipe.stage(name).data:
        if not is_here(entry.source, recipe.directory, "dataset"):
            raise NotHereError(f"{entry.source!r} has not been fetched yet")


def _notes(matrix: Matrix, rows: list[PlannedDepartment], estimated: bool) -> list[str]:
    """What is to be known of the departments together."""
    notes = []
    absent = [row for row in rows if row.state == "to fetch"]
    if estimated and absent:
        notes.append(
            f"{counted(len(absent), 'department')} to be fetched first: neither time nor memory of "
            f"{'it' if len(absent) == 1 else 'them'} is in the sums. The run fetches what is missing."
        )
    publish = matrix.shared().deliver.publish
    if publish is not None:
        first = matrix.published_name(matrix.departments[0])
        notes.append(f"Each department that is delivered is published under its own name, {first} …")
    if estimated and any(row.state in ("to do", "begun", "trained") for row in rows):
        notes.append("Memory is that of one process; with --jobs N there are N of them, which share the cores.")
    return notes
