"""No federation: every client trains its own model over the rounds and nothing is ever merged."""

from fedlm.federation.method import Method


class LocalOnly(Method):
    """Each client continues its own model; the score is the mean over the clients' models.

    Nothing crosses the network but the first broadcast. A client that was never sampled is not scored.
    """

    title = "Local only"
    reference = "control"
    control = True

    def download(self, server, client, round):
        return {}

    def upload(self, turn):
        turn.keep(turn.values(self.exchanged))
        return {}

    def models(self, server):
        return [kept for _, kept in sorted(server.kept.items())] or [server.tensors]
