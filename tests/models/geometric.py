"""Models of PyTorch Geometric that hold tables, and its convolutions over learned node embeddings.

Batches are what the library's own loaders give: triplets, walks, graphs joined to one (`Batch`), interaction lists.
Models whose layers need its compiled extensions (Node2Vec, DimeNet, GNNFF, ViSNet) are not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional
from torch_geometric.data import Data
from torch_geometric.graphgym.models.encoder import IntegerFeatureEncoder
from torch_geometric.loader import DataLoader
from torch_geometric.nn import (
    GAT,
    GCN,
    GIN,
    ComplEx,
    DistMult,
    GraphSAGE,
    HEATConv,
    LightGCN,
    MaskLabel,
    MetaPath2Vec,
    RENet,
    RotatE,
    SchNet,
    TransE,
    global_mean_pool,
)

from tests.models.zoo import Case, all_tables

NODES, RELATIONS, DIM = 60, 7, 6
RANDOM_NEGATIVES = "random negatives are drawn in the forward pass: their rows come on demand"


def triplets(model: nn.Module) -> Iterable:
    torch.manual_seed(3)
    heads, tails = torch.randint(0, NODES, (2, 70))
    return model.loader(heads, torch.randint(0, RELATIONS, (70,)), tails, batch_size=16, shuffle=True)


def knowledge_graph_case(model_class: type, **options) -> Case:
    return Case(
        "torch_geometric",
        model_class.__name__ + (", sparse" if options.get("sparse") else ""),
        lambda: model_class(NODES, RELATIONS, DIM, **options),
        triplets,
        lambda model, batch: model.loss(*batch),
        coverage=0.5,
        note=RANDOM_NEGATIVES,
    )


def light_gcn(penalty: float) -> Case:
    def batches(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(5)
        return [torch.randint(0, NODES, (3, size)) for size in (20, 20, 20, 11)]

    def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        users, liked, others = batch
        ranks = model(edges, torch.cat([torch.stack([users, liked]), torch.stack([users, others])], 1))
        liked_rank, others_rank = ranks.chunk(2)
        return model.recommendation_loss(liked_rank, others_rank, node_id=batch.unique(), lambda_reg=penalty)

    edges = torch.randint(0, NODES, (2, 200), generator=torch.Generator().manual_seed(1))
    return Case(
        "torch_geometric",
        "LightGCN" + (", regularised" if penalty else ""),
        lambda: LightGCN(NODES, DIM, num_layers=2),
        batches,
        loss_of,
        dense_of=all_tables,
        note="each step convolves the whole table over the graph",
    )


def walks() -> Case:
    def make_model() -> nn.Module:
        generator = torch.Generator().manual_seed(2)
        edges = torch.stack([torch.arange(200) % 20, torch.randint(0, 15, (200,), generator=generator)])
        path = [("author", "writes", "paper"), ("paper", "written_by", "author")]
        return MetaPath2Vec({path[0]: edges, path[1]: edges.flip(0)}, DIM, path, walk_length=4, context_size=3)

    return Case(
        "torch_geometric",
        "MetaPath2Vec",
        make_model,
        lambda model: model.loader(batch_size=8, shuffle=True),
        lambda model, batch: model.loss(*batch),
    )


def graphs(make: Callable[[], Data], **options) -> Callable[[nn.Module], Iterable]:
    """Return a maker of loaders of graphs joined to batches."""

    def make_batches(model: nn.Module) -> Iterable:
        torch.manual_seed(4)
        return DataLoader([make() for _ in range(22)], batch_size=5, shuffle=True, **options)

    return make_batches


def molecule() -> Data:
    """A random graph of 3 to 8 nodes, whose features are ids."""
    size = int(torch.randint(3, 9, ()))
    edges = torch.randint(0, size, (2, 3 * size))
    return Data(
        x=torch.randint(0, NODES, (size, 2)),
        z=torch.randint(1, 40, (size,)),
        pos=torch.randn(size, 3),
        edge_index=edges,
        edge_type=torch.randint(0, RELATIONS, (3 * size,)),
        edge_attr=torch.rand(3 * size, 2),
        node_type=torch.randint(0, 3, (size,)),
        y=torch.randn(1),
    )


class Convolved(nn.Module):
    """One of the library's graph networks over a table of node embeddings."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.embedding = nn.Embedding(NODES, DIM)
        self.network = network
        self.head = nn.Linear(DIM, 1)

    def forward(self, data: Data) -> torch.Tensor:
        features = self.embedding(data.x).sum(1)
        return self.head(global_mean_pool(self.network(features, data.edge_index), data.batch)).squeeze(1)


