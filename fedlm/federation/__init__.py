"""The federated trainer: the base class of methods, a client's turn, the link to clients, the rounds.

For methods: `method`, `search`; where they need more, `settings`, `state`, `turn`, `facts`, `optimizer`,
`zeroth_order`. For others: `loop`, `rounds`, `checkpoint`, `stored`, `budgets`, `reducible`.
"""
