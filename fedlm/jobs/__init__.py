"""Jobs: one run from labels to record, its provenance, failures and repetition; cleaning up.

For others: `running`, `tuning`, `verification`, `rerun`, `cleaning`, `failures`, `provenance`, `reports`,
`sources`, `tracked`, `comparing`, `record`, `conformance`.
"""
