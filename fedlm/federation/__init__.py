"""The federated trainer: what a method is, a client's turn, the link to clients, the loop over rounds.

For methods: `method`. For others: `loop`, `rounds`, `turn`, `state`, `settings`, `facts`, `checkpoint`,
`stored`, `reducible`.
"""
