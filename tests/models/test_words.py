"""Words of every kind of tokenizer, in the user's own characters: each kind built here, on a vocabulary of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import ftfy
import open_clip
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer, canonicalize_text, get_clean_fn

import clipfast
from clipfast.errors import TextError
from clipfast.models.align import align
from clipfast.models.reader import TokenReader
from clipfast.models.words import group

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

CORPUS = 5 * [
    "A photo of a dog, and the red cat's tail isn't here.",
    "हिन्दी भाषा है",
    "สวัสดีครับ น้ำ",
    "你好世界 我爱猫",
    "カタカナとひらがな漢字",
    "مرحبا بالعالم",
    "한국어 텍스트",
    "café naïve Straße İstanbul",
    "Привет, мир 👍🏽 🇩🇪",
    "3 . 5 - _ ½ ! ' / 1 2 ⁄ ﬁ",
]


def fast(tokenizer: Tokenizer, **special: Any) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def word_piece() -> Any:
    """As BERT's: lower case, no accents, [UNK] for a word with an unknown character."""
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, limit_alphabet=60, special_tokens=special, show_progress=False)
    found.train_from_iterator(CORPUS, trainer)
    found.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return fast(found, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def byte_level(*, trim: bool = True) -> Any:
    """As RoBERTa's: byte-level BPE; with `trim`, offsets without the space in front."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=not trim)
    special, alphabet = ["<s>", "<pad>", "</s>", "<unk>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(CORPUS, trainer)
    found.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim, not trim)
    return fast(found, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def sentence_piece(frame: str = "$A </s>", side: str = "right") -> Any:
    """As XLM-R's, T5's and, with a language code in front, NLLB's: NFKC, the mark of a word's start, unigrams."""
    found = Tokenizer(models.Unigram())
    found.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>", "eng_Latn"]
    trainer = trainers.UnigramTrainer(vocab_size=220, special_tokens=special, unk_token="<unk>", show_progress=False)
    found.train_from_iterator(CORPUS, trainer)
    ids = [("</s>", 1), ("eng_Latn", 3)]
    found.post_processor = processors.TemplateProcessing(frame, special_tokens=ids)
    return fast(found, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", truncation_side=side)


def byte_fallback() -> Any:
    """As Gemma's: BPE over SentencePiece's marks, unknown characters as tokens of their bytes."""
    found = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    found.normalizer = normalizers.Replace(" ", "▁")
    found.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, limit_alphabet=50, special_tokens=special, show_progress=False)
    found.train_from_iterator(CORPUS, trainer)
    found.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    return fast(found, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", bos_token="<bos>")


def slow(folder: Path) -> Any:
    """SigLIP's of transformers: it cleans by itself, and has no offsets."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = folder / "pieces.model"
    with model.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=stream, vocab_size=200, hard_vocab_limit=False,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
    return transformers.SiglipTokenizer(str(model))


def wrapped(inner: Any, clean: str = "whitespace", length: int = 128, mode: str = "") -> HFTokenizer:
    """open_clip's wrapper, which by itself only loads from the hub or a folder."""
    found = HFTokenizer.__new__(HFTokenizer)
    found.tokenizer, found.context_length, found.clean_fn = inner, length, get_clean_fn(clean)
    found.strip_sep_token, found.tokenizer_mode = False, mode
    return found


def siglip(inner: Any) -> SigLipTokenizer:
    found = SigLipTokenizer.__new__(SigLipTokenizer)
    found.tokenizer, found.context_length = inner, 128
    return found


def pieces_only() -> Any:
    """A function that tells what its ids spell, and not how it finds them."""
    simple = SimpleTokenizer()

    def tokenize(texts: list[str]) -> torch.Tensor:
        return simple(texts)

    tokenize.decoder, tokenize.byte_decoder = simple.decoder, simple.byte_decoder  # type: ignore[attr-defined]
    return tokenize


def openai_clip() -> Any:
    """The function `tokenize` of OpenAI's package: the tokenizer is its module's, and it raises unless told to cut."""
    module = {"_tokenizer": SimpleTokenizer()}

    def tokenize(texts: list[str], context_length: int = 77, truncate: bool = False) -> torch.Tensor:
        if not truncate and any(len(module["_tokenizer"].encode(text)) > context_length - 2 for text in texts):
            raise RuntimeError("Input is too long for context length")
        return module["_tokenizer"](texts, context_length)

    return FunctionType(tokenize.__code__, {**globals(), **module}, closure=tokenize.__closure__, argdefs=(77, False))


BUILDERS: dict[str, Callable[[Path], Any]] = {
    "open_clip": lambda _: SimpleTokenizer(),
    "open_clip's function": lambda _: open_clip.tokenize,
    "partial": lambda _: partial(SimpleTokenizer(), context_length=77),
    "OpenAI": lambda _: openai_clip(),
    "pieces only": lambda _: pieces_only(),
    "BERT": lambda _: word_piece(),
    "RoBERTa": lambda _: byte_level(),
    "RoBERTa, not trimmed": lambda _: byte_level(trim=False),
    "XLM-R": lambda _: sentence_piece(),
    "NLLB": lambda _: sentence_piece("eng_Latn $A </s>"),
    "NLLB, code behind": lambda _: sentence_piece("$A </s> eng_Latn"),
    "cut in front": lambda _: sentence_piece(side="left"),
    "Gemma": lambda _: byte_fallback(),
    "SigLIP of transformers": slow,
    "BERT in open_clip": lambda _: wrapped(word_piece()),
    "MetaCLIP 2": lambda _: wrapped(sentence_piece()),
    "SigLIP": lambda _: wrapped(sentence_piece(), "canonicalize"),
    "SigLIP 2": lambda _: wrapped(byte_fallback(), "canonicalize"),
    "SigLipTokenizer": lambda _: siglip(sentence_piece()),
    "processor": lambda _: SimpleNamespace(tokenizer=sentence_piece(), image_processor=None),
    "clips": lambda _: wrapped(fast_with_all_special(), mode="clips"),
}
CLEANING = ("SigLIP", "SigLIP 2", "SigLipTokenizer", "SigLIP of transformers")


def fast_with_all_special() -> Any:
    found = word_piece()
    found.add_special_tokens({"bos_token": "[BOS]", "eos_token": "[EOS]"})
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    folder, kept = tmp_path_factory.mktemp("pieces"), dict[str, Any]()

    def get(name: str) -> Any:
        if name not in kept:
            kept[name] = BUILDERS[name](folder)
        return kept[name]

    return get


def words(tokenizer: Any, text: str, length: int = 64) -> list[str]:
    reader = TokenReader(tokenizer)
    return [word.text for word in reader.words(text, reader.ids([text], length)[0].tolist())]


SENTENCES = {
    "A Dog  isn't HERE, café!": ["A", "Dog", "isn't", "HERE", ",", "café", "!"],
    "\tred_car-3.5\n": ["red", "_", "car", "-", "3.5"],
    "हिन्दी भाषा है": ["हिन्दी", "भाषा", "है"],
    "مرحبا بالعالم": ["مرحبا", "بالعالم"],
    "한국어 텍스트": ["한국어", "텍스트"],
    "Привет, МИР": ["Привет", ",", "МИР"],
    "cafe\u0301 ﬁn ½": ["cafe\u0301", "ﬁn", "½"],
}


@pytest.mark.parametrize("name", BUILDERS)
def test_words_of_scripts_with_spaces_are_the_same_for_all(built, name) -> None:
    for text, expected in SENTENCES.items():
        if name in CLEANING:
            expected = [word for word in expected if any(c.isalnum() for c in word)]
        assert words(built(name), text) == expected


@pytest.mark.parametrize("name", BUILDERS)
def test_no_character_is_split(built, name) -> None:
    text = "你好世界 สวัสดีครับ น้ำ 👨‍👩‍👧 👍🏽 🇩🇪"
    found = words(built(name), text, 128)
    assert "".join(found) == text.replace(" ", "")
    assert set(found) >= {"น้ำ", "👨‍👩‍👧", "👍🏽", "🇩🇪"} or name in ("BERT", "BERT in open_clip", "clips")
    if name in ("open_clip", "RoBERTa", "Gemma"):
        assert found[:2] == ["你", "好"]


WRITTEN = st.lists(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("aA bé&;#x2<>_'’.\u0301\u200d\ufeff👍🏽🇩中ำัि्क\n\t\xa0ﬁ½İßΣÃ©Ð"),
        st.sampled_from(["&amp;", "&lt;", "&#39;", "&notit;", "Ã©", "<end_of_text>", "[UNK]", "<0xE4>", "##a", "▁"]),
    ),
    max_size=30,
).map("".join)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_any_text_at_all(built, name) -> None:
    """Words in order, apart, inside the text; each token in one word at most; what is left over was dropped or cut."""
    tokenizer = built(name)
    reader = TokenReader(tokenizer)

    @settings(max_examples=80, deadline=None, derandomize=True)
    @example("</s>½")
    @example("&amp;amp; &nbsp;x")
    @example("x" * 300 + "&" + "y" * 300)
    @given(WRITTEN)
    def check(text: str) -> None:
        row = reader.ids([text], 24)[0].tolist()
        found, cut = reader.words(text, row), reader.cut(text, row)
        assert all(word.text == text[word.start : word.end] == word.text.strip() != "" for word in found)
        ends = [0, *(word.end for word in found)]
        assert all(end <= word.start for end, word in zip(ends, found, strict=False))
        positions = [position for word in found for position in word.positions]
        assert positions == sorted(set(positions)) and set(positions) <= set(range(len(row)))
        if name == "Gemma" and cut is None:
            # It drops nothing, and has no special token that is in these texts.
            assert "".join(text.split()) == "".join("".join(word.text for word in found).split())

    check()


