"""`torch.compile`: lookups are graph breaks, results are plain PyTorch's, and keys are derived as ever."""

import gc
import subprocess
import sys

import pytest
import torch
from torch import nn

from adaloader import AdaLoader
from tests.adaloader.against_plain import assert_same_as_plain, run_plain


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(50, 4)
        self.bags = nn.EmbeddingBag(40, 4, mode="mean")
        self.bare = nn.Parameter(torch.randn(30, 4))
        self.head = nn.Linear(12, 1)

    def forward(self, ids):
        ids = (ids * 7 + 3) % 50
        parts = [self.items(ids).sum(1), self.bags(ids % 40), self.bare[ids[:, 0] % 30]]
        return self.head(torch.cat(parts, 1)).relu().square().mean()


def make_batches(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (6, 3), generator=generator) for _ in range(8)]


def adagrad(parameters):
    return torch.optim.Adagrad(parameters, lr=0.1)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_model(backend):
    def loop(model, optimizer, loader):
        compiled = torch.compile(model, backend=backend)
        for ids in loader:
            loss = compiled(ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss

    return loop


def compiled_step(backend):
    def loop(model, optimizer, loader):
        @torch.compile(backend=backend)
        def step(ids):
            loss = model(ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        for ids in loader:
            yield step(ids).detach()

    return loop


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("what", [compiled_model, compiled_step])
def test_compiled_code_gives_what_plain_pytorch_gives(seed, what, backend, recwarn):
    batches = make_batches(seed)
    outcome = assert_same_as_plain(Model, adagrad, batches, what(backend))
    assert outcome.stats["intent_coverage"] > 0.8  # all but the first of eight, which was watched
    assert [str(w.message) for w in recwarn if "Dynamo" in str(w.message)] == []


def test_compiled_code_is_not_compiled_again_when_another_model_is_freed(seed):
    """Dynamo traces the optimizer's hooks, ours among them: it is to guard nothing that other models change."""
    batches = make_batches(seed)
    other = Model()
    AdaLoader.wrap(batches, model=other, optimizer=adagrad(other.parameters()), min_rows=1).close()
    others = [other]
    del other

    def with_another(batches):
        yield from batches[:4]
        others.clear()
        gc.collect()
        with torch._dynamo.config.patch(error_on_recompile=True):
            yield from batches[4:]

    run_plain(Model, adagrad, with_another(batches), compiled_step("eager"))


def test_compiled_code_is_compiled_again_after_a_watched_step(seed):
    """What a backend is given tells: nothing in the first step, the same number of graphs as ever later."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = Model()
    optimizer = adagrad(model.parameters())
    loader = AdaLoader.wrap(make_batches(seed), model=model, optimizer=optimizer, min_rows=1)
    compiled = torch.compile(model, backend=backend)
    counts = []
    for ids in loader:
        compiled(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(len(graphs))
    loader.close()
    assert counts[0] == 0 < counts[1] == counts[-1]


def test_the_compiler_is_not_imported_for_those_who_do_not_use_it():
    program = "import sys, adaloader, torch; print('torch._dynamo' in sys.modules, 'sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
