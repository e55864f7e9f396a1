"""Rows of files of prompts: what they may hold, and that any content is read or refused in one line."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.sources import ROOT

from cachekit.tools.batch.rows import BatchError, Defaults, read_rows, tasks_of


@pytest.fixture
def read(tmp_path):
    def read(text, name="rows.jsonl"):
        file = tmp_path / name
        file.write_text(text, encoding="utf-8")
        return read_rows(str(file))

    return read


def test_the_rows_of_the_page_on_batches_are_read(read):
    page = (ROOT / "docs" / "generating.md").read_text()
    (text,) = re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    found, wrong = tasks(read(text))
    assert (len(found), wrong) == (text.count("\n"), [])


def tasks(rows, **defaults):
    return tasks_of(rows, Defaults(**defaults), {"model": "m"})


def test_a_text_has_a_prompt_on_each_line_and_seeds_count_up(read):
    rows = read("\ufeffa cat\n\n  two\u2028cats \r\n{a brace}\n", "prompts.txt")
    found, wrong = tasks(rows, seed=5, steps=9, size=(64, 32))
    assert [(task.line, task.prompt, task.seed) for task in found] == [
        (1, "a cat", 5),
        (3, "two\u2028cats", 6),
        (4, "{a brace}", 7),
    ]
    assert {(task.steps, task.size) for task in found} == {(9, (64, 32))}
    assert wrong == []


def test_json_rows_have_settings_of_their_own(read):
    rows = read(
        '{"prompt": "a", "seed": 3, "steps": 4, "size": "64x32", "guidance": 2, "spec": "tgate:m=2 + deepcache"}\n'
        '{"prompt": "a", "spec": []}\n{"prompt": "a"}\n',
        "prompts.txt",
    )
    (own, plain, default), _ = tasks(rows, specs=("forecast",), guidance=7.0)
    assert (own.seed, own.steps, own.size, own.guidance) == (3, 4, (64, 32), 2.0)
    assert own.parsed == ("deepcache", "tgate:m=2")
    assert (plain.parsed, plain.seed, plain.guidance) == ((), 1, 7.0)
    assert default.parsed == ("forecast",)


def test_the_key_is_of_all_that_an_image_depends_on_and_of_nothing_else(read):
    rows = read('{"prompt": "a", "seed": 3}\n{"prompt": "a", "seed": 3, "spec": "tgate"}\n{"prompt": "b"}\n')
    again = read('{"prompt": "z"}\n{"seed": 3, "prompt": "a", "spec": ["tgate:m=10"]}\n{"prompt": "a", "seed": 3}\n')
    one, two = ([task.key for task in tasks(found)[0]] for found in (rows, again))
    assert one[:2] == [two[2], two[1]]
    assert len({*one, *two}) == 4
    assert tasks_of(rows, Defaults(), {"model": "other"})[0][0].key != one[0]
    assert tasks(rows, steps=3)[0][0].key != one[0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "sed": 1}', "unknown key 'sed' (did you mean 'seed'?); allowed: prompt, seed, steps, size,"),
        ('{"seed": 1}', "prompt is needed"),
        ('{"prompt": ""}', "prompt=: String should have at least 1 character"),
        ('{"prompt": "a", "steps": 0}', "steps=0: Input should be greater than or equal to 1"),
        ('{"prompt": "a", "seed": true}', "seed=True: Input should be a valid integer"),
        ('{"prompt": "a", "size": 64}', "size=64: give width x height in pixels, such as '768x512'"),
        ('{"prompt": "a", "guidance": NaN}', "guidance=nan: Input should be a finite number"),
        ('{"prompt": "a", "spec": 3}', "spec=3: give a spec, or a list of specs"),
        ('{"prompt": "a", "spec": "tgate++"}', "nothing on one side of '+'"),
        ("a cat", "not JSON: Expecting value: line 1 column 1 (char 0); write {"),
        ("[1]", "'[1]' is no JSON object"),
    ],
)
def test_a_bad_row_is_one_line_with_its_number_and_what_is_allowed(read, line, reason):
    rows = read('{"prompt": "good"}\n' + line + "\n")
    assert [row.prompt for _, row in rows.rows] == ["good"]
    (problem,) = rows.problem_lines([])
    assert problem.startswith(f"{rows.source}:2: ")
    assert reason in problem
    assert "\n" not in problem


def test_a_wrong_spec_leaves_out_its_row_alone(read):
    rows = read('not json\n{"prompt": "a"}\n{"prompt": "a", "spec": "tgat"}\n')
    found, wrong = tasks(rows)
    assert [task.line for task in found] == [2]
    lines = rows.problem_lines(wrong)
    assert [line.split(":")[1] for line in lines] == ["1", "3"]
    assert "did you mean 'tgate'?" in lines[1]


@pytest.mark.parametrize(("text", "said"), [("\n \n", "the file holds none"), ("{\n", "no row can be read; line 1: ")])
def test_a_file_without_rows_is_refused(read, text, said):
    with pytest.raises(BatchError, match=said):
        read(text)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BatchError, match="No such file"):
        read_rows(str(tmp_path / "none.txt"))


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.text(max_size=3))
ROWS = st.dictionaries(st.sampled_from(["prompt", "seed", "steps", "size", "guidance", "spec", "x"]), VALUES)


@given(content=st.binary() | st.lists(ROWS.map(json.dumps)).map(lambda lines: "\n".join(lines).encode()))
@example(content=b"[" * 20_000)
@example(content=b'{"a":' * 20_000)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_content_is_read_or_refused_in_one_line(tmp_path, content):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    try:
        rows = read_rows(str(file))
        lines = rows.problem_lines(tasks_of(rows, Defaults(), {})[1])
    except BatchError as error:
        lines = [str(error)]
    assert all(len(line.splitlines()) == 1 for line in lines)
