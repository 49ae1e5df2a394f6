"""What a managed table is to code that holds its parameter: its form, no memory, and an error for everything else."""

import resource

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaloader import AdaLoader, ManagedTableError, deferred_init, full_state_dict
from tests.adaloader.against_plain import run_managed, weigh

ROWS, DIM = 60, 4


class Model(nn.Module):
    def __init__(self, rows=ROWS, dim=DIM):
        super().__init__()
        self.emb = nn.Embedding(rows, dim)
        self.linear = nn.Linear(dim, 2)

    def forward(self, ids):
        return self.linear(self.emb(ids))


def manage(model, optimizer="sgd", batches=None, **keywords):
    if optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.zeros(2, dtype=torch.int64)] if batches is None else batches
    return AdaLoader.wrap(batches, model=model, optimizer=optimizer, **{"min_rows": 1, **keywords})


@pytest.fixture
def model():
    model = Model()
    loader = manage(model, strategy={"emb": "managed"})
    yield model
    loader.close()


def test_identity_and_form_stay():
    model = Model().double()
    before, values = model.emb.weight, model.emb.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = manage(model, optimizer)
    weight = model.emb.weight
    assert weight is before and optimizer.param_groups[0]["params"][0] is weight
    assert isinstance(weight, nn.Parameter) and next(model.parameters()) is weight
    assert weight.shape == (ROWS, DIM) and weight.size(0) == ROWS == len(weight) and weight.dim() == weight.ndim == 2
    assert weight.dtype == torch.float64 and weight.device == torch.device("cpu") and weight.numel() == ROWS * DIM
    assert weight.requires_grad and weight.is_leaf and weight.grad is None and weight.grad_fn is None
    assert weight.type() == "torch.DoubleTensor" and weight.is_floating_point() and not weight.is_sparse
    assert {weight: 1}[before] == 1 and sum(p.numel() for p in model.parameters()) == ROWS * DIM + 2 * DIM + 2
    assert weight.element_size() == 8 and weight.new_zeros(3).dtype == torch.float64
    assert torch.equal(model.emb(torch.arange(ROWS)), values)
    loader.close()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_requires_grad_stays_and_can_be_changed(requires_grad):
    model = Model()
    model.emb.weight.requires_grad_(requires_grad)
    loader = manage(model)
    weight = model.emb.weight
    assert weight.requires_grad == requires_grad
    assert weight.requires_grad_(not requires_grad) is weight and weight.requires_grad != requires_grad
    weight.requires_grad = requires_grad
    assert weight.requires_grad == requires_grad
    model.requires_grad_(False)
    assert not weight.requires_grad and not model(torch.tensor([1])).requires_grad
    loader.close()


def test_conversions_to_what_it_is_do_nothing(model):
    weight, ids = model.emb.weight, torch.arange(5)
    before = model(ids).detach()
    weigh(model(ids)).backward()  # with a gradient at hand modules convert that too
    for convert in (
        lambda m: m.to("cpu"),
        lambda m: m.float(),
        lambda m: m.to(torch.float32),
        lambda m: m.to(device="cpu", dtype=torch.float32, non_blocking=True),
        lambda m: m.cpu(),
        lambda m: m.train().eval().requires_grad_(True),
    ):
        assert convert(model) is model and model.emb.weight is weight
    for convert in (
        lambda: weight.to(weight),
        lambda: weight.type_as(torch.zeros(1)),
        lambda: weight.type(torch.float32),
        lambda: weight.float(),
    ):
        assert convert() is weight
    assert weight.grad is not None and torch.equal(model(ids), before)
    assert torch.zeros(2, dtype=torch.float64).to(weight).dtype == torch.float32
    assert torch.zeros(2, dtype=torch.float64).type_as(weight).dtype == torch.float32


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.double(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("meta"),
        lambda m: m.cuda(),
        lambda m: m.emb.weight.type(torch.float64),
        lambda m: m.emb.weight.type_as(torch.zeros(1, dtype=torch.float64)),
        lambda m: m.emb.weight.to(torch.zeros(1, dtype=torch.float64)),
    ],
)
def test_conversions_to_anything_else_name_the_table(model, convert):
    with pytest.raises(ManagedTableError, match=r"emb\.weight.*before the loader is built"):
        convert(model)


def test_printing(model):
    weight = model.emb.weight
    for text in (repr(weight), str(weight), f"{weight}", f"{weight:>10}", repr(weight.detach()), str([weight])):
        assert "emb.weight" in text and "nan" not in text
    assert "Embedding(60, 4)" in repr(model)


def test_nothing_of_the_tables_size_is_allocated():
    rows, dim = 1 << 22, 32  # 512 MiB, were it built
    with deferred_init(min_rows=1000, seed=1):
        model = Model(rows, dim)
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loader = manage(model, torch.optim.Adagrad(model.parameters(), lr=0.1))
    weight = model.emb.weight
    again = torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.5)
    made = [
        torch.zeros_like(weight),
        torch.ones_like(weight),
        torch.empty_like(weight),
        torch.full_like(weight, 7),
        torch.full_like(input=weight, fill_value=7, dtype=torch.float64, memory_format=torch.preserve_format),
        torch.zeros_like(weight.data, requires_grad=True),
        weight.detach(),
        weight.data,
        weight.to("cpu"),
        weight.requires_grad_(True),
        again.state[weight]["sum"],
    ]
    for tensor in made:
        assert tensor.shape == (rows, dim)
    assert made[3][5, 6] == 7 and made[4].dtype == torch.float64 and made[10][0, 0] == 0.5
    str(weight), weight.grad
    model.zero_grad(set_to_none=False)
    for use in (lambda w: w.clone(), lambda w: w.sum(), lambda w: w.double()):
        with pytest.raises(ManagedTableError):
            use(weight)
    weigh(model(torch.tensor([1, rows - 1]))).backward()
    str(weight.grad)
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before) * 1024
    assert grown_bytes < rows * dim * 4 // 4
    loader.close()


