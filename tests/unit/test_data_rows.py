"""Columns, empty cells, encodings, duplicates, parts, streams, and labels."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from instant_reward.assemble import load_parts, load_prompt_rows
from instant_reward.config import Config, DataConfig
from instant_reward.data import Row, TextsIn, check_labels, label_of, labels_of, load_rows, split
from instant_reward.types import UserError


def data(**values: Any) -> DataConfig:
    return Config.build({"data": values}).data


def write_csv(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


# Columns


def test_columns_get_new_names_and_the_others_keep_theirs(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", "review,answer,stars", "a film,yes,4", "一部电影,no,1")
    rows = load_rows(path, columns={"prompt": "review", "label": "stars"})
    assert rows[0] == {"answer": "yes", "prompt": "a film", "label": "4"}
    assert rows[1]["prompt"] == "一部电影"
    assert rows[1].where.endswith("a.csv, line 3")  # type: ignore[attr-defined]
    assert load_rows(path, "b", columns={"b": "answer", "answer": "review"})[0]["answer"] == "a film", "exchanged"
    assert load_prompt_rows(data(path=str(path), columns={"prompt": "review"})) == load_rows(
        path, columns={"prompt": "review"}
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "reviews"}, r"line 2 has no column 'reviews' \(it has: review, answer\): correct data\.columns\."),
        ({"prompt": "review", "answer": "review"}, r"line 2 has a column 'answer' already, which data"),
        ({"text": "review"}, r"line 2 has no column 'prompt' \(it has: answer, text\)"),
    ],
)  # fmt: skip
def test_bad_names_are_named(columns: dict[str, str], message: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", "review,answer", "a film,yes")
    with pytest.raises(UserError, match=message):
        load_rows(path, columns=columns)


def test_a_cell_that_is_needed_must_hold_something(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["a", "b", None], "score": pyarrow.array([1.0, float("nan"), 2.0])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 3 has an empty cell \(None\) in the column 'prompt'"):
        load_rows(tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a\.parquet, row 2 has an empty cell \(nan\) in the column 'score': fill it in"
    ):
        load_rows(tmp_path / "a.parquet", needed=["score"])
    assert len(load_rows(tmp_path / "a.parquet", limit=2)) == 2, "a cell that nobody needs may be empty"
    path = write_csv(tmp_path / "a.csv", "prompt,answer", "a,b", '"two', 'lines",b', "a,")
    with pytest.raises(UserError, match=r"a\.csv, line 5 has an empty text in the column 'answer'"):
        load_prompt_rows(data(path=str(path), completion="answer"))
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "n": 1}\n{"prompt": NaN, "n": 1}')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 has an empty cell \(nan\) in the column 'prompt'"):
        load_rows(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl, line 1 has no column 'm' \(it has: prompt, n\)"):
        load_rows(tmp_path / "a.jsonl", limit=1, needed=["m"])


def test_a_row_that_spans_lines_is_named_by_its_first(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", "prompt,n", '"two', 'lines",1', "", "a,1,2")
    with pytest.raises(UserError, match=r"a\.csv, line 5 has 3 cells, not the 2 columns"):
        load_rows(path)
    path = write_csv(tmp_path / "d.csv", "prompt,n", '"a', 'row",of,three', "b,1")
    with pytest.raises(UserError, match=r"d\.csv, line 2 has 3 cells"):
        load_rows(path)
    path = write_csv(tmp_path / "b.csv", "prompt,n", "a,1", '"never closed,1', "b,1", "c,1")
    with pytest.raises(UserError, match=r"b\.csv, line 3 is no valid CSV"):
        load_rows(path)
    path = write_csv(tmp_path / "c.csv", "prompt,prompt", "a,b")
    with pytest.raises(UserError, match=r"c\.csv, line 1 names the column 'prompt' twice"):
        load_rows(path)


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    """Python's reader takes 131,072 characters by itself: less than many documents have."""
    text = "电影 " * 100_000
    path = write_csv(tmp_path / "a.csv", "prompt,n", "a,1", f'"{text}",2', encoding="utf-8")
    assert [row["prompt"] for row in load_rows(path)] == ["a", text]


def test_half_a_character_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "\\ud83d\\ude00", "b": "c"}\n{"prompt": "a\\ud83d", "b": "\\ude00"}\n'
    )
    assert load_rows(tmp_path / "a.jsonl", limit=1)[0]["prompt"] == "\U0001f600"
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 has half a character \('\\ud83d'\) in the column 'prompt'"):
        load_rows(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"prompt 0 has half a character \('\\ude00'\) in the column 'b': mend it"):
        load_rows([{"prompt": "a", "b": "\ude00"}], needed=["b"])
    with pytest.raises(UserError, match="prompt 0 has half a character"):
        load_rows([[{"role": "user", "content": "\ud83d"}]])


