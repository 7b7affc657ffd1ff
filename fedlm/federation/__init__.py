"""The federated trainer: the base class of methods, a client's turn, the link to clients, the rounds.

For methods: `method`, `search`. For others: `loop`, `rounds`, `turn`, `state`, `settings`, `facts`,
`checkpoint`, `stored`, `reducible`.
"""
