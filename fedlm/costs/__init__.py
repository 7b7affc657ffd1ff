"""Costs predicted without weights, data or GPU, and their report.

For others: `prediction`, `report`.
"""