def test_every_character_of_open_clips_is_in_a_word(built) -> None:
    reader = TokenReader(built("open_clip"))

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.text(st.characters(exclude_categories=["C"]) | st.sampled_from("&amp; é\u0301中ﬁ½"), max_size=20))
    def check(text: str) -> None:
        row = reader.ids([text], 77)[0].tolist()
        # ftfy drops what nobody sees, and bytes that it takes for a space in a wrong encoding.
        if reader.cut(text, row) is None and len(ftfy.fix_text(text)) == len(text):
            found = reader.words(text, row)
            assert "".join("".join(word.text for word in found).split()) == "".join(text.split())

    check()


def test_the_users_characters_behind_what_was_cleaned(built) -> None:
    mojibake = "été".encode().decode("latin-1")
    assert words(built("open_clip"), "Salt &amp; PEPPER &#39;x &copyright") == [
        "Salt",
        "&amp;",
        "PEPPER",
        "&#39;",
        "x",
        "&copyright",
    ]
    assert "".join(words(built("open_clip"), f"{mojibake} beau")) == f"{mojibake}beau"
    assert words(built("SigLIP"), "Salt &amp; “PEPPER”, isn't (it)?") == ["Salt", "PEPPER", "isn't", "it"]
    assert words(built("BERT"), "ÉTÉ zebra-ZEBRA 漢漢") == ["ÉTÉ", "zebra", "-", "ZEBRA", "漢", "漢"]