# Encodings


@pytest.mark.parametrize("suffix", ["csv", "txt", "jsonl", "tsv"])
def test_a_line_in_another_encoding_is_named(suffix: str, tmp_path: Path) -> None:
    lines = {"jsonl": '{"prompt": "%s"}'}.get(suffix, "%s")
    head = b"prompt\n" if suffix in ("csv", "tsv") else b'"a"\n'
    good = [(lines % f"第 {number} 行").encode() for number in range(3000)]
    bad = (lines % "电影").encode("gb18030")
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(head + b"\n".join([*good, bad, *good]))
    place = 13 if suffix == "jsonl" else 1
    with pytest.raises(
        UserError, match=rf"a\.{suffix}, line 3002 is not UTF-8 text \(byte {place} of the line is 0xb5\)"
    ):
        load_rows(path)
    with pytest.raises(UserError, match=r"line 3002 is not UTF-8"):
        load_rows(path, stream=True)


def test_other_encodings_are_read_when_named(tmp_path: Path) -> None:
    for encoding in ("gb18030", "utf-16", "big5", "cp1252", "utf-8"):
        text = "schön" if encoding == "cp1252" else "電影很好"
        path = write_csv(tmp_path / "a.csv", "prompt,n", f"{text},1", encoding=encoding)
        assert load_prompt_rows(data(path=str(path), encoding=encoding)) == [{"prompt": text, "n": "1"}]
    (tmp_path / "b.json").write_bytes(json.dumps(["电影"], ensure_ascii=False).encode("gb18030"))
    assert load_rows(tmp_path / "b.json", encoding="gb18030") == [{"prompt": "电影"}]
    with pytest.raises(UserError, match=r"b\.json, line 1 is not UTF-8 text \(byte 3 of the line is 0xb5\)"):
        load_rows(tmp_path / "b.json")
    with pytest.raises(UserError, match=r"a\.csv, line 2 is not gb18030 text \(byte 1 of the line"):
        load_rows(write_bytes(tmp_path / "a.csv", b"prompt\n\xff\xff\n"), encoding="gb18030")
    with pytest.raises(UserError, match=r"a\.csv is not utf-16 text \("):
        load_rows(write_bytes(tmp_path / "a.csv", "prompt\n".encode("utf-16") + b"\x00\xd8\x00"), encoding="utf-16")
    with pytest.raises(UserError, match=r"data\.encoding: there is no encoding 'hex': name one that Python knows"):
        load_rows(tmp_path / "a.csv", encoding="hex")
    with pytest.raises(UserError, match=r"data\.encoding: there is no encoding 'utf-9': name one that Python knows"):
        load_rows(tmp_path / "a.csv", encoding="utf-9")


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# Data sets


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_dict({"prompt": ["a", "电影", "c"], "label": [0, 1, 0]})
    found.select([2, 1]).save_to_disk(str(tmp_path / "one"))
    assert load_rows(tmp_path / "one") == [{"prompt": "c", "label": 0}, {"prompt": "电影", "label": 1}]
    assert [row["prompt"] for row in load_rows(tmp_path / "one", stream=True)] == ["c", "电影"]
    datasets.DatasetDict({"train": found, "test": found.select([0])}).save_to_disk(str(tmp_path / "both"))
    parts = load_parts(data(split={"train": str(tmp_path / "both" / "train"), "test": str(tmp_path / "both" / "test")}))
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 3, "test": 1}
    with pytest.raises(UserError, match=r"both has several parts: name one of them \(.*both/train, .*both/test\)"):
        load_rows(tmp_path / "both")
    (tmp_path / "one" / "state.json").unlink()
    with pytest.raises(UserError, match=r"the data set .*one cannot be read"):
        load_rows(tmp_path / "one")


def test_without_datasets_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets: run `pip install datasets`"):
        load_rows(tmp_path)


# Duplicates


