"""The page of a report: figures, tables and the template they go into. The door is ``pipeline/report.py``."""
