"""Files of torch.save that are damaged, foreign, or ask for more than a model does."""

import copy
import pickle
import random
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from conftest import one_line
from test_pickles import Made, Tensor, archive, pickled

from maskgit.common import UserError
from maskgit.common.pickles import Record, flatten, read_torch


def test_little_that_stands_for_much(tmp_path):
    """A few bytes that describe a tuple of 2^200 parts, or a dict of 2^60 names."""
    tuples = b"\x80\x02}N\x85" + b"2\x86" * 200 + b"Ns."
    with pytest.raises(UserError) as error:
        read_torch(archive(tmp_path / "a.pt", tuples))
    one_line(error, "a.pt", "nested tuples")
    content = {"a": torch.zeros(1)}
    for _ in range(40):
        content = {"a": content, "b": content}
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(UserError) as error:
        flatten(read_torch(tmp_path / "b.pt"))
    one_line(error, "nested too deep")
    key = b"\x80\x02(S'storage'\nctorch\nFloatStorage\nN\x85" + b"2\x86" * 200
    with pytest.raises(UserError) as error:
        read_torch(archive(tmp_path / "a.pt", key + b"S'cpu'\nK\x01tQ."))
    one_line(error, "a.pt", "no storage")


LIST = b"\x80\x02]q\x00(" + b"K\x01" * 100 + b"e0"  # in the memo, as those below
DICT = b"\x80\x02}q\x00(" + b"".join(b"K%cN" % i for i in range(100)) + b"u0"
PAIRS = b"\x80\x02]q\x00(" + b"K\x01K\x02\x86" * 100 + b"e0"


@pytest.mark.parametrize(
    "instructions",
    [
        DICT + b"cargparse\nNamespace\nq\x010" + b"h\x01)\x81h\x00b" * 50 + b".",
        LIST + b"ctorch\nSize\nq\x010" + b"h\x01h\x00\x85R" * 50 + b".",
        LIST + b"ctorch\nSize\nq\x010" + b"h\x01h\x00\x85\x81" * 50 + b".",
        PAIRS + b"ccollections\nOrderedDict\nq\x010" + b"h\x01h\x00\x85R" * 50 + b".",
    ],
)
def test_what_is_copied_again_and_again(tmp_path, instructions):
    with pytest.raises(UserError) as error:
        read_torch(archive(tmp_path / "a.pt", instructions))
    one_line(error, "a.pt", "damaged")


def test_what_is_named_again_and_again_is_there_once(tmp_path):
    build = LIST + b"](ctorch.jit._pickle\nbuild_intlist\nq\x01h\x00\x85Rh\x01h\x00\x85Re."
    first, second = read_torch(archive(tmp_path / "a.pt", build))
    assert first is second and len(first) == 100
    classes = b"\x80\x02](cargparse\nNamespace\ncargparse\nNamespace\nc__torch__\nAny\ne."
    assert read_torch(archive(tmp_path / "a.pt", classes)) == [Record] * 3


def test_names_that_no_tensor_has(tmp_path):
    one, long = torch.ones(1), "x" * 600
    contents = [{10**5000: one}, {-1: one}, {True: one}, {("a", 1): one}, {one: one}, {None: one}]
    contents += [{10**5000: {"a": one}}, {long: {long: one}}]
    for content in contents:
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(UserError) as error:
            flatten(read_torch(tmp_path / "a.pt"), "a.pt")
        one_line(error, "a.pt", "names are no text")
    for content in ({1: one, "1": one}, {"a": {"b": one}, "a.b": one}):
        with pytest.raises(UserError) as error:
            flatten(content, "a.pt")
        one_line(error, "a.pt has two tensors")
    odd = {("a", 1): 3, 10**5000: {one: 4}, "a": {0: {"b": one}}}  # names of nothing that is taken
    assert list(flatten(odd)) == ["a.0.b"]


def test_two_records_of_one_name(tmp_path):
    """Of which torch takes the first, and others the last."""
    path = archive(tmp_path / "a.pt", pickled(Tensor()), [bytes(16)])
    with zipfile.ZipFile(path, "a") as file, warnings.catch_warnings(action="ignore"):
        file.writestr("toy/data/0", bytes(16))
    with pytest.raises(UserError) as error:
        read_torch(path)
    one_line(error, "a.pt", "two records of one name")


def test_records_that_overlap(tmp_path):
    """Many names of one large record would be read once each."""
    path = archive(tmp_path / "a.pt", pickled(1), [bytes(1000)])
    with zipfile.ZipFile(path, "a") as file:
        record = file.getinfo("toy/data/0")
        for i in range(1, 20):
            again = copy.copy(record)
            again.filename = again.orig_filename = f"toy/data/{i}"
            file.filelist.append(again)
        file._didModify = True
    with pytest.raises(UserError) as error:
        read_torch(path)
    one_line(error, "a.pt", "overlap")


