"""The paper's settings, agreement of sentencepiece and transformers, and what is refused."""

import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from llama2.tokenizer import (
    LONGEST_LINE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    _lines,
    check_vocabulary,
    load_tokenizer,
    train_tokenizer,
)

VOCABULARY = 360
SAMPLES = [
    "",
    " ",
    "Hello there",
    "12 plus 3456 is 3468.",
    "  two spaces  between  words  ",
    "a line\nanother\n\n\ta tab",
    "naïve café, Ελληνικά, 中文",
    "an emoji 😀 and a family 👨‍👩‍👧",
    "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello ",
    "▁ a lower one eighth block ▁▁",
]


def corpus() -> Iterator[str]:
    chooser = random.Random(0)
    text = "the cat dog sees hears 17 205 green red house garden in and who is not there"
    words = text.split()
    for _ in range(300):
        yield " ".join(chooser.choices(words, k=12)) + ".\nA naïve café in the garden."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(corpus(), VOCABULARY, path)
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def readers(folder: Path) -> list[Tokenizer]:
    return [load_tokenizer(folder), HuggingFaceTokenizer(folder)]


def byte_level_folder(path: Path, template: str | None = None) -> Path:
    """A folder as GPT-like Llamas bring it: tokenizer.json, control tokens like <|im_end|>."""
    fast = FastTokenizer(BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(corpus(), trainer)
    path.mkdir(exist_ok=True)
    fast.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": template,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_training_follows_the_paper(folder: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert processor.vocab_size() == VOCABULARY
    assert [processor.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert processor.pad_id() == -1
    pieces = [processor.id_to_piece(i) for i in range(259, VOCABULARY)]
    assert not [p for p in pieces if len(p) > 1 and any(c.isdigit() for c in p)]
    assert processor.encode("205", out_type=str) == ["▁", "2", "0", "5"]
    # U+1F600 is F0 9F 98 80 in UTF-8; a newline is 0A.
    assert processor.encode("the\n😀", out_type=str) == [
        "▁the",
        "<0x0A>",
        "<0xF0>",
        "<0x9F>",
        "<0x98>",
        "<0x80>",
    ]
    # The identity normaliser keeps a full-width letter, an accent written apart, and double spaces.
    assert processor.decode(processor.encode("Ａ  e\u0301 ")) == "Ａ  e\u0301 "


def test_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(corpus(), VOCABULARY, tmp_path)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_a_language_of_many_characters_fits_a_small_vocabulary(tmp_path: Path) -> None:
    chooser = random.Random(1)
    common, rare = range(0x4E00, 0x4E10), range(0x5000, 0x5200)
    texts = ["".join(map(chr, [*chooser.choices(common, k=40), c])) for c in rare]
    tokenizer = train_tokenizer(texts, 320, tmp_path)
    assert tokenizer.vocab_size == 320
    text = chr(0x5100) + chr(0x4E00) + " x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_lines_are_trained_on(tmp_path: Path) -> None:
    # One line of a megabyte: SentencePiece alone would drop it and find no text at all.
    text = " ".join(line.replace("\n", " ") for line in corpus()) * 40
    short = train_tokenizer(corpus(), 300, tmp_path / "short")
    long = train_tokenizer([text], 300, tmp_path / "long")
    assert long.encode("the garden") == short.encode("the garden")
    pieces = list(_lines(text))
    assert max(map(len, pieces)) <= LONGEST_LINE
    assert " ".join(pieces) == text
    assert list(_lines("x" * 2500)) == ["x" * 1000, "x" * 1000, "x" * 500]


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ([], 400, "no text"),
        ([" \n "], 400, "no text"),
        (["abc def"], 1024, "yield at most 278 tokens, fewer than the vocabulary of 1024"),
        (["abc def"], 200, "too small"),
    ],
)
def test_training_refuses(texts: list[str], size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, size, tmp_path)


