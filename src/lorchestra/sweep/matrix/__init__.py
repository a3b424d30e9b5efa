"""Many departments: shared stages trained once, then one last stage for each row of a table."""
