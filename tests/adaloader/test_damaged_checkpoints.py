"""Checkpoints that are damaged, or made to do harm: each is refused by name, before anything is changed."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch

from adaloader import CheckpointError, full_state_dict
from adaloader.checkpoint import layout
from adaloader.checkpoint.inspecting import check
from adaloader.command_line import main
from tests.resuming import Script

MOST_GROWTH_BYTES = 64 << 20
HUGE = 1 << 61


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint, and a run into which it loads."""
    folder = tmp_path_factory.mktemp("sound") / "saved"
    script = Script(None, "adam").start().run(3)
    script.save(folder)
    script.run(2)
    yield folder, script
    script.close()


@pytest.fixture
def folder(sound, tmp_path):
    shutil.copytree(sound[0], tmp_path / "saved")
    return tmp_path / "saved"


def refused(folder: Path, script: Script, message: str) -> None:
    """Loading and inspecting both refuse it with a message that names a file in it, and change nothing."""
    before = full_state_dict(script.model)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message) as caught:
        script.load(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 2000
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown) * 1024 < MOST_GROWTH_BYTES
    after = full_state_dict(script.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def data_file(folder: Path) -> Path:
    (path,) = folder.glob("data-*/rank-00000.safetensors")
    return path


def edit_index(folder: Path, change) -> None:
    """Change the index as somebody who knows the format would: its digest is right."""
    path = folder / layout.INDEX
    parsed = json.loads(path.read_text())
    content = parsed["content"]
    change(content)
    path.write_text(json.dumps({**parsed, "content": content, "digest": layout._digest(content)}))


def edit_header(folder: Path, change) -> None:
    """Change the header of the file of tensors, and the sizes and checksums that the index has of it."""
    path = data_file(folder)
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    header = change(header) or header
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    def adapt(content):
        content["files"][0]["bytes"] = path.stat().st_size
        content["files"][0]["header_crc"] = zlib.crc32(text)
        if isinstance(header, dict):
            content["files"][0]["crcs"] = {n: content["files"][0]["crcs"].get(n, 0) for n in header}

    edit_index(folder, adapt)


@pytest.mark.parametrize("case", range(12))
def test_flipped_bit(sound, folder, seed, case):
    randomly = random.Random(seed + case)
    path = data_file(folder) if case % 3 else folder / layout.INDEX
    raw = bytearray(path.read_bytes())
    at = randomly.randrange(len(raw) - 1)  # the last byte of the index is a newline
    raw[at] ^= 1 << randomly.randrange(8)
    path.write_bytes(raw)
    refused(folder, sound[1], "damaged|JSON|format|version|header|truncated|malformed")
    with pytest.raises(CheckpointError):
        check(folder)


@pytest.mark.parametrize("name", ["values/built.weight", "rows/declared.weight", "model/out.weight"])
def test_damaged_one_is_not_exported(folder, tmp_path, capsys, name):
    path = data_file(folder)
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", raw)
    start, stop = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    raw[8 + length + (start + stop) // 2] ^= 4
    path.write_bytes(raw)
    out = tmp_path / "out.safetensors"
    assert main(["export", str(folder), str(out)]) == 1
    assert f"{path} is damaged: {name!r} does not have the checksum" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("left", [0, 1, 7, 8, 9, 100, 0.3, 0.7, 0.999, -1])
@pytest.mark.parametrize("of_index", [False, True])
def test_truncated(sound, folder, left, of_index):
    path = folder / layout.INDEX if of_index else data_file(folder)
    size = path.stat().st_size
    stop = int(size * left) if isinstance(left, float) else left % size if left >= 0 else size - 2
    os.truncate(path, min(stop, size - 2))
    refused(folder, sound[1], "JSON|truncated")


CONTENTS = {
    "a path outside": lambda c: c.update(data="../../etc"),
    "an absolute path": lambda c: c.update(data="/etc"),
    "a number for a folder": lambda c: c.update(data=3),
    "a file outside": lambda c: c["files"][0].update(name="../rank-00000.safetensors"),
    "a file of another rank": lambda c: c["files"][0].update(name="rank-00001.safetensors"),
    "no files": lambda c: c.update(files=[]),
    "files that are none": lambda c: c.update(files=[3]),
    "more files than states": lambda c: c["files"].append(dict(c["files"][0], name="rank-00001.safetensors")),
    "a negative size": lambda c: c["files"][0].update(bytes=-1),
    "a huge size": lambda c: c["files"][0].update(bytes=HUGE),
    "checksums of a list": lambda c: c["files"][0].update(crcs=[]),
    "a missing checksum": lambda c: c["files"][0]["crcs"].popitem(),
    "another checksum": lambda c: c["files"][0]["crcs"].update({"values/built.weight": 5}),
    "no tables": lambda c: c.pop("tables"),
    "a table of a number": lambda c: c["tables"].update(x=3),
    "more rows held than there are": lambda c: c["tables"]["built.weight"].update(held=HUGE),
    "huge tables": lambda c: c["tables"]["built.weight"].update(rows=HUGE, held=HUGE),
    "fewer rows than held": lambda c: c["tables"]["built.weight"].update(held=3),
    "rows below zero": lambda c: c["tables"]["built.weight"].update(rows=-1, held=-1),
    "a dim of text": lambda c: c["tables"]["built.weight"].update(dim="3"),
    "another dim": lambda c: c["tables"]["built.weight"].update(dim=4),
    "another dtype": lambda c: c["tables"]["built.weight"].update(dtype="float32"),
    "an unknown dtype": lambda c: c["tables"]["built.weight"].update(dtype="object"),
    "states without widths": lambda c: c["tables"]["built.weight"].update(state_widths=[]),
    "huge states": lambda c: c["tables"]["built.weight"].update(state_widths=[HUGE, 3]),
    "no history": lambda c: c["tables"]["built.weight"].update(history=None, history_steps=0, program={"dict": []}),
    "a history of other steps": lambda c: c["tables"]["built.weight"].update(history_steps=2),
    "a history that is none": lambda c: c["tables"]["built.weight"].update(history={"dict": [["steps", 3]]}),
    "a history of a missing tensor": lambda c: c["tables"]["built.weight"].update(history={"tensor": "none"}),
    "a program that is none": lambda c: c["tables"]["declared.weight"].update(program={"dict": [["seed", 1]]}),
    "a program of code": lambda c: c["tables"]["declared.weight"].update(program={"eval": "1"}),
    "trees that are none": lambda c: c.update(trees=[]),
    "draws that are none": lambda c: c["of_ranks"][0].update(read_ahead=7),
    "draws of another form": lambda c: c["of_ranks"][0].update(read_ahead={"list": [{"dict": [["torch", 1]]}]}),
    "a node of another kind": lambda c: c["of_ranks"][0].update(random={"pickle": "gASVAAAA"}),
    "a node nested deep": lambda c: c["of_ranks"][0].update(extra=deep(180)),
    "a model that is none": lambda c: c["trees"].update(model=3),
    "no optimizers": lambda c: c["trees"].update(optimizers={"list": []}),
    "optimizers of other parameters": lambda c: c["trees"].update(parameters=[[["out.bias"]]]),
    "a tensor that is not there": lambda c: c["trees"]["model"]["dict"].append(["out.bias", {"tensor": "none"}]),
    "keys that cannot be": lambda c: c["of_ranks"][0].update(extra={"dict": [[{"list": []}, 1]]}),
    "no random states": lambda c: c["of_ranks"][0].pop("random"),
    "steps of text": lambda c: c.update(steps="many"),
    "a field too many": lambda c: c.update(more=1),
}


def deep(levels: int):
    node = {"list": []}
    for _ in range(levels):
        node = {"list": [node]}
    return node


@pytest.mark.parametrize("case", CONTENTS)
def test_index_that_lies(sound, folder, case):
    edit_index(folder, CONTENTS[case])
    refused(folder, sound[1], ".")


def first(header: dict) -> dict:
    return header["values/built.weight"]


HEADERS = {
    "no JSON": lambda h: "{",
    "a list": lambda h: "[]",
    "a name twice": lambda h: json.dumps(h)[:-1] + ', "values/built.weight": {}}',
    "nested deep": lambda h: "[" * 100_000,
    "an unknown dtype": lambda h: first(h).update(dtype="F63"),
    "a dtype of a list": lambda h: first(h).update(dtype=[]),
    "no shape": lambda h: first(h).pop("shape"),
    "a negative shape": lambda h: first(h).update(shape=[-37, -3]),
    "a huge shape": lambda h: first(h).update(shape=[HUGE, 3]),
    "a shape that overflows": lambda h: first(h).update(shape=[1 << 32, 1 << 32, 1 << 32]),
    "another shape": lambda h: first(h).update(shape=[3, 37]),
    "a shape of fractions": lambda h: first(h).update(shape=[37.0, 3]),
    "a shape of truths": lambda h: first(h).update(shape=[True, 111]),
    "a place beyond the end": lambda h: first(h).update(data_offsets=[1 << 40, (1 << 40) + 888]),
    "a place before the start": lambda h: first(h).update(data_offsets=[-888, 0]),
    "a place that overlaps": lambda h: first(h).update(data_offsets=[8, 896]),
    "one number for a place": lambda h: first(h).update(data_offsets=[8]),
    "an entry of text": lambda h: h.update({"values/built.weight": "x"}),
    "rows renamed": lambda h: h.update({"rows/other": h.pop("rows/built.weight")}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header_that_lies(sound, folder, case):
    def change(header):
        changed = HEADERS[case](header)
        return changed if isinstance(changed, str) else None

    edit_header(folder, change)
    refused(folder, sound[1], "rank-00000.safetensors|table")


def test_header_longer_than_the_file(sound, folder):
    path = data_file(folder)
    raw = path.read_bytes()
    path.write_bytes(struct.pack("<Q", HUGE) + raw[8:])
    refused(folder, sound[1], "header claims 2,305,843,009,213,693,952 bytes")


def rewrite(folder: Path, name: str, change) -> None:
    """Change what a tensor holds, and its checksum."""
    path = data_file(folder)
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", raw)
    start, stop = (8 + length + at for at in json.loads(raw[8 : 8 + length])[name]["data_offsets"])
    values = torch.frombuffer(raw[start:stop], dtype=torch.int64).clone()
    change(values)
    raw[start:stop] = values.numpy().tobytes()
    path.write_bytes(raw)
    edit_index(folder, lambda c: c["files"][0]["crcs"].update({name: zlib.crc32(raw[start:stop])}))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("rows/built.weight", lambda v: v.fill_(3), "not ascending"),
        ("rows/built.weight", lambda v: v.sub_(1), "not ascending"),
        ("rows/built.weight", lambda v: v[-1:].fill_(HUGE), "not ascending from 0 to 36"),
        ("caught_up/built.weight", lambda v: v.fill_(-1), "caught up to other steps"),
        ("caught_up/built.weight", lambda v: v.fill_(1 << 40), "caught up to other steps"),
    ],
)
def test_rows_that_cannot_be(sound, folder, name, change, message):
    rewrite(folder, name, change)
    refused(folder, sound[1], message)


def test_missing_and_strange_files(sound, folder):
    script, path = sound[1], data_file(folder)
    raw = path.read_bytes()
    path.unlink()
    refused(folder, script, "rank-00000.safetensors is missing")
    path.symlink_to("/etc/passwd")
    refused(folder, script, "it is a link")
    path.unlink()
    os.mkfifo(path)
    refused(folder, script, "no regular file")
    path.unlink()
    path.mkdir()
    refused(folder, script, "no regular file")
    path.rmdir()
    path.write_bytes(raw)
    elsewhere = folder.parent / "elsewhere"
    path.parent.rename(elsewhere)
    path.parent.symlink_to(elsewhere)
    refused(folder, script, "is a link")


def test_newer_format_and_other_formats(sound, folder):
    path, script = folder / layout.INDEX, sound[1]
    parsed = json.loads(path.read_text())
    for change, message in (
        ({"version": 2}, "version 2 of the format.*install a newer"),
        ({"version": None}, "version None"),
        ({"format": "other"}, "no index of a checkpoint"),
        ({"digest": "0" * 32}, "damaged"),
    ):
        path.write_text(json.dumps({**copy.deepcopy(parsed), **change}))
        refused(folder, script, message)
    path.write_text("[]")
    refused(folder, script, "no index of a checkpoint")


def test_sound_one_loads_after_all_that(sound):
    folder, script = sound
    check(folder)
    script.load(folder)
    script.iterator = None
    script.run(2)
