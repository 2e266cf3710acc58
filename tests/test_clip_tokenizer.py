"""Byte-pair encoding: ids equal to those of OpenAI's tokenizer, and what fewer merges change.

`tests/data/clip_tokens.json` has texts and the ids that open_clip gives them. It is written anew,
with the ids of the open_clip that is installed, by `python tests/test_clip_tokenizer.py`.
"""

import copy
import gzip
import hashlib
import html
import json
import pickle
import sys
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import ftfy
import pytest
import torch
from conftest import ROOT, execute, one_line
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clip.config import MERGES, TextConfig
from clip.tokenizer import ASSET, END, LONG, START, Tokenizer, _kept, clean, merge
from maskgit.common import UserError

GOLDEN = Path(__file__).parent / "data" / "clip_tokens.json"
CASES = json.loads(GOLDEN.read_text())
FULL = Tokenizer()
# Pieces that cleaning and splitting treat in ways of their own, to be put together at random.
PIECES = st.sampled_from(
    ["&", "&amp;", "amp;", "lt;", "#x1c;", "&#8217;", "&nbsp;", "<", "|>", START, END, "<|END"]
    + ["'", "'S", "'ll", "’re", "ſ", "İ", "ß", "\u212a", "\u0301", "e", "\u1100\u1161", "ﬁ", "７"]
    + ["Ã©", "â€™", "ðŸ˜€", "\x85", "\x1c", "\x1b[31m", "\0", "\r\n", "\t", "\u3000", "\u200d"]
    + ["</w>", "_", "12", "...", "👩", "🇫", "🇷", "猫", "แมว", "قط", "The", "cat", " ", "\ud800"]
)
TEXTS = st.text(max_size=40) | st.lists(PIECES, max_size=10).map("".join)


