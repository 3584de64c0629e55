"""Rules about words: grammar, spelling, keywords and language, by hand; and what is said of bad arguments."""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from instant_reward.assemble import build_rewards
from instant_reward.config import RewardConfig
from instant_reward.rewards import grammar, language, spelling
from instant_reward.rewards.base import as_reward
from instant_reward.rewards.compose import change
from instant_reward.rewards.grammar import Grammar
from instant_reward.rewards.keywords import AvoidKeywords, Keywords
from instant_reward.rewards.language import Language
from instant_reward.rewards.spelling import Spelling
from instant_reward.rewards.watch import Watch
from instant_reward.text import Pieces, TextDecoder
from instant_reward.types import Prompt, UserError, View
from tiny import END, shared_tokenizer


def marks(
    reward: Any, text: str, prompt: str = "", messages: Any = None, every: str | None = None, **info: Any
) -> list[tuple[str, float]]:
    """What a text is paid, piece by piece: the characters and the value of each span."""
    about = Prompt("p3", prompt, [1], messages=messages, info=info)
    one = as_reward(reward)
    state, start, found = one.start(about), 0, []
    for end in Pieces(every or one.every).ends(text, 0, True):
        view = View(text[:end], text[start:end], about, info, done=end == len(text))
        (spans,) = one.rate([view], [state])
        found += [(text[span.start : span.end], span.value) for span in spans or []]
        start = end
    return found


def marked(reward: Any, text: str, **options: Any) -> list[str]:
    return [characters for characters, _ in marks(reward, text, **options)]


