import pytest
import torch


@pytest.fixture
def one_thread():
    "One thread, and nobody else's random numbers."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)
