"""Rows of the lookahead window on a device: the same bits as rows on the host, whatever the cache holds."""

from contextlib import closing

import pytest
import torch
import torch.nn.functional as F

import adaloader
from adaloader import AdaLoader, full_state_dict
from tests.device.against_plain import Clicks, clicks, plain_and_managed, train

ROWS, DIM = 300, 6
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "rowwise": lambda parameters: adaloader.RowwiseAdagrad(parameters, lr=0.1),
}


def table_bytes(state_words: int, itemsize: int = 8) -> int:
    """Bytes of both tables of `Clicks`, with state."""
    return itemsize * (ROWS * (DIM + state_words) + ROWS // 2 * (3 + state_words))


@pytest.mark.parametrize("skew", [0.0, 1.1])
@pytest.mark.parametrize("lookahead", [0, 5])
def test_tables_of_four_times_the_budget(skew, lookahead, device, seed):
    data = clicks(ROWS, 4, 16 * 20, seed, skew=skew)
    stats = plain_and_managed(
        lambda: Clicks(ROWS, DIM),
        OPTIMIZERS["adagrad"],
        data,
        train(1),
        device,
        lookahead=lookahead,
        device_cache_bytes=table_bytes(DIM) // 4,
    )
    cache = stats["device_cache"]["table.weight"]
    assert cache["bytes"] <= table_bytes(DIM) // 4 and cache["rows"] < ROWS // 2
    assert cache["evicted"] > 0 and cache["fetched"] >= cache["evicted"] and cache["written_back"] > 0
    if lookahead:  # late are those of the first batch, and what was looked up while the keys were not known
        assert cache["late"] < cache["fetched"] / 2
    else:
        assert cache["late"] == cache["fetched"]
    assert cache["miss_rate"] == cache["late"] / cache["looked_up"]


def final(optimizer_name, data, device, loop, cache_bytes, **keywords):
    torch.manual_seed(3)
    model = Clicks(ROWS, DIM, data.tensors[1].dtype).to(device)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    loader = AdaLoader(
        data, 16, model=model, optimizer=optimizer, min_rows=1, device_cache_bytes=cache_bytes, **keywords
    )
    with closing(loader):
        losses = loop(model, optimizer, loader)
        return losses, full_state_dict(model), loader.stats()["device_cache"]


def assert_same_bits(one, other):
    assert one[0] == other[0]
    for name, value in one[1].items():
        assert torch.equal(value.cpu(), other[1][name].cpu()), name


@pytest.mark.parametrize(
    ("name", "dtype"), [("sgd", torch.float64), ("adagrad", torch.float32), ("rowwise", torch.float64)]
)
def test_the_same_bits_as_without_it(name, dtype, device, seed):
    data = clicks(ROWS, 4, 16 * 8, seed, skew=0.9, dtype=dtype)
    without = final(name, data, device, train(), 0)
    cached = final(name, data, device, train(), table_bytes(DIM) // 3)
    assert without[2] == {} and set(cached[2]) == {"table.weight", "bag.weight"}
    assert_same_bits(cached, without)


def test_lookups_that_nobody_foresaw(device, seed):
    data = clicks(ROWS, 4, 16 * 8, seed, skew=0.9)
    without = final("adagrad", data, device, train(1), 0, keys=None)
    cached = final("adagrad", data, device, train(1), table_bytes(DIM) // 3, keys=None)
    assert cached[2]["table.weight"]["looked_up"] > 0
    assert_same_bits(cached, without)


def test_gradients_of_more_rows_than_there_is_room_for_are_applied_on_the_host(device, seed):
    def loop(model, optimizer, loader):
        losses = []
        for number, (ids, target) in enumerate(loader):
            if number % 12 < 10:  # ten batches into one step
                loss = F.mse_loss(model(ids), target.to(device))
                loss.backward()
                losses.append(loss.item())
            if number % 12 >= 9:
                optimizer.step()
                optimizer.zero_grad()
        return losses

    data = clicks(ROWS, 4, 16 * 24, seed, skew=0.0)
    without = final("adagrad", data, device, loop, 0, lookahead=0)
    cached = final("adagrad", data, device, loop, 22_000, lookahead=0)
    assert cached[2]["table.weight"]["rows"] < len(data.tensors[0][: 16 * 10, :2].unique())
    assert_same_bits(cached, without)


def test_whoever_reads_or_writes_rows_sees_and_changes_what_is_on_the_device(device, seed):
    def loop(model, optimizer, loader):
        seen = []
        for number, (ids, target) in enumerate(loader):
            optimizer.zero_grad()
            loss = F.mse_loss(model(ids), target.to(device))
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
            with torch.no_grad():
                if number == 3:
                    seen.append(full_state_dict(model)["table.weight"].sum().item())
                if number == 4:
                    model.table.weight[ids[0, 0].to(device)] = torch.ones(DIM, dtype=torch.float64).to(device)
                if number == 5:
                    model.table.weight.mul_(0.5)
                if number == 6:
                    model.load_state_dict({name: value * 2 for name, value in full_state_dict(model).items()})
                if number == 7:
                    seen.append(model.table.weight.sum().item())
                if number == 8:
                    seen.append(model(ids).sum().item())  # inference between two batches
                if number == 9:
                    seen.append(F.embedding(ids.to(device), model.table.weight, max_norm=0.5).sum().item())
        return seen

    data = clicks(ROWS, 4, 16 * 14, seed, skew=0.9)
    without = final("adagrad", data, device, loop, 0)
    cached = final("adagrad", data, device, loop, table_bytes(DIM) // 3)
    assert_same_bits(cached, without)


def test_a_budget_too_small_for_one_batch_states_the_bytes_that_it_needs(device, seed):
    data = clicks(ROWS, 4, 64, seed, skew=0.0)
    model = Clicks(ROWS, DIM).to(device)
    optimizer = OPTIMIZERS["adagrad"](model.parameters())
    loader = AdaLoader(data, 32, model=model, optimizer=optimizer, min_rows=1, device_cache_bytes=1000)
    with (
        closing(loader),
        pytest.raises(MemoryError, match=r"needs \d+ rows.*bytes, where the cache .*device_cache_bytes"),
    ):
        train()(model, optimizer, loader)


def test_a_budget_of_less_than_a_row_is_refused(device, seed):
    model = Clicks(ROWS, DIM).to(device)
    optimizer = OPTIMIZERS["adagrad"](model.parameters())
    with pytest.raises(ValueError, match=r"device_cache_bytes=100 leaves 50 bytes for table 'table.weight'"):
        AdaLoader(
            clicks(ROWS, 4, 64, seed, skew=0.0),
            32,
            model=model,
            optimizer=optimizer,
            device_cache_bytes=100,
            min_rows=1,
        )


def test_a_cache_for_a_model_on_the_cpu_is_refused(seed):
    model = Clicks(ROWS, DIM)
    optimizer = OPTIMIZERS["adagrad"](model.parameters())
    data = clicks(ROWS, 4, 64, seed, skew=0.0)
    with pytest.raises(ValueError, match=r"device_cache_bytes=1,000 is for the rows of tables on a CUDA device"):
        AdaLoader(data, 32, model=model, optimizer=optimizer, device_cache_bytes=1000, min_rows=1)
    with pytest.raises(ValueError, match=r"device_cache_bytes must be a number of bytes, or None; got -1"):
        AdaLoader(data, 32, model=model, optimizer=optimizer, device_cache_bytes=-1, min_rows=1)


def test_tables_whose_rows_all_move_stay_on_the_host(device, seed):
    data = clicks(ROWS, 4, 64, seed, skew=0.5)
    stats = plain_and_managed(
        lambda: Clicks(ROWS, DIM),
        lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        data,
        train(),
        device,
        device_cache_bytes=10_000,
    )
    assert stats["device_cache"] == {}
