"""Data: the base class of tasks, tokenising, prepared examples, partitions, metrics, data sets from the hub.

For others: `task`, `tokenising`, `pool`, `prepared`, `schemes` (settings of partitions), `division`,
`partition`, `metrics`, `evaluate_metrics`, `tables`, `hub`.
"""
