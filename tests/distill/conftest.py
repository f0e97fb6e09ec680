"""What several files of tests of distillation ask pytest for."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models as tiny as the tests' only wait for a second thread; and sums are as in processes that have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
