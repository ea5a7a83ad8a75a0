from pathlib import Path

from pipeline.serving.log_tail import LogTail


def write(work: Path, text: str) -> None:
    (work / "record").mkdir(exist_ok=True)
    with (work / "record" / "log.txt").open("a") as file:
        file.write(text)


def test_only_new_whole_lines_are_passed_on(tmp_path: Path) -> None:
    write(tmp_path, "of a killed attempt\n")
    start = LogTail.path(tmp_path).stat().st_size
    write(tmp_path, "one\ntwo")
    lines, offset = LogTail(tmp_path, start).lines()
    assert lines == ["one"]
    write(tmp_path, " words\nthree\0\n")
    assert LogTail(tmp_path, offset).lines()[0] == ["two words", "three"]


def test_a_chatty_stage_does_not_flood_the_page(tmp_path: Path) -> None:
    write(tmp_path, "".join(f"line {number}\n" for number in range(1000)))
    lines, offset = LogTail(tmp_path, 0).lines()
    assert lines[:2] == ["(960 lines left out)", "line 960"]
    assert lines[-1] == "line 999"
    assert LogTail(tmp_path, offset).lines() == ([], offset)


def test_a_log_that_does_not_exist_has_no_lines(tmp_path: Path) -> None:
    assert LogTail(tmp_path, 7).lines() == ([], 7)
