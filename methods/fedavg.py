"""FedAvg with full tuning: every client trains all parameters; the server averages them."""

from fedlm.federation.method import Method


class FedAvg(Method):
    """McMahan et al. 2017, algorithm 1: the mean of the clients' models, weighted by examples."""

    title = "FedAvg"
    reference = "arXiv:1602.05629"
