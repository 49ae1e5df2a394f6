"""`AdaLoader`: a `DataLoader` that reads ahead, so that every table row is here before the batch that needs it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from adaloader.explain import Explanation
from adaloader.model.trainers import Accelerated, check_accelerate, lightning_arguments
from adaloader.reading.batch_weights import own_weight, shared_weight
from adaloader.reading.loader_iterator import DRAWS, LoaderIterator
from adaloader.reading.lookahead import LookaheadIterator
from adaloader.reading.read_draws import ReadDraws
from adaloader.reading.sampling import GlobalBatchSampler, Shares
from adaloader.session import Session
from adaloader.settings import DEFAULT_MIN_ROWS, DEFAULT_TIMEOUT_SECONDS, Settings
from adaloader.wrapped_loader import WrappedLoader
from pm.asynchronous.eventual import DEFAULT_ROUNDS_PER_SECOND

Keys = str | None | Mapping[object, Callable[[Any], Any]]


# torchdata calls it when a loader is made, and PyTorch 2.13 says so on every rank; a user can do nothing about it.
warnings.filterwarnings("ignore", message="'set_vital' is deprecated")


class AdaLoader(StatefulDataLoader):
    """A `torch.utils.data.DataLoader` that also manages the embedding tables of a model (collective, with a model).

    Takes everything that `DataLoader` takes and, as torchdata's `StatefulDataLoader`, gives and takes `state_dict()`:
    the position of the last batch handed out. Without `model` it is just that. With it, the model's tables move into
    the parameter manager, batches are read ahead and the rows that they need are brought to this rank;
    `optimizer.step()` updates rows as it updates everything else. Under `mpirun` the ranks share each global batch, and
    results equal one process's.

    Args:
        dataset, batch_size, ...: as `DataLoader`; `batch_size` is per rank. Unless a sampler is given, batch t of N
            ranks is batch t of a plain loader with `batch_size=N*batch_size`, cut into N contiguous shares.
        model: the model to train, on the CPU or moved to a CUDA device before, not wrapped in DistributedDataParallel.
        optimizer: the optimizer, or several, over its parameters; None for a loader that only evaluates. Tables take
            torch.optim's SGD, Adagrad, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adadelta, SparseAdam (with
            sparse=True) and adaloader.RowwiseAdagrad; anything may train the rest of the model.
        lookahead: batches to read ahead of the loop (0: none), or "auto": as many as keep it from waiting for rows. By
            default 5, or with staleness 16.
        staleness: how many optimizer steps a rank's lookups may be behind the others' updates of tables: 0 (every
            lookup sees every step before it: exact), s, or None (no bound: a rank sees its own updates at once, others'
            as they arrive; all see the same when a pass over the loader is over).
        keys: "auto" derives which rows a batch needs by watching a step; a mapping from table (its name, parameter or
            module) to a function batch -> ids replaces that for the tables in it, and is called on another thread; None
            fetches all rows on demand.
        min_rows: embeddings with fewer rows stay dense parameters (on several ranks not those with `max_norm`); 1
            manages all.
        comm: an mpi4py communicator; by default MPI.COMM_WORLD under mpirun or srun, else this process is alone.
        batch_weight: function of a batch giving its weight in the average over ranks. For loaders whose ranks have
            batches of their own; by default each rank with a batch counts 1.
        timeout_seconds: how long to wait for another rank before an error names it.
        strategy: by name of a parameter, "managed" (a table, however few rows it has) or "dense" (an ordinary
            parameter). By default a table that is used as a whole, with its gradient, becomes dense by itself (on
            several ranks in its first step; later it stays managed, and each such use brings all of its rows).
        techniques: how rows come to the ranks that need them: "all" (a row moves to a rank while no other needs it, at
            staleness 0 where that saves bytes, and is copied to each that does otherwise), or for comparison
            "relocation" (rows move, and are copied only on demand), "replication" (they are copied from where they have
            always been) or "none" (fetched when they are looked up). With staleness 0 results are the same to the bit.
        update_threshold: with staleness: changes of copies that are smaller than this in every value are held back
            until they have added up to it, or a pass is over.
        max_rounds_per_second: with staleness: how often ranks exchange updates, at most.
        shared_memory: whether ranks of one machine read each other's rows in memory that they share, without a message,
            and with staleness update them there too (if all ranks are on it, and the optimizer is SGD, Adagrad or
            RowwiseAdagrad); False treats each rank as a machine of its own, as to see what crosses a network, and a
            number (2 or more) each so many ranks of a machine, in turn.
        device_cache_bytes: for models on a CUDA device, on one process: memory there for rows that the batches ahead
            need, with their optimizer state, which are then looked up and updated on the device; None takes a quarter
            of what is free when the loader is built, 0 none (rows are copied there for each batch, as they are on
            several ranks, and of tables whose optimizer moves rows without gradient). A batch whose rows have no room
            is an error that says how many bytes it needs.
        record: path of a file to which each rank adds what it intends and how rows come and go there, one JSON object
            per line: `moves.jsonl` is `moves-0.jsonl` on rank 0. What is in the file stays. A later loader of the model
            leaves it out, or gives the same.

    Raises:
        OSError: if a rank cannot write its file of `record`; on every rank.
        ValueError: for arguments out of range, a table on a device of another kind, an optimizer that does not hold a
            table, ranks that differ, or settings other than those of the model's first loader.
        UnsupportedOptimizerError: if a table's optimizer is not supported.
        TypeError: if `batch_weight` is no function, or `comm` no communicator of mpi4py.
        RuntimeError: under mpirun without mpi4py; on several ranks, if the model's last loader was closed before.
    """

    _session: Session | None = None
    _saved_arguments: tuple | None = None

    def __init__(
        self,
        dataset,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler=None,
        batch_sampler=None,
        num_workers: int = 0,
        collate_fn=None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn=None,
        multiprocessing_context=None,
        generator=None,
        *,
        model: nn.Module | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        lookahead: int | str | None = None,
        staleness: int | None = 0,
        keys: Keys = "auto",
        min_rows: int = DEFAULT_MIN_ROWS,
        comm=None,
        batch_weight: Callable[[Any], float] | None = None,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        strategy: Mapping[str, str] | None = None,
        techniques: str = "all",
        update_threshold: float | None = None,
        max_rounds_per_second: float = DEFAULT_ROUNDS_PER_SECOND,
        shared_memory: bool | int = True,
        device_cache_bytes: int | None = None,
        record: str | os.PathLike | None = None,
        **kwargs,
    ):
        orders = (
            model is not None and sampler is None and batch_sampler is None and not isinstance(dataset, IterableDataset)
        )
        super().__init__(
            dataset,
            batch_size,
            False if orders else shuffle,  # our own sampler follows; torchdata's draws a seed when it is made
            sampler,
            batch_sampler,
            num_workers,
            collate_fn,
            pin_memory,
            drop_last,
            timeout,
            worker_init_fn,
            multiprocessing_context,
            generator,
            **kwargs,
        )
        self._session: Session | None = None
        self._read_draws = ReadDraws()
        self._place = None
        self._accelerated: Accelerated | None = None
        settings = Settings(
            lookahead,
            staleness,
            keys,
            min_rows,
            comm,
            batch_weight,
            timeout_seconds,
            strategy,
            techniques,
            update_threshold,
            max_rounds_per_second,
            shared_memory,
            device_cache_bytes,
            record,
        )
        if model is None:
            _refuse_model_keywords(
                optimizer=optimizer, batch_weight=batch_weight, comm=comm, strategy=strategy, record=record
            )
            return
        self._shuffles_or_generates = orders and (bool(shuffle) or generator is not None)
        order = "batches of the rank's own"
        if orders:
            order = f"{len(dataset)} samples, {batch_size=}, {drop_last=}, random={self._shuffles_or_generates}"
        self._session = Session(model, optimizer, settings, order)
        self._ordered: GlobalBatchSampler | None = None
        if orders:
            self._ordered = GlobalBatchSampler(
                dataset,
                batch_size,
                shuffle=bool(shuffle),
                drop_last=drop_last,
                generator=generator,
                rank=self._session.rank,
                ranks=self._session.ranks,
                plain_lead=self.num_workers * (self.prefetch_factor or 0),
            )
            # DataLoader forbids these assignments after construction, and this is still part of it.
            object.__setattr__(self, "batch_sampler" if batch_size is not None else "sampler", self._ordered)
            if batch_size is not None:
                object.__setattr__(self, "sampler", self._ordered.sampler)

    @classmethod
    def wrap(
        cls,
        iterable: Iterable,
        *,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        lookahead: int | str | None = None,
        staleness: int | None = 0,
        keys: Keys = "auto",
        min_rows: int = DEFAULT_MIN_ROWS,
        comm=None,
        batch_weight: Callable[[Any], float] | None = None,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        strategy: Mapping[str, str] | None = None,
        techniques: str = "all",
        update_threshold: float | None = None,
        max_rounds_per_second: float = DEFAULT_ROUNDS_PER_SECOND,
        shared_memory: bool | int = True,
        device_cache_bytes: int | None = None,
        record: str | os.PathLike | None = None,
    ) -> WrappedLoader:
        """Return a loader over any re-iterable of batches (a list, a PyG loader, torchdata nodes), which are this
        rank's own.

        Collective. Keywords and errors as for `AdaLoader`. A rank that runs out of batches first contributes zero
        until the others have finished theirs.

        Raises:
            TypeError: if `iterable` cannot be iterated again and again (an iterator, a generator).
        """
        settings = Settings(
            lookahead,
            staleness,
            keys,
            min_rows,
            comm,
            batch_weight,
            timeout_seconds,
            strategy,
            techniques,
            update_threshold,
            max_rounds_per_second,
            shared_memory,
            device_cache_bytes,
            record,
        )
        return WrappedLoader(iterable, model, optimizer, settings)

    def __len__(self) -> int:
        """Return the batches of a pass; where ranks share each batch, the same on all, though some may get one less."""
        ordered = self._ordered if self._session is not None else None
        return super().__len__() if ordered is None else ordered.global_batches

    def __iter__(self) -> Iterator:
        session = self._session
        if session is None:
            return super().__iter__()
        session.begin_iteration()
        accelerated, lookahead = self._accelerated, session.lookahead
        if accelerated is not None:
            lookahead = lookahead or 1  # it asks whether a batch is the last
            accelerated.begin(self)
        if self._shuffles_or_generates:
            session.share_random_state(self.generator)
        inner = super().__iter__()
        epoch = None if self._ordered is None else self._ordered.epoch
        weight = session.settings.batch_weight
        if epoch is None:
            uneven, last_weight, weight_of = True, None, own_weight(weight, None)
            has_last = False
        else:
            has_last = epoch.shares.rank_batches == epoch.shares.global_batches
            uneven, last_weight = _last_batch(epoch.shares)
            weight_of = shared_weight(epoch.shares, weight)
        passed = session.iteration(
            weight_of,
            start=inner._num_yielded,
            uneven=uneven,
            last_weight=None if weight is not None else last_weight,
            end=epoch.shares.global_batches if has_last else None,
            shares=epoch is not None,
        )

        draws = self._read_draws
        read_first = draws.begin(inner, inner._num_yielded)

        def on_yield(number: int, batch: Any) -> None:
            draws.handed_out(number)
            passed.on_yield(number, batch)

        def on_end(reason: str) -> None:
            if accelerated is not None and reason == "exhausted":
                accelerated.end(self)
            passed.on_end(reason)

        iterator = LookaheadIterator(
            session.watched(inner),
            lookahead,
            snapshot=inner.state_dict,
            on_read=passed.on_read,
            on_yield=on_yield,
            on_end=on_end,
            start=inner._num_yielded,
        )
        self._place = iterator.place
        passed.place = iterator.place if epoch is None else None
        return LoaderIterator(self, iterator, passed, epoch, read_first)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the last batch handed out, in torchdata's form (and `random_ids`' pass)."""
        if self._place is None or self._place.state is None:
            state = super().state_dict()
        else:
            state = self._place.state
        draws = None if self._session is None else self._session.draws.state()
        return state if draws is None else {**state, DRAWS: draws}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have the next iteration begin where `state_dict` was taken."""
        self._place = None
        self._read_draws.resume(None)
        if DRAWS in state_dict:
            state_dict = dict(state_dict)
            draws = state_dict.pop(DRAWS)
            if self._session is not None:
                self._session.draws.load_state(draws)
        super().load_state_dict(state_dict)

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which `backward()` does not sum dense gradients over ranks, as DistributedDataParallel's.

        For loops that accumulate: the first backward outside, or else `optimizer.step()`, sums all that was gathered,
        each batch by its own weight; results are those without it. Enter it on all ranks. Until then `.grad` of dense
        parameters is this rank's own, and the gradients of tables cannot be read or clipped. Where `batch_weight` is
        given, or ranks have batches of their own, the weights' sum must be asked for, and gradients are summed all the
        same.

        Raises:
            RuntimeError: if this loader was built without `model`.
        """
        return self._need_session().no_sync()

    def checkpoint(
        self,
        folder: str | os.PathLike | None = None,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        keep: int = 2,
        extra: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        signals: bool = True,
        asynchronous: bool = False,
    ) -> None:
        """Have this loader make checkpoints by itself, where its loop asks for the next batch (collective).

        Each is a folder `step-...` in `folder`; `adaloader.load(folder, loader)` takes the newest complete one.
        SIGTERM, SIGUSR1 and Ctrl-C then end the run with code 0 and a checkpoint where the loop asks for its next
        batch; if it asks for none any more, `close()` does what they did before. A second Ctrl-C ends the run at once.
        A checkpoint that cannot be written (a full disk) is said, and the run goes on.

        Args:
            folder: by default `checkpoints` in the run folder of `python -m adaloader run`, or here.
            every_steps: optimizer steps from one to the next; None: not by steps.
            every_minutes: minutes from one to the next; None: not by time.
            keep: how many complete ones stay.
            extra: what `adaloader.save` takes as `extra`, or a function that returns it at the time.
            signals: False to leave signals as they are.
            asynchronous: whether training goes on while they are written, as in `adaloader.save`; the last one, which a
                signal asks for, is waited for.

        Raises:
            ValueError: for arguments out of range, or where a loader of the model makes checkpoints already.
            RuntimeError: if this loader was built without `model`.
        """
        self._need_session().begin_checkpoints(
            self,
            folder,
            every_steps=every_steps,
            every_minutes=every_minutes,
            keep=keep,
            extra=extra,
            signals=signals,
            asynchronous=asynchronous,
        )

    # What accelerate asks of a loader, see `trainers.py`

    @property
    def _is_accelerate_prepared(self) -> bool:
        """Whether `accelerator.prepare` is to leave this loader as it is: its wrapper would not read ahead."""
        if self._session is None or "accelerate" not in sys.modules:
            return False
        check_accelerate(self._session.ranks)
        if self._accelerated is None:
            self._accelerated = Accelerated()
        return True

    @_is_accelerate_prepared.setter
    def _is_accelerate_prepared(self, value: bool) -> None:
        """accelerate notes that it has prepared it."""

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the batch handed out last is the last of its pass; known for sure once accelerate has prepared it."""
        return self._place is not None and self._place.yielded == self._place.end

    remainder = -1
    """accelerate has added no samples to the last batch."""

    def stats(self) -> dict[str, Any]:
        """Return what the model's tables have cost so far; see `adaloader.stats.stats`.

        Raises:
            RuntimeError: if this loader was built without `model`.
        """
        return self._need_session().stats()

    def explain(self) -> Explanation:
        """Return what is known of each table: print it, or take its `tables`, or its `to_json()`.

        Raises:
            RuntimeError: if this loader was built without `model`.
        """
        return self._need_session().explain()

    def close(self) -> None:
        """End this loader (and, with the last one of its model, this rank's part in the manager: of several ranks none
        can build another loader of the model then)."""
        if self._session is not None:
            self._session.close()

    def __reduce_ex__(self, protocol):
        if self._session is not None:
            raise TypeError(
                "an AdaLoader cannot be copied or pickled: it has threads and the rows of its model's tables. Keep it "
                "out of what is copied (an attribute of a module, a dataset), and build another where one is needed"
            )
        return super().__reduce_ex__(protocol)

    def _need_session(self) -> Session:
        if self._session is None:
            raise RuntimeError("this AdaLoader was built without model=, so it manages no tables")
        return self._session


setattr(AdaLoader, "__pl_saved_args", lightning_arguments)  # a name that Python would change within the class


def _last_batch(shares: Shares) -> tuple[bool, float | None]:
    """Return whether some ranks have no share of the last batch, and how many samples it has."""
    last = shares.global_batches - 1
    if last < shares.first_number:
        return False, None
    samples = shares.share(last)[1]
    return samples < shares.ranks, float(samples)


def _refuse_model_keywords(**keywords) -> None:
    given = [name for name, value in keywords.items() if value is not None]
    if given:
        raise ValueError(f"AdaLoader got {', '.join(given)} but no model: pass model= too")