@cache
def oracle():
    """open_clip's tokenizer, with OpenAI's spelling of the start and the end token.

    open_clip spells them <start_of_text> and <end_of_text>; all else is as OpenAI's.
    """
    package = find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip is not installed")
    file = Path(package.origin).with_name("tokenizer.py")  # by itself: the package is slow to load
    spec = spec_from_file_location("open_clip_tokenizer", file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.SimpleTokenizer()
    pattern = theirs.pat.pattern
    for own, name in (("<start_of_text>", START), ("<end_of_text>", END)):
        i = theirs.encoder.pop(own)
        theirs.encoder[name], theirs.decoder[i] = i, name
        theirs.cache[name] = theirs.cache.pop(own).replace(own, name)
        pattern = pattern.replace(own, module.re.escape(name))
    theirs.pat = module.re.compile(pattern, module.re.IGNORECASE)
    return theirs


@cache
def oracle_with(merges):
    """open_clip's tokenizer with the first merges alone; start and end token keep their ids."""
    theirs = copy.copy(oracle())
    theirs.bpe_ranks = dict(list(theirs.bpe_ranks.items())[:merges])
    theirs.cache = {START: START, END: END}
    return theirs


@pytest.mark.parametrize("case", CASES, ids=[case["about"] for case in CASES])
def test_golden(case):
    assert FULL.encode(case["text"]) == case["ids"]


def test_golden_has_what_it_is_for():
    ids = {case["about"]: case["ids"] for case in CASES}
    assert len(ids) == len(CASES) >= 60
    assert ids["empty"] == ids["only whitespace"] == []
    assert ids["apostrophe"] == ids["right quotation mark"] == ids["entity of the quotation mark"]
    assert ids["decomposed accent"] == ids["composed accent"] == ids["mojibake, accent"]
    assert ids["ampersand"] == ids["double entity"]
    assert ids["ligature"] == FULL.encode("fish and fluff")
    assert ids["full-width digits"] == FULL.encode("2024")
    assert ids["Kelvin sign"] == FULL.encode("300 k")
    for about in ("end token", "end token, upper case"):
        assert ids[about] == [*FULL.encode("a cat"), FULL.end, *FULL.encode("a dog")]
    assert FULL.end not in ids["end token, spaced"]
    assert len(ids["very long"]) > 1000


def test_rows_of_openai_models():
    rows = FULL(["a photo of a cat", ""])
    assert rows.shape == (2, 77) and rows.dtype == torch.int64
    assert rows[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert rows[1, :3].tolist() == [49406, 49407, 0] and not rows[:, 8:].any()
    assert (FULL.vocabulary, FULL.start, FULL.end, FULL.context) == (49408, 49406, 49407, 77)
    assert FULL("a photo of a cat").tolist() == rows[:1].tolist()


@given(TEXTS)
@example("ſ'ſ <|ſtartoftext|>")  # ignoring case, as the pattern does, these are an "s"
@example("&amp;lt;|endoftext|&amp;gt;")
@example("<start_of_text><end_of_text>")
@settings(max_examples=400, deadline=None)
def test_any_text_as_open_clip(text):
    expected = oracle().encode(text)
    assert FULL.encode(text) == expected
    assert FULL.decode(expected) == oracle().decode(expected)


@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(3, 20))
@settings(max_examples=100, deadline=None)
def test_any_batch_as_open_clip(texts, context):
    assert Tokenizer(context=context)(texts).equal(oracle()(texts, context_length=context))


@given(st.lists(st.integers(0, FULL.vocabulary - 1), max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_ids_decode_as_open_clip(ids):
    text = FULL.decode(ids)  # where four ids spell </w>, open_clip takes them for a word's end
    assert text.replace("</w>", " ") == oracle().decode(ids)


@given(TEXTS, st.sampled_from([0, 1, 300, 4000, MERGES]))
@settings(max_examples=300, deadline=None)
def test_fewer_merges_as_open_clip_with_fewer(text, merges):
    few = Tokenizer(merges)
    specials = {FULL.start: few.start, FULL.end: few.end}
    assert few.encode(text) == [specials.get(i, i) for i in oracle_with(merges).encode(text)]


@given(TEXTS, st.integers(0, MERGES))
@settings(max_examples=200, deadline=None)
def test_fewer_merges(text, merges):
    few = Tokenizer(merges)
    ids = few.encode(text)
    assert few.vocabulary == 512 + merges + 2 == few.end + 1 == few.start + 2
    assert all(0 <= i < few.vocabulary for i in ids)
    full = FULL.encode(text)
    # The ids of the reduced tokenizer are those of the full one, its later merges undone.
    specials = {few.start: FULL.start, few.end: FULL.end}
    assert FULL.decode([specials.get(i, i) for i in ids]) == few.decode(ids) == FULL.decode(full)
    assert len(ids) >= len(full)
    if all(i < few.start or i >= FULL.start for i in full):  # it needs no later merge
        assert [specials.get(i, i) for i in ids] == full


def test_no_and_all_merges():
    assert Tokenizer(0).encode("Cat") == [66, 64, 83 + 256]  # bytes from "!" = 0; an end is 256 on
    assert Tokenizer(0).decode([66, 64, 83 + 256]) == "cat "
    assert Tokenizer(MERGES) == Tokenizer() == FULL
    assert TextConfig(merges=1000).rows == Tokenizer(1000).vocabulary == 1514
    # Words of tokenizers with different merges are not mixed up.
    assert [len(Tokenizer(n).encode("photograph")) for n in (0, MERGES, 0)] == [10, 1, 10]


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_plain_ascii_is_cleaned_as_all_else(text):
    text = text.encode("ascii", "ignore").decode()
    whole = html.unescape(html.unescape(ftfy.fix_text(text)))
    assert clean(text) == " ".join(whole.split()).lower()


@pytest.mark.parametrize("length", [LONG, LONG + 1, 1000])
def test_long_words_are_not_kept(length):
    word = ("incomprehensibilities" * 50)[:length]
    before = _kept.cache_info()
    assert FULL.encode(word) == FULL.encode(word) == list(merge(word, MERGES))
    after = _kept.cache_info()
    assert after.hits - before.hits + after.misses - before.misses == (2 if length <= LONG else 0)
    assert after.maxsize is not None


@pytest.mark.parametrize("context", [3, 16, 77])
def test_truncation(context):
    tokenizer = Tokenizer(context=context)
    texts = [" ".join(["cat"] * n) for n in (context - 3, context - 2, context - 1, 3 * context)]
    assert [len(tokenizer.encode(text)) for text in texts[1:3]] == [context - 2, context - 1]
    assert tokenizer.too_long(texts) == [False, False, True, True]
    rows = tokenizer(texts)
    assert rows.shape == (4, context)
    assert (rows[:, 0] == tokenizer.start).all()
    assert rows[0, -2:].tolist() == [tokenizer.end, 0]
    assert (rows[1:, -1] == tokenizer.end).all()
    assert ((rows == tokenizer.end).sum(1) == 1).all()
    assert rows[3].equal(rows[1])
    assert (rows.argmax(1) == torch.tensor([context - 2] + [context - 1] * 3)).all()
    assert tokenizer.too_long(texts[2]) == [True]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "there is no text"),
        (None, "texts must be a string or a list of strings, not NoneType"),
        (7, "not int"),
        (iter(["ab"]), "not list_iterator"),  # it would be empty when asked a second time
        (["a", None], "texts[1] must be a string, not NoneType"),
        (["a", float("nan")], "texts[1] must be a string, not float"),  # an empty cell of pandas
        ([["a"]], "texts[0] must be a string, not list"),
        (b"a", "texts must be a string or a list of strings, not bytes"),
    ],
)
def test_what_is_no_text(texts, said):
    for ask in (FULL, FULL.too_long):
        with pytest.raises(UserError) as error:
            ask(texts)
        one_line(error, said)


