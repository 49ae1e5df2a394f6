"""Recording leaves no trace: not in modes, batches, random state or compiled code, however the step ends."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from intents import Recorder, ReplayError
from tests.intents.harness import Tables, assert_replays, record
from tests.intents.patterns import fields, flat


class Counting(TorchDispatchMode):
    """A mode of the user's."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def stack_is_as_it_was():
    assert _get_current_dispatch_mode_stack() == []
    yield
    assert _get_current_dispatch_mode_stack() == []


def plus_one(batch, tables):
    tables("t", batch["sparse"] + 1)


def start(tables: Tables) -> Recorder:
    tables.recorder = Recorder()
    tables.recorder.start()
    return tables.recorder


def test_foreign_mode_around_everything():
    with Counting() as mode:
        recording = record(plus_one, fields(8), Tables())
        assert _get_current_dispatch_mode_stack() == [mode]
    assert recording.sites[0].reason is None and mode.count > 0


def test_foreign_mode_entered_and_left_within():
    tables = Tables()

    def step(batch, tables):
        with Counting() as mode:
            plus_one(batch, tables)
        assert mode.count > 0

    assert record(step, fields(8), tables).sites[0].reason is None


def test_foreign_mode_left_within_and_one_still_there_at_the_end():
    tables = Tables()
    outer, inner = Counting(), Counting()
    with outer:
        recorder = start(tables)
    batch = fields(8)
    recorder.add_batch(0, batch)
    plus_one(batch, tables)
    with inner:
        recording = recorder.stop()
        assert _get_current_dispatch_mode_stack() == [inner]
    assert recording.abandoned is None and recording.sites[0].reason is None


def test_mode_around_next_alone():
    """A loader that starts recording when it hands out a batch, called inside a block of the user's."""
    tables = Tables()

    def loader():
        batch = fields(8)
        recorder = start(tables)
        recorder.add_batch(0, batch)
        yield batch
        yield recorder.stop()

    batches = loader()
    with Counting():
        batch = next(batches)
    plus_one(batch, tables)
    with Counting(), Counting():
        recording = next(batches)
    assert recording.sites[0].reason is None


def test_mode_taken_away_abandons():
    tables = Tables()
    recorder = start(tables)
    torch.utils._python_dispatch._pop_mode()
    recording = recorder.stop()
    assert "took its mode" in recording.abandoned
    assert recording.sites == []
    with pytest.raises(KeyError, match="batch 0 was not recorded"):
        recording.program(0)


def test_exception_and_break_and_a_second_recorder():
    tables = Tables()
    for _ in range(3):
        recorder = start(tables)
        recorder.add_batch(0, fields(8))
        try:
            raise ValueError("of the user's")
        except ValueError:
            recorder.abandon()
        assert not recorder.is_active
        recorder.abandon()
        recorder.lookup("t", torch.arange(3), "embedding")
        assert "no recording was under way" in recorder.stop().abandoned
    tables.recorder = None
    assert record(plus_one, fields(8), tables).sites[0].reason is None


def test_a_recorder_records_once():
    recorder = Recorder()
    recorder.start()
    with pytest.raises(RuntimeError, match="records once"):
        recorder.start()
    recorder.add_batch(0, fields(2))
    with pytest.raises(ValueError, match="batch 0 was added before"):
        recorder.add_batch(0, fields(2))
    recorder.abandon()


def test_failing_operation_reaches_the_user_and_is_not_recorded():
    def step(batch, tables):
        with pytest.raises(RuntimeError):
            torch.cat([batch["sparse"], batch["dense"][:1]], dim=1)
        plus_one(batch, tables)

    tables = Tables()
    assert_replays(record(step, fields(8), tables).program(0), plus_one, fields(5), tables)


@pytest.mark.parametrize("method", ["observe", "add_lookup", "add_batch"])
def test_a_failure_of_ours_is_not_the_users(method, monkeypatch):
    tables = Tables()
    recorder = start(tables)

    def fail(*args):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(recorder._tape, method, fail)
    batch = fields(8)
    recorder.add_batch(0, batch)
    plus_one(batch, tables)
    assert "recording failed with KeyError at test_recorder.py" in recorder.stop().abandoned


def test_ids_that_are_no_plain_tensor():
    tables = Tables()

    def step(batch, tables):
        torch.func.vmap(lambda row: tables.recorder.lookup("t", row, "embedding") or row)(batch["sparse"])

    assert "not a plain tensor" in record(step, fields(8), tables).sites[0].reason