def test_tensors_lie_inside_their_storages(tmp_path):
    numbers = torch.arange(4.0).numpy().tobytes()
    good = pickled(Tensor(offset=1, size=(2, 2), stride=(1, 1)))
    found = read_torch(archive(tmp_path / "good.pt", good, [numbers]))
    assert found.tolist() == [[1, 2], [2, 3]]
    for bad in (
        Tensor(count=5, size=(5,)),  # beyond the record
        Tensor(count=-1),
        Tensor(count=2),  # beyond the storage
        Tensor(offset=1),
        Tensor(offset=-1, size=(2,)),
        Tensor(size=(2, 2), stride=(3, 1)),
        Tensor(offset=3, size=(2,), stride=(-1,)),
        Tensor(size=(1 << 40,), stride=(0,)),  # little in the file, and all memory when copied
        Tensor(size=(-1, -1), stride=(1, 1)),
        Tensor(size=(2, 2), stride=(1,)),
        Tensor(size="ab", stride=(1, 1)),
        Tensor(size=(1 << 2_000_000,) * 60, stride=(1 << 2_000_000,) * 60),  # long to multiply
        Made(Tensor(size=(1 << 50, 0), stride=(0, 1)), 0, (1 << 50,), (0,), False, OrderedDict()),
        Made(Tensor(stride=(0,)), 0, (4,), (1,), False, OrderedDict()),
    ):
        path = archive(tmp_path / "bad.pt", pickled(bad), [numbers])
        with pytest.raises(UserError) as error:
            read_torch(path)
        one_line(error, "bad.pt")
    with pytest.raises(UserError) as error:
        read_torch(archive(tmp_path / "bad.pt", pickled(Tensor(key="7")), [numbers]))
    one_line(error, "record data/7 is missing")


def test_numbers_that_no_alignment_holds(tmp_path):
    """Zip files of other writers put records anywhere."""
    for shift in range(8):
        path = tmp_path / f"{'a' * (shift + 1)}.pt"
        numbers = torch.arange(4.0).numpy().tobytes()
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(f"{'r' * (shift + 1)}/data.pkl", pickled(Tensor()))
            file.writestr(f"{'r' * (shift + 1)}/data/0", numbers)
        assert read_torch(path).tolist() == [0, 1, 2, 3]


def test_damaged_and_foreign_files(tmp_path):
    torch.save({"a": torch.randn(1000)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    middle = good.index(b"data/0") + 300
    numbers = torch.arange(4.0).numpy().tobytes()
    archive(tmp_path / "big", pickled(Tensor()), [numbers], byteorder=b"big")
    archive(tmp_path / "packed", pickled(Tensor()), [numbers * 9], method=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "other", "w") as file:
        file.writestr("array.npy", "")
    cases = {
        "empty": (b"", "empty, truncated"),
        "text": (b"not a model\n" * 9, "no file of torch.save"),
        "cut": (good[: len(good) // 2], "truncated"),
        "flipped": (good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :], "is damaged"),
        "pickle": (pickle.dumps({"a": 1}), "is a pickle"),
        "big": (None, "big-endian"),
        "packed": (None, "compressed"),
        "other": (None, "0 records data.pkl"),
        # These take memory by a number in the file: 2^40 bytes, and an index of 2^31.
        "bytes": (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "is damaged"),
        "memo": (b"\x80\x02Nr\xff\xff\xff\x7f\x85h\x00.", "is damaged"),
        "stop": (b"\x80\x02N", "is damaged"),
    }
    for name, (content, part) in cases.items():
        if name in ("bytes", "memo", "stop"):
            archive(tmp_path / name, content)
        elif content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            read_torch(tmp_path / name)
        one_line(error, name, part)
    with pytest.raises(UserError) as error:
        read_torch(tmp_path / "nowhere.pt")
    one_line(error, "nowhere.pt")


def test_files_without_checksums(tmp_path):
    """torch.save can leave them out, and writes 0."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_torch(tmp_path / "a.pt")["a"].tolist() == [0, 1, 2]


def test_any_change_of_a_pickle_is_read_or_refused(tmp_path):
    generator = random.Random(0)
    square = Tensor(size=(2, 2), stride=(2, 1))
    content = {"a": Tensor(), "b": [1, 2.5, "text", (None, True)], "c": square}
    right, numbers = pickled(content), torch.arange(4.0).numpy().tobytes()
    refused = 0
    for _ in range(400):
        changed = bytearray(right)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        try:
            read_torch(archive(tmp_path / "a.pt", bytes(changed), [numbers]))
        except UserError:
            refused += 1
    assert 100 < refused < 400


def test_dicts_in_themselves(tmp_path):
    content = {}
    content["again"] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError) as error:
        flatten(read_torch(tmp_path / "a.pt"))
    one_line(error, "nested too deep")