OPERATIONS = {
    "matmul": lambda w: torch.ones(2, ROWS) @ w,
    "rmatmul": lambda w: w @ torch.ones(DIM, 2),
    "torch.mm": lambda w: torch.mm(torch.ones(2, ROWS), w),
    "sum": lambda w: w.sum(),
    "mean": lambda w: torch.mean(w, 0),
    "norm": lambda w: w.norm(),
    "linear": lambda w: F.linear(torch.ones(3, DIM), w),
    "add": lambda w: w + 1,
    "radd": lambda w: 1 + w,
    "mul by a plain tensor": lambda w: torch.ones(ROWS, DIM) * w,
    "in place": lambda w: w.mul_(2),
    "augmented": lambda w: w.__iadd__(1),
    "clone": lambda w: w.clone(),
    "iteration": lambda w: list(w),
    "unpacking": lambda w: torch.stack([*w]),
    "transpose": lambda w: w.T.sum(),
    "cat": lambda w: torch.cat([torch.ones(1, DIM), w]),
    "stack": lambda w: torch.stack([w, w]),
    "where": lambda w: torch.where(torch.ones(1, dtype=torch.bool), w, 0.0),
    "cosine": lambda w: F.cosine_similarity(torch.ones(1, DIM), w),
    "cdist": lambda w: torch.cdist(torch.ones(1, DIM), w),
    "copied out": lambda w: torch.empty(ROWS, DIM).copy_(w),
    "einsum": lambda w: torch.einsum("ij,kj->ik", torch.ones(2, DIM), w),
    "softmax": lambda w: F.softmax(w, 1),
    "vector": lambda w: nn.utils.parameters_to_vector([w]),
}


@pytest.mark.parametrize("use", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_other_operations_name_table_and_operation(model, use):
    with pytest.raises(ManagedTableError, match=r"emb\.weight"):
        use(model.emb.weight)


def test_the_operation_and_the_remedy_are_named(model):
    with pytest.raises(ManagedTableError, match=rf"matmul.*emb\.weight.*\[{ROWS}, {DIM}\].*min_rows={ROWS + 1}"):
        _ = torch.ones(2, ROWS) @ model.emb.weight
    with pytest.raises(ManagedTableError, match=r"linear.*emb\.weight"):
        F.linear(torch.ones(3, DIM), model.emb.weight)
    with pytest.raises(ManagedTableError, match=r"emb\.weight.*strategy=.*'dense'"):
        model.emb.weight.sum()


def test_a_table_used_as_a_matrix_can_be_kept_dense():
    model = Model()
    loader = manage(model, min_rows=ROWS + 1)
    assert (model.linear.weight @ model.emb.weight.T).shape == (2, ROWS)
    loader.close()


def test_new_values_for_the_whole_table(model):
    weight, everything = model.emb.weight, torch.arange(ROWS)
    first, second, third = torch.randn(3, ROWS, DIM)
    weight.data.copy_(first)
    assert torch.equal(model.emb(everything), first)
    weight.data = second
    assert model.emb.weight is weight and torch.equal(model.emb(everything), second)
    with torch.no_grad():
        assert weight.copy_(third.double()) is weight
    assert torch.equal(model.emb(everything), third)
    with pytest.raises(ValueError, match=r"emb\.weight.*\[?\(?60, 4"):
        weight.data.copy_(torch.zeros(3, DIM))
    assert torch.equal(full_state_dict(model)["emb.weight"], third)


def test_new_values_between_a_lookup_and_the_next_of_the_same_batch():
    batches = [torch.tensor([1, 2, 2]), torch.tensor([2, 5])]

    def loop(model, optimizer, loader):
        seen = []
        for batch in loader:
            seen.append(model.emb(batch))
            with torch.no_grad():
                model.emb.weight.copy_(torch.full((ROWS, DIM), 3.0))
            seen.append(model.emb(batch))
            weigh(model.emb(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return seen

    outcome = run_managed(Model, lambda p: torch.optim.SGD(p, lr=0.1), batches, loop)
    assert (outcome.returned[1] == 3).all() and (outcome.returned[3] == 3).all()
    assert (outcome.weights["emb.weight"][[0, 3, 4]] == 3).all()


def test_code_below_the_interception_reads_nan():
    """What reaches the storage without passing __torch_function__ must not look like values."""
    model = Model()
    loader = manage(model)
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.isnan(model.emb.weight.detach().sum())
        assert model.emb.weight.untyped_storage().nbytes() == 4
    other = nn.Parameter(torch.zeros(ROWS, DIM))
    other.data = model.emb.weight  # PyTorch asks only the tensor that is assigned to
    assert torch.isnan(other.detach().sum())
    loader.close()


def test_a_module_swapped_in_later_shares_the_table(model):
    """User code may hand the very parameter to another module after the loader was built."""
    other = nn.EmbeddingBag(ROWS, DIM, mode="sum")
    other.weight = model.emb.weight
    ids = torch.tensor([[1, 2]])
    assert torch.allclose(other(ids), model.emb(ids).sum(1))


def test_functional_call_with_the_models_own_parameters(model):
    ids = torch.tensor([3, 4])
    called = torch.func.functional_call(model, dict(model.named_parameters()), (ids,))
    assert torch.equal(called, model(ids))
