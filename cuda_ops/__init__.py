"""Kernels: every hot function of the project once by name, with the body chosen by where its arrays are.

The functions here work on plain arrays (NumPy arrays, or torch tensors, whose memory is shared and never
copied) and know nothing of tables, ranks or batches. CPU bodies are Numba functions in `cuda_ops/cpu`,
compiled when first called and kept on disk, and run without the interpreter's lock. The room imports NumPy,
Numba and torch, and nothing of ours. Read `dispatch.py` first, then `cpu/rows.py`, which says how records lie
in memory.
"""

from cuda_ops.cpu import advance as _advance
from cuda_ops.cpu import alias as _alias
from cuda_ops.cpu import bags as _bags
from cuda_ops.cpu import compress as _compress
from cuda_ops.cpu import dedup as _dedup
from cuda_ops.cpu import delta as _delta
from cuda_ops.cpu import half_update as _half_update
from cuda_ops.cpu import holds as _holds
from cuda_ops.cpu import ownership as _ownership
from cuda_ops.cpu import partition as _partition
from cuda_ops.cpu import places as _places
from cuda_ops.cpu import refreshes as _refreshes
from cuda_ops.cpu import renorm as _renorm
from cuda_ops.cpu import rows as _rows
from cuda_ops.cpu import schedule as _schedule
from cuda_ops.cpu import segment as _segment
from cuda_ops.cpu import segments as _segments
from cuda_ops.cpu import shared as _shared
from cuda_ops.cpu import sparse_update as _sparse_update
from cuda_ops.cpu import steps as _steps
from cuda_ops.cpu import update as _update
from cuda_ops.cpu.advance import caught_up_word, history_columns
from cuda_ops.cpu.by_row import ELSEWHERE, slots_by_row
from cuda_ops.cpu.dedup import DedupScratch
from cuda_ops.cpu.index import KeyIndex
from cuda_ops.cpu.same import same_ids
from cuda_ops.cpu.shared_index import ABSENT, BEING_MADE, SharedIndex
from cuda_ops.dispatch import by_device
from cuda_ops.trust import trusted

dedup = by_device(_dedup.dedup)
dedup_counts = by_device(_dedup.dedup_counts)
gather = by_device(_rows.gather)
scatter = by_device(_rows.scatter)
expand = by_device(_segment.expand)
segment_sum = by_device(_segment.segment_sum)
segment_count = by_device(_segment.segment_count)
reduce_bags = by_device(_bags.reduce_bags)
bags_backward = by_device(_bags.bags_backward)
keys_of_segments = by_device(_segments.keys_of_segments)
sum_segments = by_device(_segments.sum_segments)
sgd_update = by_device(_update.sgd_update)
adagrad_update = by_device(_update.adagrad_update)
sparse_adam_update = by_device(_sparse_update.sparse_adam_update)
rowwise_adagrad_update = by_device(_sparse_update.rowwise_adagrad_update)
sgd_update_shared = _shared.sgd_update_shared
adagrad_update_shared = _shared.adagrad_update_shared
rowwise_adagrad_update_shared = _shared.rowwise_adagrad_update_shared
store_word = _shared.store_word
exchange_word = _shared.exchange_word
add_to_word = _shared.add_to_word
all_reached = _shared.all_reached
half_sgd_update = by_device(_half_update.half_sgd_update)
half_adagrad_update = by_device(_half_update.half_adagrad_update)
half_sparse_adam_update = by_device(_half_update.half_sparse_adam_update)
half_rowwise_adagrad_update = by_device(_half_update.half_rowwise_adagrad_update)
widen_rows = by_device(_half_update.widen_rows)
narrow_rows = by_device(_half_update.narrow_rows)
advance = by_device(_advance.advance)
moved_places = by_device(_places.moved_places)
add_uses = by_device(_places.add_uses)
gather_places = by_device(_places.gather_places)
find_places = by_device(_places.find_places)
put_places = by_device(_places.put_places)
take_places = by_device(_places.take_places)
take_over = _ownership.take_over
give_up = _ownership.give_up
mark_behind = _refreshes.mark_behind
take_behind = _refreshes.take_behind
alias_table = by_device(_alias.alias_table)
note_touches = by_device(_schedule.note_touches)
select_due = by_device(_schedule.select_due)
add_holds = by_device(_holds.add_holds)
begin_holds = by_device(_holds.begin_holds)
held_by_one = by_device(_holds.held_by_one)
has_count = by_device(_holds.has_count)
select_moves = by_device(_holds.select_moves)
compress = by_device(_compress.compress)
owners = by_device(_partition.owners)
partition = by_device(_partition.partition)
renorm = by_device(_renorm.renorm)
delta = by_device(_delta.delta)
merge = by_device(_delta.merge)
last_steps = by_device(_steps.last_steps)
mark_steps = by_device(_steps.mark_steps)

__all__ = [
    "ABSENT",
    "BEING_MADE",
    "DedupScratch",
    "ELSEWHERE",
    "KeyIndex",
    "SharedIndex",
    "adagrad_update",
    "adagrad_update_shared",
    "add_holds",
    "begin_holds",
    "add_to_word",
    "add_uses",
    "advance",
    "alias_table",
    "all_reached",
    "bags_backward",
    "caught_up_word",
    "compress",
    "dedup",
    "dedup_counts",
    "delta",
    "exchange_word",
    "expand",
    "find_places",
    "gather",
    "gather_places",
    "give_up",
    "half_adagrad_update",
    "half_rowwise_adagrad_update",
    "half_sgd_update",
    "half_sparse_adam_update",
    "has_count",
    "held_by_one",
    "history_columns",
    "keys_of_segments",
    "last_steps",
    "mark_behind",
    "mark_steps",
    "merge",
    "moved_places",
    "narrow_rows",
    "note_touches",
    "owners",
    "partition",
    "put_places",
    "reduce_bags",
    "renorm",
    "rowwise_adagrad_update",
    "rowwise_adagrad_update_shared",
    "same_ids",
    "scatter",
    "segment_count",
    "segment_sum",
    "select_due",
    "select_moves",
    "sgd_update",
    "sgd_update_shared",
    "sparse_adam_update",
    "slots_by_row",
    "store_word",
    "sum_segments",
    "take_behind",
    "take_over",
    "take_places",
    "trusted",
    "widen_rows",
]