def test_stop_on_another_thread():
    recorder = Recorder()
    recorder.start()
    found = []
    thread = threading.Thread(target=lambda: found.append(recorder.stop()))
    thread.start()
    thread.join()
    assert "another thread" in found[0].abandoned
    assert torch.equal(torch.arange(3) + 1, torch.tensor([1, 2, 3]))
    (left_over,) = _get_current_dispatch_mode_stack()
    assert torch.utils._python_dispatch._pop_mode() is left_over


def test_other_threads_are_not_recorded():
    tables = Tables()
    recorder = start(tables)
    batch = fields(8)
    recorder.add_batch(0, batch)
    thread = threading.Thread(target=lambda: recorder.lookup("other", torch.arange(3), "embedding"))
    thread.start()
    thread.join()
    plus_one(batch, tables)
    assert [site.table for site in recorder.stop().sites] == ["t"]


def test_random_state_and_batch_stay_and_losses_are_equal():
    def losses(recorded: bool) -> list[float]:
        torch.manual_seed(5)
        tables = Tables()
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 4))
        batch = fields(16)

        def step(batch, tables):
            rows = tables("t", batch["sparse"]).mean(1)
            loss = (model(batch["dense"]) * rows).sum()
            loss.backward()
            seen.append(loss.item())

        seen: list[float] = []
        if recorded:
            program = record(step, batch, tables).program(0)
            program.replay(batch)
        else:
            step(batch, tables)
        step(batch, tables)
        return seen + [float(torch.rand(1))]

    assert losses(True) == losses(False)


def test_activations_are_not_kept_alive():
    tables = Tables()
    recorder = start(tables)
    batch = fields(16)
    recorder.add_batch(0, batch)
    hidden = nn.Linear(3, 8)(batch["dense"])
    observer = weakref.ref(hidden)
    del hidden
    assert observer() is None
    recorder.abandon()


