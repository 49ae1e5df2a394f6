"""Third-party models under `AdaLoader(dataset, ...)` with shuffling and their libraries' collate functions."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from adaloader import AdaLoader, full_state_dict
from tests.models.zoo import as_tensor, difference


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def assert_same(
    make_model: Callable[[], nn.Module], dataset: Sequence, collate: Callable | None, loss_of: Callable, seed: int = 5
) -> None:
    """Train two epochs with `DataLoader` and with `AdaLoader`, shuffled, and compare losses, weights and coverage."""

    def train(managed: bool):
        torch.manual_seed(seed)
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        settings = {"batch_size": 6, "shuffle": True, "collate_fn": collate}
        if managed:
            loader = AdaLoader(dataset, model=model, optimizer=optimizer, min_rows=1, **settings)
        else:
            loader = DataLoader(dataset, **settings)
        losses, after_first = [], None
        for _ in range(2):
            for batch in loader:
                loss = loss_of(model, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                if managed and after_first is None:
                    after_first = loader.stats()
        if not managed:
            return losses, model.state_dict()
        counts, weights = loader.stats(), full_state_dict(model)
        assert counts["lookups"] > after_first["lookups"]
        assert counts["on_demand"] == after_first["on_demand"], "rows came on demand after the first step"
        loader.close()
        return losses, weights

    (losses, weights), (plain_losses, plain_weights) = train(True), train(False)
    assert difference(as_tensor(losses), as_tensor(plain_losses)) <= 1e-11
    assert weights.keys() == plain_weights.keys()
    for name, value in plain_weights.items():
        assert difference(weights[name], value) <= 1e-11, name


def test_deepctr_model_over_a_tensor_dataset():
    pytest.importorskip("deepctr_torch", reason="pip install '.[models]'")
    from tests.models.deepctr import click_columns, make_matrix, models

    columns = click_columns()
    torch.manual_seed(1)
    dataset = TensorDataset(make_matrix(columns, 44), (torch.rand(44, 1) < 0.3).double())

    def make_model() -> nn.Module:
        return models.DeepFM(columns, columns, (8, 4), l2_reg_embedding=0, l2_reg_linear=0, init_std=0.1)

    assert_same(make_model, dataset, None, lambda m, batch: functional.binary_cross_entropy(m(batch[0]), batch[1]))


def test_transformer_over_padded_encodings():
    transformers = pytest.importorskip("transformers", reason="pip install '.[models]'")
    from tests.models.language import ENCODER, VOCABULARY

    torch.manual_seed(2)
    lengths = torch.randint(2, 11, (40,)).tolist()
    dataset = [(torch.randint(3, VOCABULARY, (length,)), length % 3) for length in lengths]

    def collate(samples: list) -> object:
        ids = nn.utils.rnn.pad_sequence([ids for ids, _ in samples], batch_first=True)
        labels = torch.tensor([label for _, label in samples])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels})

    def make_model() -> nn.Module:
        return transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER))

    assert_same(make_model, dataset, collate, lambda model, batch: model(**batch).loss)


def test_graphs_over_their_own_collate_function():
    pytest.importorskip("torch_geometric", reason="pip install '.[models]'")
    from torch_geometric.data import Batch
    from torch_geometric.nn import GraphSAGE

    from tests.models.geometric import DIM, Convolved, molecule, squared_error

    torch.manual_seed(3)
    dataset = [molecule() for _ in range(31)]
    assert_same(lambda: Convolved(GraphSAGE(DIM, 8, 2, DIM)), dataset, Batch.from_data_list, squared_error)