def test_one_text_that_is_none():
    with pytest.raises(UserError) as error:
        FULL.encode(b"cat")
    one_line(error, "a text must be a string, not bytes")


@pytest.mark.parametrize("tokenizer", [FULL, Tokenizer(100)])
def test_ids_that_are_not_there(tokenizer):
    assert tokenizer.decode([tokenizer.start, tokenizer.end]) == START + END
    assert tokenizer.decode(tokenizer("A cat")[0, 1:-1])[:6] == "a cat "  # of a tensor too
    for i in (-1, tokenizer.vocabulary):
        with pytest.raises(UserError) as error:
            tokenizer.decode([0, i])
        one_line(error, f"token id {i} is not from 0 to {tokenizer.vocabulary - 1}")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"merges": -1}, f"merges=-1 is not from 0 to {MERGES}"),
        ({"merges": MERGES + 1}, f"merges={MERGES + 1} is not from 0"),
        ({"context": 2}, "context=2"),
    ],
)
def test_settings_out_of_range(settings, said):
    with pytest.raises(UserError) as error:
        Tokenizer(**settings)
    one_line(error, said)


def test_travels_to_workers():
    few = Tokenizer(1000, 16)
    for other in (pickle.loads(pickle.dumps(few)), copy.deepcopy(few)):
        assert other == few and other(["a cat"]).equal(few(["a cat"]))
    assert len(pickle.dumps(few)) < 200  # the merges stay behind


def test_asset():
    lines = gzip.decompress(ASSET.read_bytes())
    assert len(lines.splitlines()) == MERGES
    digest = "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"
    assert hashlib.sha256(lines).hexdigest() == digest
    assert ASSET.read_bytes()[4:8] == bytes(4)  # no time of making
    assert ASSET.stat().st_size < 210_000
    licence = (ASSET.parent / "LICENSE-OPENAI-CLIP.txt").read_text()
    assert "MIT License" in licence and "Copyright (c) 2021 OpenAI" in licence
    spec = find_spec("open_clip")
    if spec is None:
        pytest.skip("the file that the asset is a part of is open_clip's")
    source = Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    assert hashlib.sha256(source).hexdigest() in licence
    assert gzip.decompress(source).splitlines(keepends=True)[1:48895] == lines.splitlines(True)


def test_import_loads_neither_torch_nor_the_merges():
    code = (
        "import sys, clip.tokenizer as t; assert t._vocabulary.cache_info().currsize == 0; "
        "t.Tokenizer(9).encode('a cat'); assert 'torch' not in sys.modules; "
        "assert t._vocabulary.cache_info().currsize == 1"
    )
    done = execute(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def write_golden():
    """The ids of the golden texts anew, one case a line, in ASCII that no editor normalises."""
    cases = [case | {"ids": oracle().encode(case["text"])} for case in CASES]
    GOLDEN.write_text("[\n" + ",\n".join(map(json.dumps, cases)) + "\n]\n")


if __name__ == "__main__":
    write_golden()
