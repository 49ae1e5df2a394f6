"""Deferred tables: which tensors are declared, how they look, are copied and handed over, and their memory."""

import copy
import math
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from torch import nn

from adaloader.deferred.context import (
    DeferredInitError,
    DeferredTensor,
    deferred_init,
    program_of,
    take_over,
)
from tests.adaloader.deferred_tables import D, N, declared, rows_of

# --- which tensors are declared ---


def test_only_large_real_matrices_are_declared():
    with deferred_init(min_rows=N, seed=0):
        plain = [
            torch.empty(N - 1, D),
            torch.empty(N),
            torch.empty(N, 2, D),
            torch.zeros(N, D, dtype=torch.int64),
            torch.zeros(N, D, dtype=torch.float16),
            torch.full((N, 1), 3),
            torch.full((N, 1), True),
            torch.empty(N, D, device="meta"),
            torch.empty_strided((N, D), (1, N)),
            torch.ones(3).new_zeros(3, D),
            torch.ones(N, D).new_zeros(3, D),
            torch.normal(torch.zeros(3), 1.0),
            torch.from_numpy(np.zeros((N, 1), np.float32)),
            torch.tensor([[0.0]] * N),
            torch.arange(float(N)).unsqueeze(1),
            torch.ones(1).new([[1.0]] * N),
            torch.randint(0, 9, (N, D)),
            nn.Linear(3, N).weight,
            nn.LSTM(2, N // 4).weight_ih_l0,
        ]
        large = [
            torch.empty(N, 1),
            torch.empty(torch.Size((N, D)), dtype=torch.float64),
            torch.randn(N, D, requires_grad=True),
            torch.ones(1).new(N, D),
            nn.Embedding(N, D).weight,
            nn.EmbeddingBag(N, D).weight,
            nn.Embedding.from_pretrained(torch.randn(N, D)).weight,
        ]
    assert [type(tensor) for tensor in plain if isinstance(tensor, DeferredTensor)] == []
    assert all(isinstance(tensor, DeferredTensor) for tensor in large)
    assert large[2].requires_grad and not large[0].requires_grad and not large[-1].requires_grad
    assert not isinstance(torch.empty(N, D), DeferredTensor)


def test_default_dtype_is_followed():
    torch.set_default_dtype(torch.float64)
    try:
        assert declared().dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_device_is_followed():
    with torch.device("meta"), deferred_init(seed=0):
        assert not isinstance(torch.empty(N, D), DeferredTensor)
    with deferred_init(seed=0), torch.device("meta"):
        assert nn.Embedding(N, D).weight.is_meta
        assert isinstance(torch.empty(N, D, device="cpu"), DeferredTensor)


def test_contexts_nest_and_end():
    with deferred_init(min_rows=10, seed=1):
        assert program_of(torch.zeros(10, 2)).seed == 1
        with deferred_init(min_rows=1000, seed=2):
            assert program_of(torch.zeros(1000, 2)).seed == 2
            assert program_of(torch.zeros(999, 2)) is None
        assert program_of(torch.zeros(10, 2)).seed == 1
        with pytest.raises(KeyError), deferred_init(min_rows=1):
            raise KeyError("user")
        assert program_of(torch.zeros(9, 2)) is None
        seen = []
        thread = threading.Thread(target=lambda: seen.append(program_of(torch.zeros(10, 2))))
        thread.start()
        thread.join()
        assert seen == [None]  # modes are a thread's own
    assert program_of(torch.zeros(10, 2)) is None


def test_seeds():
    torch.manual_seed(1234)
    context = deferred_init()
    with context:
        first = program_of(torch.randn(N, D))
    torch.manual_seed(-1)
    with context:
        second = program_of(torch.randn(N, D))
    assert (first.seed, second.seed) == (1234, (1 << 64) - 1)
    with pytest.raises(ValueError, match="64 bits"):
        deferred_init(seed=1 << 64)
    with pytest.raises(ValueError, match="min_rows"):
        deferred_init(min_rows=0)
    with pytest.raises(TypeError):
        deferred_init(min_rows=2.5)


def test_no_random_number_is_drawn():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    own = generator.get_state()
    with deferred_init():
        model = nn.Sequential(nn.Embedding(N, D), nn.EmbeddingBag(N, D))
        nn.init.trunc_normal_(model[0].weight)
        nn.init.normal_(model[1].weight, generator=generator)
        torch.randn(N, D, generator=generator) * 2.0
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(generator.get_state(), own)


def test_trunc_normal_of_plain_tensors_stays_what_it_is():
    declared()
    torch.manual_seed(3)
    values = nn.init.trunc_normal_(torch.empty(50, 4))
    torch.manual_seed(3)
    code = """
        import torch
        torch.manual_seed(3)
        print(torch.nn.init.trunc_normal_(torch.empty(50, 4)).double().sum().item())
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    fresh = subprocess.run(run, capture_output=True, text=True, check=True)
    assert float(fresh.stdout) == values.double().sum().item()


# --- form, aliases, copies ---


def test_form():
    weight = declared(lambda: nn.Parameter(torch.randn(N, D, dtype=torch.float64)))
    plain = nn.Parameter(torch.randn(N, D, dtype=torch.float64))
    for ask in (
        lambda w: w.shape,
        lambda w: (w.size(), w.size(1), w.dim(), w.ndim, w.numel(), w.nelement(), len(w)),
        lambda w: (w.dtype, w.device, w.layout, w.type(), w.element_size(), w.itemsize, w.nbytes),
        lambda w: (
            w.is_leaf,
            w.is_cuda,
            w.is_cpu,
            w.is_meta,
            w.is_sparse,
            w.is_quantized,
            w.is_floating_point(),
        ),
        lambda w: (w.is_contiguous(), w.stride(), w.stride(0), w.storage_offset(), w.is_complex()),
        lambda w: (w.requires_grad, w.grad, w.grad_fn, w.retains_grad, w._version, w.is_inference()),
        lambda w: isinstance(w, nn.Parameter),
        lambda w: w.cpu() is w and w.to("cpu") is w and w.to(torch.float64) is w and w.double() is w,
        lambda w: w.contiguous() is w and w.to(torch.ones(1, dtype=torch.float64)) is w,
        lambda w: (w[3:5].shape, w[3].shape, w.detach().requires_grad, w.data.shape) if not w.requires_grad else None,
        lambda w: w in {w} and w in [w],
        lambda w: torch.zeros(1).type_as(w).dtype,
    ):
        assert ask(weight) == ask(plain)
    assert "normal(0.0, 1.0)" in repr(weight) and "normal" in f"{weight}" and str(N) in str(weight)


def test_requires_grad_and_grad():
    weight = declared(lambda: nn.Parameter(torch.randn(N, D), requires_grad=False))
    assert not weight.requires_grad
    assert weight.requires_grad_() is weight and weight.requires_grad
    weight.requires_grad = False
    assert not weight.requires_grad
    weight.grad = None
    assert weight.grad is None
    optimizer = torch.optim.SGD([weight.requires_grad_()], lr=0.1)
    optimizer.zero_grad()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert weight.register_hook(lambda grad: grad) is not None
    assert weight.register_post_accumulate_grad_hook(lambda parameter: None) is not None


def test_aliases_share_the_program_and_copies_do_not():
    weight = declared(lambda: nn.Parameter(torch.randn(N, D)))
    weight.data.fill_(1.0)
    weight.detach().mul_(2.0)
    assert program_of(weight).describe().endswith("fill(1.0); mul(2.0)")
    assert not weight.detach().requires_grad and program_of(weight.detach()) == program_of(weight)
    with torch.no_grad():
        clone = weight.clone()
    clone.zero_()
    other = copy.deepcopy(weight)
    with torch.no_grad():
        other.add_(1.0)
    assert program_of(weight).describe().endswith("fill(1.0); mul(2.0)")
    assert program_of(clone).constant == 0.0
    weight.data = clone
    assert program_of(weight).constant == 0.0 and weight.requires_grad
    with torch.no_grad():
        weight.copy_(other)
    assert program_of(weight).describe().endswith("fill(1.0); mul(2.0); add(1.0)")


def test_deepcopy_of_a_model_keeps_ties_parameters_and_values():
    with deferred_init(seed=4):
        model = nn.ModuleDict({"a": nn.Embedding(N, D), "b": nn.Embedding(N, D)})
    model["b"].weight = model["a"].weight
    model["a"].weight.note = ["user"]
    twin = copy.deepcopy(model)
    assert twin["a"].weight is twin["b"].weight is not model["a"].weight
    assert [type(p) for p in twin.parameters()] == [DeferredTensor] and twin["a"].weight.requires_grad
    assert isinstance(twin["a"].weight, nn.Parameter) and twin["a"].weight.note == ["user"]
    assert twin["a"].weight.note is not model["a"].weight.note
    nn.init.zeros_(twin["a"].weight)
    assert program_of(model["a"].weight).constant is None


def test_conversion_of_a_model_keeps_the_values_drawn():
    layer = declared(lambda: nn.Embedding(N, D, padding_idx=0))
    before, weight = rows_of(layer.weight), layer.weight
    assert layer.to("cpu").weight is weight
    layer.double()
    assert layer.weight is weight and weight.dtype == torch.float64 and weight.requires_grad
    assert torch.equal(rows_of(weight), before.double())
    with torch.no_grad():
        weight.div_(3.0)
    assert torch.equal(rows_of(weight), before.double() / 3.0)
    layer.float()
    assert torch.equal(rows_of(weight), (before.double() / 3.0).float())
    assert torch.equal(rows_of(layer.double().weight), (before.double() / 3.0).float().double())
    layer.float()
    assert "in float64" in program_of(weight).describe()
    with pytest.raises(DeferredInitError, match="float16"):
        layer.half()
    layer.to("meta")  # stands for any other device
    assert layer.weight.is_meta and torch.equal(rows_of(layer.weight), rows_of(weight))


def test_tensors_of_its_shape_are_constants_of_one_element():
    weight = declared(lambda: nn.Parameter(torch.randn(N, D)))
    for made, value in [
        (torch.zeros_like(weight), 0.0),
        (torch.ones_like(weight, dtype=torch.float64), 1.0),
        (torch.full_like(weight, 0.5, memory_format=torch.preserve_format), 0.5),
        (torch.full_like(input=weight, fill_value=3, dtype=torch.int64), 3),
        (torch.empty_like(weight), math.nan),
    ]:
        assert type(made) is torch.Tensor and made.shape == (N, D) and made.stride() == (0, 0)
        assert made.untyped_storage().nbytes() == made.element_size() and not made.requires_grad
        assert made[N - 1, 0] == value or math.isnan(value) and made.isnan().all()
    assert type(weight.new_zeros(3)) is torch.Tensor and type(weight.new_tensor([1.0])) is torch.Tensor
    assert isinstance(weight.new_empty((N, D)), DeferredTensor)
    with deferred_init():
        twin, state = nn.Parameter(torch.empty_like(weight)), torch.full_like(weight, 0.1)
        noise = torch.randn_like(weight) * 0.1
    nn.init.normal_(twin)
    assert program_of(twin).seed == program_of(weight).seed == 5
    assert program_of(state).constant == 0.1 and program_of(noise).describe().endswith("mul(0.1)")


@pytest.mark.parametrize(
    "optimizer",
    [
        "SGD",
        "Adagrad",
        "Adam",
        "AdamW",
        "RMSprop",
        "Adadelta",
        "NAdam",
        "RAdam",
        "SparseAdam",
        "LBFGS",
        "ASGD",
        "Rprop",
    ],
)
def test_optimizers_are_built_over_it(optimizer):
    layer = declared(lambda: nn.Embedding(N, D))
    built = getattr(torch.optim, optimizer)(layer.parameters(), lr=0.1)
    assert built.param_groups[0]["params"][0] is layer.weight
    assert all(
        state.untyped_storage().nbytes() <= 8
        for states in built.state.values()
        for state in states.values()
        if isinstance(state, torch.Tensor)
    )


def test_module_holds_it_like_any_parameter():
    with deferred_init(seed=0):
        module = nn.Module()
        module.bare = nn.Parameter(torch.randn(N, D))
        module.register_parameter("named", nn.Parameter(torch.empty(N, D)))
        module.tables = nn.ParameterList([torch.randn(N, D), nn.Parameter(torch.zeros(N, D))])
    assert [name for name, _ in module.named_parameters()] == ["bare", "named", "tables.0", "tables.1"]
    assert sum(p.numel() for p in module.parameters()) == 4 * N * D
    assert all(isinstance(value, DeferredTensor) for value in module.state_dict().values())
    module.requires_grad_(False).train().zero_grad()
    with pytest.raises(RuntimeError, match="AdaLoader|row by row"):
        module.load_state_dict({name: torch.zeros(N, D) for name, _ in module.named_parameters()})


# --- handing over ---


class Adopted(nn.Parameter):
    """What a loader would make of the parameter."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "handled"


def test_a_parameter_changes_class_and_keeps_its_identity():
    layer = declared(lambda: nn.Embedding(N, D))
    weight, program = layer.weight, program_of(layer.weight)
    optimizer = torch.optim.Adagrad(layer.parameters())
    weight.__class__ = Adopted
    assert layer.weight is weight is optimizer.param_groups[0]["params"][0] and weight in optimizer.state
    assert isinstance(weight, nn.Parameter) and weight.sum() == "handled"
    assert program_of(weight) is program and "_declaration" in weight.__dict__


def test_taking_over_closes_the_program():
    weight = declared(lambda: nn.Parameter(torch.randn(N, D)))
    view, row = weight.detach(), weight.data[3]
    assert take_over(weight) is program_of(weight)
    weight.__class__ = Adopted
    for change in (view.zero_, row.zero_, lambda: nn.init.trunc_normal_(view), lambda: view.copy_(0.0)):
        with pytest.raises(DeferredInitError, match="a loader manages the table"):
            change()
    with pytest.raises(DeferredInitError, match="a loader manages the table"):
        view.data = declared()
    assert program_of(weight).describe().endswith("normal(0.0, 1.0)")
    with pytest.raises(ValueError, match="no deferred table"):
        take_over(torch.empty(3))
    with pytest.raises(ValueError, match="no deferred table"):
        take_over(row)


def test_program_of_anything_else():
    weight = declared()
    assert program_of(weight[2:4]) is None and program_of(weight[2]) is None
    assert program_of(torch.empty(N, D)) is None and program_of(None) is None


# --- memory ---


def test_a_table_larger_than_memory_takes_none():
    program = """
        import copy, torch
        from torch import nn
        from adaloader.deferred.context import deferred_init, program_of
        import numpy as np

        ROWS = 33_762_588

        def resident_bytes():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096

        def build():
            with deferred_init(seed=1):
                model = nn.ModuleList([nn.Embedding(ROWS, 128, padding_idx=0), nn.EmbeddingBag(ROWS, 128)])
                model.bare = nn.Parameter(torch.randn(ROWS, 128) * 0.01)
            nn.init.trunc_normal_(model.bare)
            model = copy.deepcopy(model).to("cpu")
            optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
            optimizer.zero_grad()
            repr(model), repr(model.bare), model.state_dict(), torch.zeros_like(model.bare)
            out = np.empty((100, 128), np.float32)
            program_of(model.bare).fill(np.arange(100), out, seed=1, name="bare")
            return model, optimizer

        with deferred_init():
            warm = torch.optim.Adagrad([nn.Parameter(torch.randn(1000, 128))])
        program_of(warm.param_groups[0]["params"][0]).fill(
            np.arange(100), np.empty((100, 128), np.float32), seed=1, name=""
        )
        before = resident_bytes()
        kept = build()
        print(resident_bytes() - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 20e6
