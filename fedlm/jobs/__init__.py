"""Jobs: one run from labels to record, its provenance, failures and repetition; cleaning up.

For others: `running`, `tuning`, `collecting`, `reports`, `planning`, `comparing`, `verification`, `rerun`,
`cleaning`, `conformance`, `failures`; for the pipeline also `tracked`, `obstacles`, `progress`, `requests`,
`sources`, `provenance`; where everything is, `folders`.
"""