def test_positions_are_those_of_the_tokens() -> None:
    tokenizer = SimpleTokenizer()
    text = "Antidisestablishmentarianism isn't fun, naïve friend!"
    row = tokenizer([text])[0].tolist()
    found = TokenReader(tokenizer).words(text, row)
    assert [word.text for word in found] == [
        "Antidisestablishmentarianism",
        "isn't",
        "fun",
        ",",
        "naïve",
        "friend",
        "!",
    ]
    assert [p for word in found for p in word.positions] == list(range(1, row.index(tokenizer.eot_token_id)))
    for word in found:
        spelled = tokenizer.decode([row[p] for p in word.positions]).replace(" ", "")
        assert spelled == word.text.lower()


def test_transformers_clip_finds_the_words_of_open_clips(tmp_path) -> None:
    simple = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocabulary.write_text(json.dumps({names.get(piece, piece): i for piece, i in simple.encoder.items()}))
    merges.write_text("#version: 0.2\n" + "".join(f"{one} {two}\n" for one, two in simple.bpe_ranks))
    other = transformers.CLIPTokenizerFast(str(vocabulary), str(merges))
    readers = [TokenReader(simple), TokenReader(other)]
    for text in ["A Dog  isn't HERE, café!", "हिन्दी भाषा", "一只猫 在 沙发上", "dog " * 90]:
        rows = [reader.ids([text], 77)[0] for reader in readers]
        kept = int(rows[0].argmax()) + 1
        assert torch.equal(rows[0][:kept], rows[1][:kept])
        assert readers[0].words(text, rows[0].tolist()) == readers[1].words(text, rows[1].tolist())
        assert readers[0].cut(text, rows[0].tolist()) == readers[1].cut(text, rows[1].tolist())


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "pieces only"])
def test_what_a_cut_costs(built, name) -> None:
    text = " ".join(["a dog"] * 120)
    reader = TokenReader(built(name))
    row = reader.ids([text], 20)[0].tolist()
    cut, found = reader.cut(text, row), reader.words(text, row)
    assert cut is not None and cut.tokens > cut.kept > 0
    covered = text[found[0].start : found[-1].end]
    whole = cut.lost + covered if name == "cut in front" else covered + cut.lost
    assert whole.replace(" ", "") == text.replace(" ", "")
    short = reader.ids(["a dog"], 20)[0].tolist()
    assert reader.cut("a dog", short) is None


def test_a_word_that_was_cut_is_as_long_as_its_tokens(built) -> None:
    tokenizer = SimpleTokenizer(context_length=5)
    text = "a Antidisestablishmentarianism"
    row = tokenizer([text])[0].tolist()
    found, cut = TokenReader(tokenizer).words(text, row), TokenReader(tokenizer).cut(text, row)
    assert cut is not None and found[-1].text + cut.lost == "Antidisestablishmentarianism"


