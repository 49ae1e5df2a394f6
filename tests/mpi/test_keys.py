"""Keys on several ranks: models of every make stay exact, and random ids are known ahead on each rank."""

from __future__ import annotations

import copy

import pytest
import torch

from adaloader import AdaLoader, full_state_dict, random_ids
from tests.adaloader.any_model import CASES, Draw, Net
from tests.training import close

CHOSEN = [
    "all_but_the_last_row",
    "as_complex_numbers",
    "take_along_dim",
    "functional_call",
    "checkpointed",
    "checkpointed_reentrant",
    "row_by_row",
    "a_flag",
    "padded_sequences_with_positions",
    "lists_of_numbers",
    "shuffled_negatives",
]


@pytest.mark.parametrize("name", CHOSEN)
def test_a_model_is_plain_on_every_number_of_ranks(name, comm, seed):
    """Each rank has batches of its own; plain PyTorch takes the mean of their losses."""
    case = CASES[name]
    draws = [Draw(seed + rank) for rank in range(comm.size)]
    batches = [[case.make(draw, 6) for draw in draws] for _ in range(8)]

    def start():
        torch.manual_seed(seed)
        net = Net().double()
        return net, torch.optim.SGD(net.parameters(), lr=0.05)

    def of_rank(rank, losses):
        torch.manual_seed(seed + rank)
        return losses()

    plain, optimizer = start()
    for batch in copy.deepcopy(batches):
        optimizer.zero_grad()
        for rank, share in enumerate(batch):
            (of_rank(rank, lambda share=share: case.loss(plain, share)) / comm.size).backward()
        optimizer.step()

    net, optimizer = start()
    mine = [batch[comm.rank] for batch in batches]
    loader = AdaLoader.wrap(mine, model=net, optimizer=optimizer, min_rows=1, comm=comm)
    for batch in loader:
        optimizer.zero_grad()
        of_rank(comm.rank, lambda batch=batch: case.loss(net, batch)).backward()
        optimizer.step()
    weights = full_state_dict(net)
    for key, value in plain.state_dict().items() if comm.rank == 0 else ():  # rank 0 gets them
        torch.testing.assert_close(
            weights[key], value, rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )
    close(comm, loader)


def test_random_ids_are_intended_and_differ_between_ranks(comm, seed):
    def run(resume=None, stop_after=None):
        torch.manual_seed(seed)
        net = Net().double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        draw = Draw(seed + comm.rank)
        data = [draw.ids(6) for _ in range(7)]
        loader = AdaLoader.wrap(data, model=net, optimizer=optimizer, min_rows=1, comm=comm)
        if resume is not None:
            loader.load_state_dict(resume)
        drawn, demanded, state = [], [], None
        for batch in loader:
            drawn.append(random_ids(300, (len(batch), 4)))
            (net.item(batch)[:, None] * net.word(drawn[-1])).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            demanded.append(loader.stats()["on_demand"])
            if len(drawn) == stop_after:
                state = loader.state_dict()
        close(comm, loader)
        return drawn, demanded, state

    drawn, demanded, state = run(stop_after=3)
    assert demanded[0] == demanded[-1] > 0
    everyone = comm.allgather([ids.tolist() for ids in drawn])
    assert all(everyone[rank] != everyone[0] for rank in range(1, comm.size))
    resumed, _, _ = run(resume=state)
    assert [ids.tolist() for ids in resumed] == [ids.tolist() for ids in drawn[3:]]