def test_duplicates_are_left_out(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", "prompt,n", "a,1", "b,2", "a,3", "A,4", "b,5")
    assert [row["n"] for row in load_rows(path, unique="prompt")] == ["1", "2", "4"]
    assert [row["n"] for row in load_rows(path, unique="prompt", limit=2)] == ["1", "2"]
    assert len(load_prompt_rows(data(path=str(path), unique="prompt"))) == 3
    assert [row["n"] for row in load_rows(path, unique="prompt", stream=True)] == ["1", "2", "4"]
    messages = [[{"role": "user", "content": text}] for text in ("hi", "hi", "ho")]
    assert len(load_rows(messages, unique="prompt")) == 2
    with pytest.raises(UserError, match="line 2 has no column 'text'"):
        load_rows(path, unique="text")


# Parts


def test_parts_share_no_row_and_lose_none() -> None:
    rows = list(range(1003))
    parts = split(rows, {"train": 0.8, "validation": 0.1, "test": 0.1}, seed=3)
    assert [len(part) for part in parts.values()] == [802, 101, 100]
    assert sorted([*parts["train"], *parts["validation"], *parts["test"]]) == rows
    assert parts["test"] == sorted(parts["test"])
    assert parts["test"] != list(range(parts["test"][0], parts["test"][0] + 100))
    assert 0.35 < sum(row < 500 for row in parts["test"]) / 100 < 0.65


def test_parts_hang_on_the_seed_and_the_number_of_rows_alone() -> None:
    fractions = {"train": 0.5, "test": 0.3}
    first = split(list(range(50)), fractions, seed=1)
    assert split(list(range(50)), fractions, seed=1) == first
    assert split(list(range(50)), fractions, seed=2) != first
    texts = [f"text {(number * 7) % 50}" for number in range(50)]
    assert split(texts, fractions, seed=1)["test"] == [texts[number] for number in first["test"]]
    assert len(first["train"]) + len(first["test"]) == 40, "the rest is left out"


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"train": 0.9, "test": 0.2}, "add up to 1 or less"),
        ({"train": 0.0, "test": 0.2}, "must be above 0"),
        ({}, "must be above 0"),
        ({"train": 0.9, "test": 0.1}, r"4 rows are too few for test=0\.1: it would have none"),
    ],
)
def test_bad_fractions_are_named(fractions: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split(list(range(4)), fractions)


def test_a_config_takes_one_part(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", "prompt", *(f"text {number % 40}" for number in range(80)))
    options = {"path": str(path), "unique": "prompt", "split": {"train": 0.75, "test": 0.25, "seed": 4}}
    whole = load_parts(data(**options))
    train, test = load_prompt_rows(data(**options)), load_prompt_rows(data(**options, part="test"))
    assert whole == {"train": train, "test": test}
    assert (len(train), len(test)) == (30, 10)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}, "duplicates went first"
    assert load_prompt_rows(data(**options, part="test", limit=3)) == test[:3], "a limit leaves the parts as they are"
    listed = data(prompts=[f"text {number}" for number in range(10)], split={"train": 0.5, "test": 0.5})
    assert [len(rows) for rows in load_parts(listed).values()] == [5, 5]
    assert load_parts(data(prompts=["a"]))["train"] == [{"prompt": "a"}]


def test_a_part_may_be_a_file(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write_csv(tmp_path / f"{name}.csv", "prompt", f"{name} 1", f"{name} 2")
    files = {name: str(tmp_path / f"{name}.csv") for name in ("train", "validation")}
    assert load_prompt_rows(data(split=files))[0] == {"prompt": "train 1"}
    assert load_prompt_rows(data(split=files, part="validation", limit=1)) == [{"prompt": "validation 1"}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "a.csv", "split": {"train": 0.9, "test": 0.2}}, r"data\.split: the fractions add up to 1\.1"),
        ({"path": "a.csv", "split": {"train": 0.9, "test": "b.csv"}}, r"data\.split: give each part as a fraction"),
        ({"path": "a.csv", "split": {}}, r"data\.split: give each part as a fraction"),
        ({"path": "a.csv", "split": {"train": "b.csv"}}, r"data: give exactly one .*path and split's files"),
        ({"path": "a.csv", "part": "test"}, r"data: part is test, which split does not name"),
        ({"path": "a.csv", "split": {"train": 0.5}, "part": "test"}, r"data: part is test, which split does not name"),
        ({"split": {"train": "a.csv", "seed": 3}}, r"data\.split: a seed draws fractions"),
        ({"path": "a.csv", "split": {"tests": 0.5}}, r"data\.split\.tests: .*did you mean test\?"),
        ({"rollouts": "a.jsonl", "unique": "prompt"}, r"data: rollouts are taken as they are; leave out unique"),
    ],
)
def test_a_split_that_contradicts_itself_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data(**values)


def test_a_split_comes_back_from_the_dump_of_its_config(tmp_path: Path) -> None:
    config = Config.build({"data": {"path": "a.csv", "split": {"train": 0.5, "test": 0.5}, "columns": {"prompt": "x"}}})
    (tmp_path / "config.yaml").write_text(config.dump())
    assert Config.load(tmp_path / "config.yaml", ["rewards=[m:f]"]).data == config.data


# Streams


