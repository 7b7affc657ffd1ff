"""The federated trainer: what a method is, a client's turn, the link to the clients, and the loop over rounds.

For methods: `method`. For others: `loop`, `settings`, `facts`, `checkpoint`, `turn`, `state`, `reducible`.
"""
