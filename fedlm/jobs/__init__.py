"""Jobs: one run from labels to record, made again, with its provenance and its failures; cleaning up.

For others: `running`, `rerun`, `cleaning`, `failures`, `provenance`, `sources`, `record`, `conformance`.
"""
