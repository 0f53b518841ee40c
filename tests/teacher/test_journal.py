"""The journal: any prefix of its bytes goes on, nothing is lost, repeated or merged into its neighbour."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.arguments import UserError
from recipes.teacher.journal import Journal, refuse_changes

SETTINGS = {"model": "m", "temperature": 0.7}


def record(number: int, text: str = "x") -> dict:
    return {"pair_id": f"p{number}", "perspective": "unified", "sample_index": 0, "prompt_hash": "h", "text": text}


def write(path, records):
    journal = Journal(path)
    if journal.settings is None:
        journal.begin(SETTINGS)
    journal.append(records)
    journal.close()


texts = st.lists(st.text(), min_size=1, max_size=6)


@given(texts=texts, data=st.data())
@settings(deadline=None, max_examples=30)
def test_any_prefix_of_bytes_resumes(texts, data):
    records = [record(number, text) for number, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "journal.jsonl")
        write(path, records)
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:cut])
        journal = Journal(path)
        complete_lines = whole[:cut].count(b"\n")
        assert len(journal.done) == max(0, complete_lines - 1)
        assert (journal.settings == SETTINGS) == (complete_lines > 0)
        journal.close()
        write(path, records)
        assert path.read_bytes() == whole


@given(texts=texts, garbage=st.binary(max_size=40), data=st.data())
@settings(deadline=None, max_examples=30)
def test_a_damaged_line_costs_that_line_alone(texts, garbage, data):
    records = [record(number, text) for number, text in enumerate(texts)]
    garbage = garbage.replace(b"\n", b"")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "journal.jsonl")
        write(path, records)
        lines = path.read_bytes().splitlines(keepends=True)
        damaged = data.draw(st.integers(1, len(lines) - 1))
        lines[damaged] = garbage + b"\n"
        path.write_bytes(b"".join(lines))
        journal = Journal(path)
        assert journal.damaged == 1
        assert len(journal.done) == len(texts) - 1
        journal.append(records)
        journal.close()
        again = Journal(path)
        assert sorted(r["text"] for r in again.records()) == sorted(texts)
        again.close()


def test_a_key_is_kept_once(tmp_path):
    write(tmp_path / "j", [record(0, "first"), record(0, "second")])
    write(tmp_path / "j", [record(0, "third"), record(1)])
    journal = Journal(tmp_path / "j")
    assert [r["pair_id"] for r in journal.records()] == ["p0", "p1"]


def test_text_that_json_lines_could_stumble_over(tmp_path):
    text = "a\nb\u2028c\x85d\x00 \ud800 \U0001f600"
    write(tmp_path / "j", [record(0, text)])
    journal = Journal(tmp_path / "j")
    assert [r["text"] for r in journal.records()] == [text]


def test_only_one_process_writes(tmp_path):
    first = Journal(tmp_path / "j")
    with pytest.raises(UserError, match="another process"):
        Journal(tmp_path / "j")
    first.close()
    Journal(tmp_path / "j").close()


def test_a_file_that_is_no_journal_is_left_alone(tmp_path):
    for content in ("my notes\n", "my notes", "[]\n", json.dumps({"format": "other"}) + "\n", "3\n"):
        (tmp_path / "j").write_text(content)
        with pytest.raises(UserError, match="not a journal"):
            Journal(tmp_path / "j")
        assert (tmp_path / "j").read_text() == content
        os.remove(tmp_path / "j")


def test_overwrite_begins_again(tmp_path):
    write(tmp_path / "j", [record(0)])
    journal = Journal(tmp_path / "j", overwrite=True)
    assert not journal.done
    assert journal.settings is None
    journal.close()
    # Nothing is thrown away before there is something to put in its place.
    journal = Journal(tmp_path / "j")
    assert len(journal.done) == 1
    journal.close()
    journal = Journal(tmp_path / "j", overwrite=True)
    journal.begin(SETTINGS)
    journal.close()
    assert not Journal(tmp_path / "j").done


def test_changed_settings_are_named(tmp_path):
    refuse_changes(tmp_path, SETTINGS, dict(SETTINGS))
    with pytest.raises(UserError, match=r"temperature was 0\.7, is 0\.9.*--overwrite"):
        refuse_changes(tmp_path, SETTINGS, {**SETTINGS, "temperature": 0.9})
    with pytest.raises(UserError, match="adapter was None, is 'a'"):
        refuse_changes(tmp_path, SETTINGS, {**SETTINGS, "adapter": "a"})
