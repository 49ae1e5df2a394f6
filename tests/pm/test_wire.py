"""Only typed buffers travel: no room imports pickle, or calls the methods of a communicator that use it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for room in ("pm", "adaloader", "intents", "cuda_ops") for path in (ROOT / room).rglob("*.py"))
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
# mpi4py's lower-case methods send any object by pickling it; torch.distributed's object collectives do so too.
BY_PICKLE = {"send", "isend", "ssend", "issend", "bsend", "recv", "irecv", "sendrecv", "bcast", "gather", "scatter"}
BY_PICKLE |= {"allgather", "alltoall", "reduce", "allreduce", "scan", "exscan", "mprobe", "improbe", "probe", "iprobe"}
OBJECT_COLLECTIVES = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}


def offences(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in PICKLERS else []
        elif isinstance(node, ast.Attribute):
            of_comm = "comm" in ast.unparse(node.value).lower().split(".")[-1]
            if (of_comm and node.attr in BY_PICKLE) or node.attr in OBJECT_COLLECTIVES:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_pickled(path):
    assert offences(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import dumps",
        "self._comm.bcast(x)",
        "comm.allreduce(1)",
        "dist.all_gather_object(a, b)",
    ],
)
def test_an_offence_would_be_found(source):
    assert offences(ast.parse(source))


def test_arrows_point_down():
    """pm imports `intents` and `cuda_ops` of ours, and `cuda_ops` nothing."""
    allowed = {"pm": {"intents", "cuda_ops", "pm"}, "cuda_ops": {"cuda_ops"}, "intents": {"cuda_ops", "intents"}}
    ours = {"adaloader", "pm", "intents", "cuda_ops"}
    for path in FILES:
        room = path.relative_to(ROOT).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            rooms = {name.split(".")[0] for name in names} & ours
            assert rooms <= allowed.get(room, ours), f"{path.relative_to(ROOT)} imports {rooms}"
