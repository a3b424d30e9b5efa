"""Many trainings of one stage: a grid over any key of its recipe, each cell with its seeds, folds and early end."""
