"""Costs predicted without weights, data or GPU, and their report.

For others: `cases` (what is asked), `prediction`, `claimed` (what claims need), `advice`, `tables`,
`figures`.
"""
