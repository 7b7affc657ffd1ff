"""The memory that a training job requests."""

from collections.abc import Mapping

# What a job needs besides the method's tensors: Python with PyTorch and Transformers, the data, and the two
# Snakemake processes that watch it.
PROCESS_MB = 2000


def request_mb(predicted: Mapping[str, int], on_gpu: bool) -> int:
    """Return the memory of a training job in MB, from its predicted needs in bytes (`costs.cases.requests`).

    Besides the client's turn the process holds the exchanged parameters five times: the server's first and
    current values, the running sum, a payload, and a checkpoint being written; and twice what the server
    holds besides, such as an optimizer's moments, since their next values are made from the old ones. What
    clients keep between their turns is on disk. On a GPU job the turn's memory is the GPU's, and the
    weights only pass through.
    """
    turn = predicted["parameter_bytes" if on_gpu else "peak_memory_bytes"]
    held = 5 * predicted["exchanged_bytes"] + 2 * predicted.get("server_bytes", 0)
    return PROCESS_MB + int((turn + held) / 1e6)
