"""A rank that has run out of batches hears of a step from another that follows before it hears from who takes it."""

from __future__ import annotations

import threading
from collections import deque

import pytest
import torch
from torch import nn

from adaloader import AdaLoader
from adaloader.model.managed_model import managed_models

pytestmark = pytest.mark.ranks(3)
ROWS, DIM, DELAY_SECONDS = 40, 3, 0.03


def delay_messages_of(transport, source: int) -> None:
    """Have what `source` sends arrive later than what others send after it; in its own order."""
    receive, held_up, held = transport._on_message, transport._held_up, deque()

    def deliver() -> None:
        receive(*held.popleft())

    def arrive(sender: int, message) -> None:
        if sender != source:
            receive(sender, message)
            return
        held.append((sender, message))
        threading.Timer(DELAY_SECONDS, lambda: transport.post(deliver)).start()

    transport._on_message, transport._held_up = arrive, lambda: bool(held) or held_up()


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared", "apart"])
def test_what_the_others_cleared_is_not_stepped_again(comm, seed, shared_memory):
    torch.manual_seed(seed)
    model = nn.Embedding(ROWS, DIM).double()
    expected = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generators = [torch.Generator().manual_seed(seed + rank) for rank in range(comm.size)]
    batches = [
        [
            (torch.randint(0, ROWS, (4,), generator=each), torch.randn(4, DIM, generator=each, dtype=torch.float64))
            for _ in range(6 if rank == 0 else 3)
        ]
        for rank, each in enumerate(generators)
    ]
    loader = AdaLoader.wrap(
        batches[comm.rank], model=model, optimizer=optimizer, min_rows=1, shared_memory=shared_memory
    )
    if comm.rank == comm.size - 1:
        delay_messages_of(managed_models[model].manager.transport, 0)
    comm.Barrier()
    for ids, coefficients in loader:
        optimizer.zero_grad()  # what a rank has left when it runs out is its last gradient, stepped already
        (model(ids) * coefficients).sum().backward()
        optimizer.step()
    for step in range(6):
        given = [of_rank[step] for of_rank in batches if step < len(of_rank)]
        for ids, coefficients in given:
            expected.index_add_(0, ids, coefficients, alpha=-0.5 / len(given))
    torch.testing.assert_close(model(torch.arange(ROWS)).detach(), expected, rtol=1e-12, atol=1e-12)
    comm.Barrier()
    loader.close()