def test_streamed_rows_are_the_rows(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "a.csv", "review,n", *(f"电影 {number},{number % 7}" for number in range(50)), "电影 3,9"
    )
    plain = data(path=str(path), columns={"prompt": "review"}, unique="prompt", limit=20)
    streamed = plain.model_copy(update={"stream": True})
    assert list(load_prompt_rows(streamed)) == list(load_prompt_rows(plain))
    assert load_prompt_rows(streamed)[3].where.endswith("a.csv, line 5")  # type: ignore[attr-defined]
    cut = data(path=str(path), columns={"prompt": "review"}, split={"train": 0.7, "test": 0.2}, limit=5, stream=True)
    whole = load_parts(cut.model_copy(update={"stream": False}))
    assert {name: list(rows) for name, rows in load_parts(cut).items()} == whole
    pairs = data(path=str(path), column=["review", "n"], stream=True)
    assert load_prompt_rows(pairs)[1]["prompt"] == ["电影 1", "1"]
    with pytest.raises(UserError, match=r"a\.csv, line 2 has no column 'prompt'"):
        load_rows(path, stream=True)
    with pytest.raises(UserError, match="holds no prompts"):
        load_rows(write_csv(tmp_path / "b.csv", "prompt"), stream=True)


def many(count: int) -> Iterator[dict[str, str]]:
    yield from ({"prompt": f"{number} {'字' * 700}", "n": str(number)} for number in range(count))


def test_streamed_rows_stay_out_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8") as handle:
        handle.write("prompt,n\n")
        handle.writelines(f"{row['prompt']},{row['n']}\n" for row in many(10_000))
    for source in (path, many(10_000)):
        tracemalloc.start()
        try:
            parts = split(load_rows(source, unique="prompt", stream=True), {"train": 0.9, "test": 0.1})
            assert sum(int(row["n"]) for rows in parts.values() for row in rows) == 49_995_000
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < path.stat().st_size / 10, f"{peak} bytes for a file of {path.stat().st_size}"


# Labels


def rows_of(*labels: Any) -> list[Row]:
    return [Row({"label": label}, f"a.csv, line {number}") for number, label in enumerate(labels, start=2)]


def test_labels_are_texts_in_an_order_of_their_own() -> None:
    assert labels_of(rows_of("10", "9", 9, 9.0, "-1")) == ["-1", "9", "10"]
    assert labels_of(rows_of("good", "bad", " bad ", "3", "好")) == ["3", "bad", "good", "好"]
    assert labels_of(rows_of(True, False, 1)) == ["0", "1"]
    assert label_of({"stars": 0.5}, "stars") == "0.5"
    with pytest.raises(UserError, match=r"a\.csv, line 3 has an empty cell \(nan\) in the column 'label'"):
        labels_of(rows_of(1, float("nan")))
    with pytest.raises(UserError, match=r"a\.csv, line 2 has an empty text in the column 'label'"):
        labels_of(rows_of(""))
    with pytest.raises(UserError, match=r"a\.csv, line 2 has no column 'stars' \(it has: label\)"):
        labels_of(rows_of(1), "stars")


def test_labels_are_compared_between_the_parts() -> None:
    assert check_labels({"train": rows_of(0, 1, 1), "test": rows_of("1", "0")}) == ["0", "1"]
    with pytest.raises(
        UserError, match=r"a\.csv, line 4 \(test\) has the label '2', which training never sees \(it has: 0, 1"
    ):
        check_labels({"train": rows_of(0, 1), "test": rows_of(0, 1, 2)})
    with pytest.raises(UserError, match=r"validation has no row with the label b: give it more rows, or split anew"):
        check_labels({"train": rows_of("a", "b"), "validation": rows_of("a")})
    with pytest.raises(UserError, match=r"train has the one label 'a' in the column 'label'"):
        check_labels({"train": rows_of("a", "a")})


def test_texts_are_found_in_rows_of_texts_and_messages() -> None:
    rows = load_rows([{"prompt": "a", "b": "c"}, {"prompt": [{"role": "user", "content": "d"}], "b": ""}])
    assert list(TextsIn(rows, ["prompt", "b"])) == ["a", "c", "d", ""]
    assert Counter(TextsIn(rows, ["b"])) == Counter(["c", ""])
    assert list(TextsIn(load_rows([{"prompt": "a", "n": 3.0}, {"prompt": "b", "n": True}]), ["n"])) == ["3", "1"]
    with pytest.raises(UserError, match="prompt 0 has no text in the column 'n'"):
        list(TextsIn(load_rows([{"prompt": "a", "n": {"b": 3}}]), ["n"]))


def test_the_pages_examples_are_configs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 4
    for example in examples:
        Config.build({"data": {"prompts": ["a"]}, **yaml.safe_load(example)})
