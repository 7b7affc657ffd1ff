"""Results: records compiled to tables, statistics, figures and pages.

For others: `records`, `scene`, `tables`, `figures`; for their own tables and figures `typeset`, `drawing`.
Tables are made in `cost_tables`, `comparisons`, `skew` and `reference`, with `cells` and `statistics`; figures
in `curves`, `final_scores`, `memory_figures` and `partition_figures`, with `lettering`.
"""