class TestGrammar:
    @pytest.mark.parametrize(
        ("text", "wrong"),
        [
            ("I has two cats.", ["has"]),
            ("This is an test.", ["an"]),
            ("He go to school.", ["go"]),
            ("It was a a long day.", ["a a"]),
            ("She dont like apples.", ["dont"]),
            ("Fine. I has two cats. He go home.", ["has", "go"]),
            ("👍🏽 This is an test.", ["an"]),
            ("今天很好。This is an test.", ["an"]),
        ],
    )
    def test_what_harper_marks_is_a_penalty_on_its_characters(self, text: str, wrong: list[str]) -> None:
        assert marks(Grammar(), text) == [(part, -1.0) for part in wrong]
        assert marks(Grammar(penalty=0.25), text) == [(part, -0.25) for part in wrong]

    @pytest.mark.parametrize(
        "text",
        ["", "The movie was good and I liked it.", "Tarantino met Sevigny in Bollnäs.", "It is very good, I think..."],
    )
    def test_right_sentences_names_and_matters_of_style_are_left_alone(self, text: str) -> None:
        assert marks(Grammar(), text) == []

    def test_kinds_of_marks_can_be_left_out_or_taken_in(self) -> None:
        assert marked(Grammar(ignore=["Spelling"]), "She dont like this, I think...") == ["..."]
        assert marked(Grammar(ignore=[]), "This moive is very good.") == ["moive", "very good"]

    def test_dialects_spell_differently(self) -> None:
        assert marked(Grammar(dialect="american"), "My favourite colour.") == ["favourite", "colour"]
        assert marked(Grammar(dialect="british"), "My favourite colour.") == []

    def test_the_first_sentence_goes_on_with_the_prompt(self) -> None:
        assert marked(Grammar(), " go to school.", prompt="Well then. He") == ["go"]
        assert marked(Grammar(), " go to school.", prompt="We") == []
        assert marked(Grammar(), " the cat slept.", prompt="I saw that the") == ["the"]
        assert marked(Grammar(), "he was good.", prompt="I has seen t") == []

    def test_a_chat_begins_a_text_of_its_own(self) -> None:
        chat = [{"role": "user", "content": "He"}]
        assert marked(Grammar(), " Go to school.", prompt="user: He\nassistant: He", messages=chat) == []

    def test_each_thread_has_a_linter_of_its_own(self) -> None:
        shared = Grammar()
        text = "I has two cats. This is an test. " * 20
        found: list[list[str]] = []
        workers = [threading.Thread(target=lambda: found.append(marked(shared, text))) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert found == [["has", "an"] * 20] * 3


class TestSpelling:
    @pytest.mark.parametrize(
        ("text", "wrong"),
        [
            ("teh moive was definately good", ["teh", "moive", "definately"]),
            ("a well-knwon actor, smiling;suprised", ["knwon", "suprised"]),
            ("电影teh好看", ["teh"]),
            ("it’s his mothers' and mohter's or mohter’s", ["mohter's", "mohter’s"]),
            ("fourty untill allways", ["fourty", "untill", "allways"]),
        ],
    )
    def test_a_misspelt_word_is_a_penalty_on_its_characters(self, text: str, wrong: list[str]) -> None:
        assert marks(Spelling(), text) == [(word, -1.0) for word in wrong]
        assert marked(Spelling(), text, every="end") == wrong

    @pytest.mark.parametrize(
        "text",
        [
            "the movie isn't bad, I'd say; don’t they've mother's",
            "colour favourites humour neighbours realised organisation analysing theatre centres kilometres grey etc.",
            "Tarantino iPhone NASA McTeh",
            "café naïve cafe\u0301teh москва मूवी",
            "x9teh teh_moive 4th 60's foo@baar.com www.exmaple.com http://teh.moive",
            "e.g. i.e. b c",
            "电影很好看",
        ],
    )
    def test_right_words_names_and_what_is_no_english_word_are_left_alone(self, text: str) -> None:
        assert marks(Spelling(), text) == []

    def test_words_may_be_added(self) -> None:
        assert marked(Spelling(words=["Smollm"]), "a smollm and a gguf") == ["gguf"]

    def test_words_with_capitals_may_be_checked_too(self) -> None:
        assert marked(Spelling(capitalised=True), "Teh MOIVE was Good") == ["Teh", "MOIVE"]


class TestKeywords:
    def test_each_word_pays_its_share_where_it_first_stands(self) -> None:
        reward = Keywords(["cat", "New York", "dog", "猫"])
        text = "Cats? A cat in new\n york, my cat, 小猫。"
        assert marks(reward, text) == [("cat", 0.25), ("new\n york", 0.25), ("猫", 0.25)]
        assert marks(reward, text, every="end") == marks(reward, text)

    def test_avoided_words_cost_each_time(self) -> None:
        reward = AvoidKeywords(["bad", "bad idea", "差劲", "C++"], penalty=0.5)
        text = "Bad. A bad   idea, badly, embad; C++11 真差劲差劲 bad"
        found = ["Bad", "bad", "bad   idea", "C++", "差劲", "差劲", "bad"]
        assert marks(reward, text) == [(part, -0.5) for part in found]
        assert sorted(marked(reward, text, every="end")) == sorted(found)

    @pytest.mark.parametrize(
        ("word", "text", "hits"),
        [
            ("art", "party, art_x, art-house", 1),
            ("cafe", "cafe\u0301 cafe", 1),
            ("iPhone", "用iPhone打", 1),
            ("कम", "कम कमी", 1),
            ("แมว", "ฉันเห็นแมวดำ", 1),
            ("น", "นี่ น", 1),
            ("哈哈", "哈哈哈哈哈", 2),
            ("a-a", "xa-a-a", 1),
            ("👍", "👍👍 x👍", 3),
            ("ÉCOLE", "école", 1),
            ("two words", "two" + " " * 9 + "words", 0),
        ],
    )
    def test_where_words_begin_and_end(self, word: str, text: str, hits: int) -> None:
        assert len(marks(AvoidKeywords([word]), text)) == hits

    def test_the_words_may_stand_in_a_column(self) -> None:
        assert marks(Keywords(column="topic"), "a cat, a dog", topic=["dog", "cow"]) == [("dog", 0.5)]
        assert marks(AvoidKeywords(column="topic"), "a cat, a dog", topic="cat") == [("cat", -1.0)]

    def test_a_word_given_twice_in_another_case_is_one(self) -> None:
        assert marks(Keywords(["Cat", "cat", "dog"]), "a cat") == [("cat", 0.5)]
        assert marks(AvoidKeywords(["cat", "CAT"]), "a Cat") == [("Cat", -1.0)]

    def test_texts_of_one_prompt_do_not_mix(self) -> None:
        reward = Keywords(["cat"])
        assert marks(reward, "a cat") == marks(reward, "a cat") == [("cat", 1.0)]


class TestLanguage:
    ENGLISH = "The movie was good and I liked it."
    FRENCH = "Le film était très bon, je l'ai aimé."
    CHINESE = "电影很好看，我很喜欢。"

    @pytest.mark.parametrize(("code", "text"), [("en", ENGLISH), ("fr", FRENCH), ("zh", CHINESE)])
    def test_each_language_is_told_from_the_others(self, code: str, text: str) -> None:
        for other in ("en", "fr", "zh"):
            score = Language(other)(text)
            assert score > 0.95 if other == code else score < 0.01

    def test_chinese_of_any_kind_is_chinese_and_kana_is_not(self) -> None:
        chinese = Language("zh")
        assert min(map(chinese, ["我", "電影很好看", "佢哋唔係好鍾意", "侬好伐"])) > 0.9
        assert max(map(chinese, ["映画はとても良かった", "영화가 좋았다"])) < 0.01

    def test_a_text_without_words_is_in_no_language(self) -> None:
        assert Language()("") == Language()("\ud83d") == 1 / 32
        assert max(map(Language(), ["123 456, 789", "👍🏽👍🏽👍🏽"])) < 0.1

    def test_fewer_languages_leave_less_doubt(self) -> None:
        assert Language("en", among=["fr"])("The movie") > Language("en")("The movie") > 0.3
        assert Language("en", among=["en"])("") == 0.5  # English, or no language

    def test_a_long_text_is_judged_by_its_end(self) -> None:
        text = self.ENGLISH * 40 + self.FRENCH * 4
        assert Language(last=100)(text) < 0.01
        assert Language(last=None)(text) > 0.9

    def test_change_pays_what_each_word_did(self) -> None:
        one = as_reward(change(Language()))
        about = Prompt("p", "", [])
        state = one.start(about)
        paid = [one.rate([View(text, "", about, {}, done=False)], [state])[0] for text in (self.ENGLISH, self.FRENCH)]
        assert paid[0] > 0.9
        assert paid[1] < -0.9


def test_a_config_names_them_and_the_watcher_marks_tokens() -> None:
    rooms = "instant_reward.rewards"
    configs = [
        RewardConfig(use=f"{rooms}.grammar:Grammar", name="grammar", args={"ignore": ["Style"], "penalty": 0.5}),
        RewardConfig(use=f"{rooms}.spelling:Spelling", name="spelling", args={"words": ["gguf"]}),
        RewardConfig(use=f"{rooms}.keywords:AvoidKeywords", name="avoid", args={"words": ["slow"]}),
        RewardConfig(use=f"{rooms}.language:Language", name="language", args={"language": "en"}),
        RewardConfig(use=f"{rooms}.language:Language", name="word by word", change=True),
    ]
    made = build_rewards(configs)
    assert [one.every for one in made] == ["sentence", "word", "word", "end", "word"]
    tokenizer = shared_tokenizer()
    watch = Watch(made, TextDecoder(tokenizer))
    watch.open(0, Prompt("p", "So", [1, 2]))
    ids = tokenizer(" the the slow moive" + END)["input_ids"]
    found, _ = watch.feed(0, ids, done=True)
    names = [tokenizer.decode([token]) for token in ids]
    spans = {
        source: "".join(names[mark.start - 2 : mark.end - 2]).strip()
        for source in ("grammar", "spelling", "avoid")
        for mark in found
        if mark.source == source
    }
    assert spans == {"grammar": "moive", "spelling": "moive", "avoid": "slow"}
    assert sum(mark.value for mark in found if mark.source == "word by word") == pytest.approx(
        next(mark.value for mark in found if mark.source == "language") - 1 / 32
    )


@pytest.mark.parametrize(
    "reward", [Grammar(), Spelling(words=["x"]), Keywords(["cat"]), AvoidKeywords(["cat"]), Language()]
)
def test_another_process_can_have_them(reward: Any) -> None:
    text = "I has a cat definately."
    twin = pickle.loads(pickle.dumps(reward))
    assert (twin(text) if isinstance(reward, Language) else marks(twin, text)) == (
        reward(text) if isinstance(reward, Language) else marks(reward, text)
    )


class TestRefusals:
    @pytest.mark.parametrize(
        ("kind", "args"),
        [
            (Grammar, {"penalty": 0}),
            (Grammar, {"penalty": float("nan")}),
            (Grammar, {"ignore": ["Speling"]}),
            (Grammar, {"ignore": "Spelling"}),
            (Grammar, {"ignore": None}),
            (Grammar, {"dialect": "scottish"}),
            (Spelling, {"penalty": True}),
            (Spelling, {"words": "teh"}),
            (Spelling, {"words": [1]}),
            (Spelling, {"words": 7}),
            (Spelling, {"capitalised": "yes"}),
            (Keywords, {"words": []}),
            (Keywords, {"words": [" "]}),
            (Keywords, {"words": [1]}),
            (Keywords, {"words": 7}),
            (Keywords, {"column": ""}),
            (AvoidKeywords, {"penalty": -1, "words": ["x"]}),
            (Language, {"language": "xx"}),
            (Language, {"among": ["en", "klingon"]}),
            (Language, {"among": []}),
            (Language, {"among": None}),
            (Language, {"language": ["en"]}),
            (Language, {"among": "en"}),
            (Language, {"last": 0}),
        ],
    )
    def test_arguments_that_are_none(self, kind: Any, args: dict[str, Any]) -> None:
        with pytest.raises(UserError) as caught:
            kind(**args)
        assert str(caught.value).startswith(f"{kind.__name__}: ")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("args", [{}, {"words": ["x"], "column": "topic"}])
    def test_words_come_from_one_place(self, args: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=r"give either words=\[...\] or column"):
            Keywords(**args)

    @pytest.mark.parametrize(
        ("info", "said"),
        [
            ({"n": 1}, r"prompt p3 has no column 'topic' \(it has: n\)"),
            ({"topic": []}, "column 'topic' of prompt p3 holds"),
            ({"topic": ["x", None]}, "column 'topic' of prompt p3 holds None, which is no word"),
        ],
    )
    def test_a_column_without_words(self, info: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=said):
            marks(Keywords(column="topic"), "x", **info)

    @pytest.mark.parametrize(
        ("kind", "module", "package", "forget"),
        [
            (Grammar, "harper", "harper-py", [grammar._linters.__dict__]),
            (Spelling, "spellchecker", "pyspellchecker", [spelling._dictionary]),
            (Language, "py3langid.langid", "py3langid", [language._model]),
        ],
        ids=["grammar", "spelling", "language"],
    )
    def test_a_missing_package_is_named(
        self, kind: Any, module: str, package: str, forget: Sequence[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for known in forget:
            known.clear() if isinstance(known, dict) else known.cache_clear()
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"package {package}; run: pip install 'instant-reward\[rules\]'"):
            kind()