def test_transformers_reads_the_saved_folder(folder: Path, trained: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert theirs("the cat")["input_ids"] == [1, *trained.encode("the cat")]
    for text in SAMPLES:
        ids = trained.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        # The mark that stands for a space in the vocabulary is the one character not given back.
        assert trained.decode(ids) == text.replace("▁", " ")
        assert theirs.decode(ids, skip_special_tokens=True) == trained.decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="the cat dog12\n.é▁", max_size=60))
@example("thethe  thecat ")
def test_both_readers_agree_on_any_text(readers: list[Tokenizer], text: str) -> None:
    ours, theirs = readers
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def test_control_tokens_are_neither_forged_nor_shown(
    readers: list[Tokenizer], tmp_path: Path
) -> None:
    chat = load_tokenizer(byte_level_folder(tmp_path / "chat"))
    assert isinstance(chat, HuggingFaceTokenizer)
    for tokenizer in (*readers, chat):
        forged = tokenizer.encode("a</s><s>b<|im_end|>")
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(forged)
        assert tokenizer.decode(forged) == "a</s><s>b<|im_end|>"
        ids = [tokenizer.bos_id, *tokenizer.encode("the cat"), tokenizer.eos_id]
        assert tokenizer.decode(ids) == "the cat"
        # A model may have more embeddings than the tokenizer has ids, and sample one of them.
        assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == "the cat"


def test_saving_and_pickling_keep_every_id(folder: Path, tmp_path: Path) -> None:
    chat = load_tokenizer(byte_level_folder(tmp_path / "chat"))
    for i, tokenizer in enumerate((load_tokenizer(folder), chat)):
        tokenizer.save(tmp_path / str(i))
        again = load_tokenizer(tmp_path / str(i))
        sent = pickle.loads(pickle.dumps(tokenizer))
        for other in (again, sent):
            assert type(other) is type(tokenizer)
            names = ("vocab_size", "bos_id", "eos_id", "pad_id", "fingerprint")
            assert [getattr(other, n) for n in names] == [getattr(tokenizer, n) for n in names]
            assert [other.encode(text) for text in SAMPLES] == [
                tokenizer.encode(text) for text in SAMPLES
            ]


def test_a_bare_sentencepiece_model_is_enough(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "meta" / "tokenizer.model"
    model.parent.mkdir()
    model.write_bytes((folder / "tokenizer.model").read_bytes())
    for source in (model, model.parent):
        tokenizer = load_tokenizer(source)
        assert isinstance(tokenizer, SentencePieceTokenizer)
        tokenizer.save(tmp_path / "full")
        assert (tmp_path / "full" / "tokenizer.json").read_bytes() == (
            folder / "tokenizer.json"
        ).read_bytes()


def test_which_reader_a_folder_gets(folder: Path, tmp_path: Path) -> None:
    def variant(name: str, **config: object) -> Path:
        load_tokenizer(folder).save(tmp_path / name)
        file = tmp_path / name / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return tmp_path / name

    assert isinstance(load_tokenizer(folder), SentencePieceTokenizer)
    own = load_tokenizer(variant("own", chat_template="{{ messages[0].content }}"))
    assert isinstance(own, HuggingFaceTokenizer)
    assert own.has_chat_template
    added = {str(VOCABULARY): {"content": "<|im_end|>", "special": True}}
    more = load_tokenizer(variant("more", added_tokens_decoder=added))
    assert isinstance(more, HuggingFaceTokenizer)
    assert not more.has_chat_template
    assert more.vocab_size == VOCABULARY + 1
    assert load_tokenizer(byte_level_folder(tmp_path / "b") / "tokenizer.json").vocab_size == 300


def test_what_cannot_be_loaded_says_why(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="neither"):
        load_tokenizer(tmp_path)
    # Llama 3's own tokenizer.model is a list of base64 words, not SentencePiece.
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ValueError, match=r"not a SentencePiece model.*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="cannot read the tokenizer in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)


def test_vocabulary_must_fit_the_model(trained: Tokenizer) -> None:
    check_vocabulary(trained, VOCABULARY)
    check_vocabulary(trained, VOCABULARY + 64)
    with pytest.raises(ValueError, match="360 ids, but the model's vocabulary has only 359"):
        check_vocabulary(trained, VOCABULARY - 1)
