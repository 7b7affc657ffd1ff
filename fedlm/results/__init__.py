"""Results: records compiled to tables, statistics, figures and pages.

For others: `records`, `tables`, `figures`, `typeset`, `drawing`, `statistics`.
"""