def test_gradients_flow_and_backward_may_run_under_the_recorder():
    tables = Tables()

    def step(batch, tables):
        tables("t", batch["sparse"]).sum().backward()

    batch = fields(8)
    record(step, batch, tables)
    expected = torch.zeros(5000).index_add_(0, batch["sparse"].flatten(), torch.ones(batch["sparse"].numel()))
    assert torch.equal(tables.weight.grad[:, 0], expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compile_during_and_after(backend, fullgraph):
    torch._dynamo.reset()
    graphs = []

    def counting_backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    dense = nn.Linear(3, 4)
    compiled = torch.compile(dense, backend=counting_backend, fullgraph=fullgraph)

    def step(batch, tables):
        rows = tables("t", batch["sparse"] + 1).mean(1)
        (compiled(batch["dense"]) * rows).sum().backward()

    tables = Tables()
    program = record(step, fields(8), tables).program(0)
    assert not graphs, "what is compiled cannot be seen: a recorded step runs as it is written"
    assert program.sites[0].reason is None
    assert_replays(program, step, fields(8), tables)
    assert len(graphs) == 1, "torch.compile was kept from compiling after the recording"
    dense_grad, x = dense.weight.grad.clone(), torch.randn(8, 3)
    assert torch.allclose(compiled(x), dense(x))
    assert torch.equal(dense.weight.grad, dense_grad)
    other = torch.compile(lambda y: y.sin() + y, backend=counting_backend, fullgraph=fullgraph)
    assert torch.allclose(other(x), x.sin() + x) and len(graphs) == 2
    torch._dynamo.reset()


def test_recordings_that_overlap_leave_the_compiler_as_it_was():
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(lambda x: x + 1, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    first, second = Recorder(), Recorder()
    first.start(), second.start()
    first.stop(), compiled(torch.ones(2))
    assert not graphs
    second.stop(), compiled(torch.ones(2))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    def step(batch, tables):
        out = checkpoint(lambda ids: tables("t", ids + 1).sum(), batch["sparse"], use_reentrant=False)
        out.backward()

    tables = Tables()
    program = record(step, fields(8), tables).program(0)
    assert len(program.derived) >= 2
    assert_replays(program, step, fields(6), tables)


def test_prefetching_one_batch_ahead():
    tables = Tables()
    recorder = start(tables)
    batches = [fields(8), fields(8), fields(8)]
    recorder.add_batch(0, batches[0])
    moved = batches[0]["sparse"].to(torch.int32)
    for number in (1, 2):
        recorder.add_batch(number, batches[number])
        ahead = batches[number]["sparse"].to(torch.int32)
        tables("t", moved)
        tables("u", torch.arange(moved.shape[1]))
        moved = ahead
    recording = recorder.stop()
    tables.recorder = None
    assert [site.batch_number for site in recording.sites] == [0, 0, 1, 1]
    for number in (0, 1):
        (_, ids), (_, positions) = recording.program(number).replay(batches[2])
        assert np.array_equal(ids, batches[2]["sparse"].numpy().reshape(-1))
        assert np.array_equal(positions, np.arange(moved.shape[1]))
    assert recording.program(2).sites == []


def test_accumulating_two_batches():
    tables = Tables()
    recorder = start(tables)
    for number in range(2):
        batch = fields(8)
        recorder.add_batch(number, batch)
        tables("t", batch["sparse"] + number).sum().backward()
    recording = recorder.stop()
    tables.recorder = None
    batch = fields(3)
    for number in range(2):
        ((_, ids),) = recording.program(number).replay(batch)
        assert np.array_equal(ids, batch["sparse"].numpy().reshape(-1) + number)


def test_batches_made_while_recording():
    """Without workers a loader collates on the trainer's thread: in place, at random, in memory that it reuses."""
    memory = torch.zeros(8, 3, dtype=torch.long)

    def collate() -> dict:
        memory.random_(0, 100)
        stacked = torch.stack([torch.arange(3) + row for row in range(8)])
        stacked[:, 0] = memory[:, 0]
        return {"reused": memory, "new": stacked}

    tables = Tables()
    recorder = start(tables)
    for number in range(2):
        batch = collate()
        recorder.add_batch(number, batch)
        tables("t", batch["reused"] + 1)
        batch["new"][:, 1] += 5
        tables("u", batch["new"])
    recording = recorder.stop()
    tables.recorder = None
    assert [site.reason for site in recording.sites] == [None] * 4
    fresh = {"reused": torch.randint(0, 9, (5, 3)), "new": torch.randint(0, 9, (5, 3))}
    for number in range(2):
        (_, reused), (_, new) = recording.program(number).replay(fresh)
        assert np.array_equal(reused, fresh["reused"].numpy().reshape(-1) + 1)
        assert np.array_equal(new, (fresh["new"] + torch.tensor([0, 5, 0])).numpy().reshape(-1))


def test_ids_that_mix_two_batches():
    tables = Tables()
    recorder = start(tables)
    first, second = flat(4), flat(4)
    recorder.add_batch(0, first)
    recorder.add_batch(1, second)
    tables("t", torch.cat([first, second]))
    assert "mix tensors of the batches [0, 1]" in recorder.stop().sites[0].reason


def test_batches_that_are_slices_of_one_tensor():
    """They share a storage; changing one in place has nothing to do with the other."""
    data = torch.randint(0, 100, (24, 3))
    tables = Tables()
    recorder = start(tables)
    batches = list(data.split(8))
    for number in range(2):
        recorder.add_batch(number, batches[number])
    for batch in batches[:2]:
        batch[:, 0] += 100
        tables("t", batch)
    recording = recorder.stop()
    tables.recorder = None
    before = data.clone()
    for number in range(2):
        ((_, ids),) = recording.program(number).replay(batches[2])
        assert np.array_equal(ids, (batches[2] + torch.tensor([100, 0, 0])).numpy().reshape(-1))
    assert torch.equal(data, before)


def test_leaves_that_share_memory_stay_shared_on_replay():
    def make(size):
        ids = torch.randint(0, 100, (size + 2, 3))
        return {"all": ids[1:], "first": ids[2:, 0], "wide": ids}

    def step(batch, tables):
        batch["first"].add_(1000)
        tables("t", batch["all"])
        tables("u", batch["wide"])

    tables = Tables()
    program = record(step, make(8), tables).program(0)
    assert_replays(program, step, make(5), tables)


def test_constants_are_taken_by_reference():
    offsets = torch.tensor([1, 2, 3, 4, 5, 6, 7])
    token = torch.tensor([9])

    def step(batch, tables):
        tables("t", batch["sparse"] + offsets)
        tables("u", token)

    tables = Tables()
    program = record(step, fields(8), tables).program(0)
    assert [site.constant for site in program.sites] == [False, True]
    assert_replays(program, step, fields(8), tables)
    offsets.mul_(10)
    token.fill_(2)
    assert_replays(program, step, fields(8), tables)


def test_replayed_arrays_do_not_alias_the_batch():
    def step(batch, tables):
        tables("t", batch)

    program = record(step, flat(8), Tables()).program(0)
    batch = flat(8)
    expected = batch.numpy().copy()
    ((_, ids),) = program.replay(batch)
    batch.zero_()
    assert np.array_equal(ids, expected)


def test_device_copies_are_replayed_on_the_host():
    """The meta device stands for any other: ids made on it are derived on the host."""
    recorder = Recorder()
    recorder.start()
    batch = fields(8)
    recorder.add_batch(0, batch)
    moved = batch["sparse"].to("meta", non_blocking=True)
    positions = torch.arange(moved.shape[0], device="meta")
    recorder.lookup("t", moved + positions[:, None], "embedding")
    program = recorder.stop().program(0)
    later = fields(5)
    ((_, ids),) = program.replay(later)
    assert np.array_equal(ids, (later["sparse"] + torch.arange(5)[:, None]).numpy().reshape(-1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_buffers_on_a_device_are_taken_by_reference():
    offsets = torch.arange(7, device="cuda")
    recorder = Recorder()
    recorder.start()
    batch = fields(8)
    recorder.add_batch(0, batch)
    recorder.lookup("t", batch["sparse"].cuda() + offsets, "embedding")
    program = recorder.stop().program(0)
    for _ in range(2):
        later = fields(5)
        ((_, ids),) = program.replay(later)
        assert np.array_equal(ids, (later["sparse"] + offsets.cpu()).numpy().reshape(-1))
        offsets.mul_(10)


def test_replay_sees_no_modes_of_its_caller():
    tables = Tables()
    program = record(plus_one, fields(8), tables).program(0)
    with Counting() as mode, torch.device("meta"):
        program.replay(fields_on_cpu := {key: value for key, value in CPU_BATCH.items()})
    assert mode.count == 0 and fields_on_cpu["sparse"].device.type == "cpu"


CPU_BATCH = fields(8)


def test_replay_on_another_thread_while_training():
    tables = Tables()
    program = record(plus_one, fields(8), tables).program(0)
    batches = [fields(n) for n in range(1, 30)]
    results: list = []
    thread = threading.Thread(target=lambda: results.extend(program.replay(batch)[0][1] for batch in batches))
    thread.start()
    nn.Linear(50, 50)(torch.randn(200, 50)).sum().backward()
    thread.join()
    for batch, ids in zip(batches, results, strict=True):
        assert np.array_equal(ids, batch["sparse"].numpy().reshape(-1) + 1)


@pytest.mark.parametrize(
    "batch",
    [
        {"sparse": torch.zeros(3, 7, dtype=torch.int32), "dense": torch.zeros(3, 3), "label": torch.zeros(3)},
        {"sparse": torch.zeros(3, dtype=torch.long), "dense": torch.zeros(3, 3), "label": torch.zeros(3)},
        {"sparse": torch.zeros(3, 7, dtype=torch.long)},
        [],
        None,
    ],
    ids=["dtype", "dimensions", "missing", "empty", "none"],
)
def test_another_structure_is_an_error(batch):
    from intents import structure

    program = record(plus_one, fields(8), Tables()).program(0)
    assert not program.matches(structure(batch))
    assert program.matches(structure(fields(2)))
    with pytest.raises(ReplayError, match="record a step with a batch of this kind"):
        program.replay(batch)


def test_an_operation_that_fails_is_an_error():
    def step(batch, tables):
        tables("t", torch.stack(batch["sparse"].split(4)))

    program = record(step, fields(8), Tables()).program(0)
    with pytest.raises(ReplayError, match="RuntimeError"):
        program.replay(fields(6))


def test_an_empty_batch():
    def step(batch, tables):
        tables("t", batch["sparse"][:, 0] + 1)
        tables("u", torch.arange(batch["sparse"].shape[0]))

    tables = Tables()
    assert_replays(record(step, fields(8), tables).program(0), step, fields(0), tables)


def test_where_is_the_users_line():
    def lookup(recorder, ids):
        recorder.lookup("t", ids, "embedding")

    recorder = Recorder()
    recorder.start()
    batch = flat(3)
    recorder.add_batch(0, batch)
    lookup(recorder, batch)
    line = lookup.__code__.co_firstlineno + 1
    assert recorder.stop().sites[0].where == f"{__file__}:{line}"


def test_no_lookup_at_all():
    recording = record(lambda batch, tables: None, fields(3), Tables())
    assert recording.sites == [] and recording.program(0).replay(fields(3)) == []


def test_lookup_without_any_batch():
    recorder = Recorder()
    recorder.start()
    recorder.lookup("t", torch.arange(3), "embedding")
    recording = recorder.stop()
    assert recording.sites[0].batch_number is None and recording.programs == {}
