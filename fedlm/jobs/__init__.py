"""Jobs: one run from labels to record, made again, with its provenance and its failures.

For others: `running`, `rerun`, `failures`, `provenance`, `record`, `conformance`.
"""
