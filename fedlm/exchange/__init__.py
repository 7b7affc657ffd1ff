"""What crosses the network: encoded payloads, and the reduced forms in which parameters travel.

For others: `payload`, `declared`, `uploads`, `compression`, `pruning`.
"""
