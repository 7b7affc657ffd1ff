"""Results: records compiled to tables, statistics, figures and pages.

For others: `records`, `trials`, `scene`, `contents`, `devices`, `claims`, `tables`, `figures`, `explorer`,
`findings`; for their own tables and figures `typeset`, `drawing`. Tables are made in `cost_tables`,
`ranking`, `comparisons`, `skew`, `reference`, `quality`, `profiles`, `cost_to_target`, `tuning` and `claims`,
with `cells` and `statistics`; figures in `curves`, `final_scores`, `memory_figures`, `partition_figures`,
`profiles` and `tuning`, with `lettering`; the explorer's charts in `panes`, its page in the folder `page`.
"""
