"""Names of classes: which are refused, and which class a word on the command line means."""

from __future__ import annotations

import os
import unicodedata

import pytest

from stages.images.names import is_split_name, labels_of, passed_over, require_usable, shown
from stages.runtime.errors import InputError

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def meant(text: str, names: list[str]) -> list[str]:
    """Classes that `--classes text` means."""
    return [names[label] for label in labels_of([word.strip() for word in text.split(",")], names)]


def test_an_exact_name_goes_before_one_of_another_case() -> None:
    names = ["CAT", "Cat", "dog"]
    assert meant("Cat,CAT,DOG", names) == ["Cat", "CAT", "dog"]
    with pytest.raises(InputError, match=r"class 'cat' may be 'CAT' and 'Cat': write it as one of them"):
        meant("cat", names)


def test_letters_match_however_they_are_composed() -> None:
    assert COMPOSED != DECOMPOSED
    for name in (COMPOSED, DECOMPOSED):
        for word in (COMPOSED, DECOMPOSED, COMPOSED.upper(), DECOMPOSED.upper()):
            assert meant(word, ["tea", name]) == [name]
    assert meant("STRASSE", ["straße"]) == ["straße"]


def test_names_with_commas_are_found_whole() -> None:
    names = ["Tinca tinca", "goldfish, Carassius auratus", "tench, Tinca tinca", "tench", "a,b"]
    assert meant("tench, Tinca tinca,goldfish, Carassius auratus,A , B", names) == [names[2], names[1], names[4]]
    assert meant("Tinca tinca,tench,tench", names) == ["Tinca tinca", "tench", "tench"]
    assert meant("TENCH,tinca tinca, 0", names) == [names[2], "Tinca tinca"]
    with pytest.raises(InputError, match="class 'b' is unknown"):
        meant("b,a", names)


def test_names_that_differ_in_spaces_alone_are_told_apart_by_number() -> None:
    assert meant(" a , b", ["a", "b "]) == ["a", "b "]
    with pytest.raises(InputError, match=r"class 'a' may be ' a' and 'a'"):
        meant("a", [" a", "a"])
    assert meant("1,0", [" a", "a"]) == ["a", " a"]


def test_a_number_is_a_label_unless_it_is_a_name() -> None:
    names = ["cat", "dog", "7"]
    assert meant("1,7,0", names) == ["dog", "7", "cat"]
    for word in ("3", "01", "-1", "1.0", "²", "٣", "9" * 5000, ""):
        with pytest.raises(InputError, match=r"is unknown, expected a number 0\.\.2 or a name, as 'cat'"):
            meant(word, names)


def test_where_all_names_are_numbers_a_number_is_a_name() -> None:
    digits = sorted(str(number) for number in range(1, 12))  # "10" is the second
    assert meant("10,2,11", digits) == ["10", "2", "11"]
    with pytest.raises(InputError, match="class '0' is unknown, expected a name, as '1'"):
        meant("0", digits)


@pytest.mark.timeout(20)
def test_a_long_list_is_read_in_time() -> None:
    names = [f"class {number}, kind {number % 7}" for number in range(1000)]
    assert meant(",".join(names * 20), names) == names * 20


@pytest.mark.parametrize(
    "name", ["[red]", "<b>bold</b>", ":smile:", "a,b", "10", "-rf", "$x^2$", "%s", "{0}", "😀", "名"]
)
def test_markup_commas_numbers_and_options_are_names_like_any_other(name: str) -> None:
    require_usable([name, "other"], "root")
    assert meant(name, ["other", name]) == [name]
    assert shown(name) == name


@pytest.mark.parametrize("name", ["two\nlines", "tab\t", "\x1b[31mred", "a\u2028b", "null\0", " ", "\x7f", "a\rb"])
def test_a_name_that_is_not_one_line_of_text_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"root holds a class called '.*', expected a name of one line"):
        require_usable(["ok", name], "root")
    assert len(shown(name).splitlines()) == 1
    assert shown(name).isprintable()


def test_a_name_that_is_no_utf8_is_refused() -> None:
    name = os.fsdecode(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8") as error:
        require_usable([name], "root")
    str(error.value).encode()
    assert shown(name) == r"\udcff\udcfe"


def test_two_names_that_look_the_same_are_refused() -> None:
    with pytest.raises(InputError, match=r"two classes called caf.*composed differently"):
        require_usable([COMPOSED, "tea", DECOMPOSED], "root")
    require_usable(["Cat", "cat"], "root")


@pytest.mark.parametrize("name", ["train", "Training", "trains", "val", "VALID", "validation", "test", "dev", "eval"])
def test_names_of_splits_are_known(name: str) -> None:
    assert is_split_name(name)


@pytest.mark.parametrize(
    "name", ["train2017", "test1", "training_set", "test-images", "Val Data", "testset", "holdout", "development"]
)
def test_names_of_splits_with_a_word_behind_are_known(name: str) -> None:
    assert is_split_name(name)


@pytest.mark.parametrize(
    "name", ["bullet train", "test tube", "valley", "trainer", "device", "evaluator", "n01440764", "0"]
)
def test_other_names_are_no_splits(name: str) -> None:
    assert not is_split_name(name)


def test_hidden_files_and_those_of_systems_are_passed_over() -> None:
    for name in (".git", ".DS_Store", "._x.jpg", ".ipynb_checkpoints"):
        assert passed_over(name) == "hidden"
    for name in ("@eaDir", "__MACOSX", "lost+found", "Thumbs.db", "$RECYCLE.BIN", "desktop.ini"):
        assert passed_over(name) == "made by an operating system or a tool"
    assert passed_over("cat") is None
