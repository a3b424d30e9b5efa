"""Strategies that propose points from what was scored before, by well-kept libraries: optuna and cmaes.

Every proposal depends on the seed and the scores so far alone, so a search that hears its old scores again goes on as
if it had never stopped.
"""

from __future__ import annotations

import math
import warnings

import numpy as np

from lorchestra.fusion.search.problem import Problem

SPREAD = 0.15  # first standard deviation of CMA-ES, as a share of the box
PATIENCE = 20  # a sampler that proposes known points so often in a row has converged


def tpe(problem: Problem) -> None:
    """Tree-structured Parzen estimator (Bergstra et al. 2011) of optuna, told of the fixed points first."""
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    box: dict[str, BaseDistribution] = {
        f"x{k}": FloatDistribution(problem.space.low, problem.space.high) for k in range(problem.K)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `multivariate`, since 2020
        sampler = optuna.samplers.TPESampler(seed=problem.seed, n_startup_trials=0, multivariate=True)
    study = optuna.create_study(sampler=sampler)
    for point, score in zip(*problem.tried(), strict=True):
        params = dict(zip(box, map(float, point), strict=True))
        study.add_trial(create_trial(params=params, distributions=box, value=float(score)))
    repeated = 0
    while problem.run.left and repeated < PATIENCE:
        trial, left = study.ask(box), problem.run.left
        (score,) = problem.scores([[trial.params[name] for name in box]], "tpe")
        repeated = repeated + 1 if problem.run.left == left else 0
        if math.isfinite(score):
            study.tell(trial, score)
        else:
            study.tell(trial, state=TrialState.FAIL)


def cmaes(problem: Problem) -> None:
    """Covariance matrix adaptation (Hansen 2016, arXiv 1604.00772), started at the best fixed point; a generation at a
    time is scored."""
    from cmaes import CMA

    low, high = problem.space.low, problem.space.high
    evolution = CMA(
        mean=problem.inside(problem.best),
        sigma=SPREAD * (high - low),
        bounds=np.array([[low, high]] * problem.K),
        seed=problem.seed,
    )
    repeated = 0
    while problem.run.left and repeated < PATIENCE and not evolution.should_stop():
        points, left = [evolution.ask() for _ in range(evolution.population_size)], problem.run.left
        scores = problem.scores(points, "cmaes")
        repeated = repeated + 1 if problem.run.left == left else 0
        worst = max((score for score in scores if math.isfinite(score)), default=0.0)
        evolution.tell([(p, s if math.isfinite(s) else worst + 1) for p, s in zip(points, scores, strict=True)])
