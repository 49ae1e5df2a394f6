"""Where a loader is: the position of the last batch handed out, for the same ranks or for others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaloader.loader import AdaLoader
from adaloader.wrapped_loader import WrappedLoader

ORDERED, OWN = "shared batches", "batches of each rank's own"


def describe_loader(loader: AdaLoader | WrappedLoader) -> dict[str, Any]:
    """Return what of a loader decides whether a rank can go on from its own position."""
    if isinstance(loader, AdaLoader) and loader._ordered is not None:
        return {
            "kind": ORDERED,
            "batch_size": loader._ordered.batch_size,
            "num_workers": loader.num_workers,
            "snapshot_every_n_steps": loader.snapshot_every_n_steps,
        }
    return {"kind": OWN}


def position_of(loader: AdaLoader | WrappedLoader, before: tuple[int, Any] | None = None) -> dict[str, Any] | None:
    """Return where a loader is; None before its first pass.

    `before`: batches handed out, and the source's state, at a position of the present pass that is wanted instead.
    """
    if isinstance(loader, WrappedLoader):
        if before is not None:
            return {
                "state": {"yielded": before[0], "ended": False, "source": before[1]},
                "ended": False,
                "order": None,
            }
        if loader._position is None and loader._resume is None:
            return None
        state = {name: value for name, value in loader.state_dict().items() if not name.startswith("_")}
        return {"state": state, "ended": bool(state["ended"]), "order": None}
    place = loader._place
    state = loader.next_iter_state if place is None or place.state is None else place.state
    state = state if before is None else before[1]
    if state is None:
        resume = None if loader._ordered is None else loader._ordered._resume
        return None if resume is None else {"state": None, "ended": False, "order": resume}
    order = None if loader._ordered is None else _order_in(state)
    return {"state": state, "ended": bool(state.get("_iterator_finished")), "order": order}


def read_ahead_of(
    loader: AdaLoader | WrappedLoader, before: tuple[int, Any] | None = None
) -> list[dict[str, Any] | None] | None:
    """Return what `ReadDraws.ahead` does at the position that `position_of` returns."""
    if isinstance(loader, WrappedLoader):
        return None
    yielded = 0 if loader._place is None else loader._place.yielded
    return loader._read_draws.ahead(yielded if before is None else before[0])


def read_again(loader: AdaLoader | WrappedLoader, states: list[dict[str, Any] | None] | None) -> None:
    """Have the next pass, the rest of one, begin with reads from these states; None: from those that there are."""
    if isinstance(loader, AdaLoader):
        loader._read_draws.resume(states)


def go_on_from(
    loader: AdaLoader | WrappedLoader, position: Mapping[str, Any] | None, saved: Mapping[str, Any], same_ranks: bool
) -> bool:
    """Have the next pass begin where `position` was taken; return whether it is the rest of one that had begun.

    Args:
        loader: the loader.
        position: of this rank; where the ranks are others than those that saved, of rank 0.
        saved: `describe_loader` of the loader that was saved.
        same_ranks: whether this rank is one of as many as those that saved.

    Raises:
        ValueError: if it cannot, saying why.
    """
    if position is None:
        return False
    mine = describe_loader(loader)
    if mine["kind"] != saved.get("kind"):
        raise ValueError(
            f"the position is one in {saved.get('kind')}, and this loader has {mine['kind']}: build the loader as it "
            "was built"
        )
    is_stateful = _is_stateful(position["state"])
    if position["ended"] and not is_stateful:
        _begin_anew(loader)
        return False
    if same_ranks and mine == dict(saved) and position["state"] is not None:
        loader.load_state_dict(position["state"])
        return not position["ended"]
    if position["order"] is None:
        raise ValueError(
            "the position is that of each rank's own batches, which cannot be shared out over another number of "
            "ranks: go on with as many, or load with strict=False and begin a new pass"
        )
    _begin_anew(loader)
    if position["ended"]:
        return False
    loader._ordered.go_on_from(dict(position["order"]))
    return True


def _begin_anew(loader: AdaLoader | WrappedLoader) -> None:
    if isinstance(loader, WrappedLoader):
        loader._position = loader._resume = None
        return
    loader._place = None
    loader.next_iter_state = None
    if loader._ordered is not None:
        loader._ordered._resume = None


def _order_in(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the state of the sample order in a state of torchdata's."""
    inner = state.get("_snapshot", {}).get("_main_snapshot", state)
    return inner.get("_sampler_iter_state")


def _is_stateful(state: Any) -> bool:
    """Whether a dataset, sampler or source has a state of its own in there: it may count beyond the pass."""
    if not isinstance(state, Mapping):
        return False
    if state.get("source") is not None:
        return True
    if "_sampler_iter_state" in state or "_index_sampler_state" in state:
        order = state.get("_sampler_iter_state")
        own = isinstance(order, Mapping) and "generator_state" in order and "samples" in order
        if (order is not None and not own) or state.get("_index_sampler_state") is not None:
            return True
    if state.get("dataset_state") is not None or state.get("fetcher_state") is not None:
        return True
    return any(_is_stateful(each) for each in state.values() if isinstance(each, Mapping))