def test_a_model_that_pools_its_last_token(build_clip, built) -> None:
    """A bidirectional tower sees every token, and its pooled position, padding, says nothing about the words."""
    tokenizer = wrapped(built("XLM-R"), "canonicalize", 20)
    module = build_clip(text={"pool_type": "last", "no_causal_mask": True})
    model = clipfast.load(module, tokenizer=tokenizer)
    _, (found,) = model.tokenize_words(["A red dog!"])
    assert [word.text for word in found] == ["A", "red", "dog"]
    out = clipfast.Explainer(model).words(torch.randn(3, 64, 64), "A red dog!")
    assert out.words == ["A", "red", "dog"] and [out.text[a:b] for a, b in out.offsets] == out.words
    with pytest.warns(UserWarning, match=r"cut to the \d+ that .* takes; lost: '.*dog'"):
        model.tokenize(["a dog " * 20])


def test_an_end_of_text_inside_ends_a_causal_text(build_clip) -> None:
    model = clipfast.load(build_clip(vocab_size=49408, context_length=77), tokenizer=SimpleTokenizer())
    _, (found,) = model.tokenize_words(["a dog <end_of_text> a cat"])
    assert [word.text for word in found] == ["a", "dog"]
    maps = clipfast.Explainer(model, "tclip").word_maps(torch.randn(1, 3, 64, 64), "A dog <end_of_text> a cat")
    assert maps.texts == ["A", "dog"]


def test_a_transformers_tokenizer_of_ones_own(build_clip, built) -> None:
    """It pads and cuts as the model takes it."""
    for name in ("BERT", "processor"):
        model = clipfast.load(build_clip(), tokenizer=built(name))
        assert model.tokenize(["a dog", "two"]).shape == (2, 20)


def test_no_pieces_and_no_characters() -> None:
    reader = TokenReader(lambda texts: torch.zeros(len(texts), 4, dtype=torch.long))
    with pytest.raises(TextError, match="has no `decoder`"):
        reader.words("a dog", [0, 1, 2, 3])
    assert reader.cut("a dog", [0, 1, 2, 3]) is None


def test_lone_surrogates(built) -> None:
    """Some tokenizers replace or drop them; of the others none says well what is wrong."""
    for name in ("open_clip", "BERT in open_clip"):
        found = words(built(name), "a \ud800 dog")
        assert (found[0], found[-1]) == ("a", "dog")
    for tokenizer in (built("BERT"), lambda texts: torch.tensor([[*texts[0].encode()]])):
        with pytest.raises(TextError, match="cannot be encoded"):
            TokenReader(tokenizer).ids(["a \ud800 dog"], 20)


def test_tokens_that_say_nothing_go_with_the_word_behind_them() -> None:
    found = group("a  b", [(1, None), (2, (0, 1)), (3, (1, 3)), (4, (3, 4)), (5, None)])
    assert found == [("a", [1, 2], 0, 1), ("b", [3, 4], 3, 4)]


def spelled(text: str, normal: str | list[str]) -> list[str | None]:
    return [None if span is None else text[slice(*span)] for span in align(text, normal)]


def test_alignment() -> None:
    assert spelled("A  B", "a b") == ["A", None, "B"]
    assert spelled("½", "1⁄2") == ["½"] * 3
    assert spelled("x, y", "x y") == ["x", None, "y"]
    assert spelled("&amp;lt;", "<") == ["&amp;lt;"]
    assert spelled("dog dog", "dog") == ["d", "o", "g"]
    assert align("dog dog", "dog") == [(0, 1), (1, 2), (2, 3)]
    assert spelled("ab ÐÐ ÑÑ", "ab п р")[3::2] == ["ÐÐ", "ÑÑ"]
    assert spelled("a qux bar c", ["a", "", "", "c"]) == ["a", "qux", "bar", "c"]
    assert spelled(" \n", "ab") == [None, None] and align("", "") == []


def test_alignment_of_long_texts_costs_what_they_are_long() -> None:
    text = "The quick brown fox, jumps! " * 3000
    normal = canonicalize_text(text)
    found = align(text, normal)
    assert all(span is None if c == " " else text[span[0]].lower() == c for c, span in zip(normal, found, strict=True))
    changed = "xy" * 4000
    assert len(align(changed, "yx" * 3000)) == 6000


def test_alignment_is_in_order() -> None:
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(WRITTEN, WRITTEN)
    def check(text: str, normal: str) -> None:
        spans = [span for span in align(text, normal) if span is not None]
        assert spans == sorted(spans) and all(0 <= a < b <= len(text) for a, b in spans)
        assert [end for _, end in spans] == sorted(end for _, end in spans)

    check()