class Encoded(nn.Module):
    """GraphGym's encoder, which writes the embeddings into the batch."""

    def __init__(self):
        super().__init__()
        self.encoder = IntegerFeatureEncoder(DIM, NODES)
        self.head = nn.Linear(DIM, 1)

    def forward(self, data: Data) -> torch.Tensor:
        data = self.encoder(data.clone())
        return self.head(global_mean_pool(data.x, data.batch)).squeeze(1)


class Typed(nn.Module):
    """HEATConv: tables of edge types, and node types that choose a linear layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(NODES, DIM)
        self.conv = HEATConv(DIM, 4, 3, RELATIONS, 3, 2, 3)
        self.head = nn.Linear(4, 1)

    def forward(self, data: Data) -> torch.Tensor:
        features = self.embedding(data.x[:, 0])
        out = self.conv(features, data.edge_index, data.node_type, data.edge_type, data.edge_attr)
        return self.head(global_mean_pool(out, data.batch)).squeeze(1)


class Masked(nn.Module):
    """MaskLabel: the labels of some nodes are features of the others, chosen by a mask of the batch."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(NODES, DIM)
        self.labels = MaskLabel(40, DIM)
        self.head = nn.Linear(DIM, 1)

    def forward(self, data: Data) -> torch.Tensor:
        features = self.labels(self.embedding(data.x[:, 0]), data.z, data.node_type > 0)
        return self.head(global_mean_pool(features, data.batch)).squeeze(1)


def squared_error(model: nn.Module, data: Data) -> torch.Tensor:
    return functional.mse_loss(model(data), data.y)


def all_pairs(positions: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SchNet's option for who interacts with whom: all atoms of a molecule."""
    edges = (batch[:, None] == batch[None, :]).fill_diagonal_(False).nonzero().t()
    return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=-1)


def event() -> Data:
    """An event of RE-Net, with histories of its subject and object of any length, perhaps none."""

    def history() -> tuple[torch.Tensor, torch.Tensor]:
        length = int(torch.randint(0, 5, ()))
        return torch.randint(0, NODES, (length,)), torch.randint(0, 3, (length,)).sort().values

    (h_sub, h_sub_t), (h_obj, h_obj_t) = history(), history()
    sub, obj = torch.randint(0, NODES, (2,)).tolist()
    rel = int(torch.randint(0, RELATIONS, ()))
    return Data(sub=sub, rel=rel, obj=obj, h_sub=h_sub, h_sub_t=h_sub_t, h_obj=h_obj, h_obj_t=h_obj_t, num_nodes=1)


def events_loss(model: nn.Module, data: Data) -> torch.Tensor:
    objects, subjects = model(data)
    return functional.nll_loss(objects, data.obj) + functional.nll_loss(subjects, data.sub)


def graph_case(name: str, make_model: Callable[[], nn.Module], loss_of=squared_error, **options) -> Case:
    return Case("torch_geometric", name, make_model, graphs(molecule), loss_of, **options)


CASES = [
    *(knowledge_graph_case(model_class) for model_class in (TransE, ComplEx, DistMult, RotatE)),
    knowledge_graph_case(TransE, sparse=True),
    light_gcn(0.0),
    light_gcn(1e-2),
    walks(),
    graph_case("GCN over embeddings", lambda: Convolved(GCN(DIM, 8, 2, DIM, dropout=0.1))),
    graph_case("GraphSAGE over embeddings", lambda: Convolved(GraphSAGE(DIM, 8, 2, DIM))),
    graph_case("GAT over embeddings", lambda: Convolved(GAT(DIM, 8, 2, DIM))),
    graph_case("GIN over embeddings", lambda: Convolved(GIN(DIM, 8, 2, DIM))),
    graph_case("GraphGym's IntegerFeatureEncoder", Encoded),
    graph_case("HEATConv", Typed),
    graph_case("MaskLabel", Masked),
    graph_case(
        "SchNet",
        lambda: SchNet(8, 8, 2, 5, interaction_graph=all_pairs),
        lambda model, data: functional.mse_loss(model(data.z, data.pos, data.batch).squeeze(1), data.y),
    ),
    Case(
        "torch_geometric",
        "RE-Net",
        lambda: RENet(NODES, RELATIONS, DIM, seq_len=3),
        graphs(event, follow_batch=["h_sub", "h_obj"]),
        events_loss,
        note="its tables are bare parameters",
    ),
]
