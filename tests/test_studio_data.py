"""What the page Data shows of a folder, and that its edits reach the files whole, and can be undone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from spf_kit.embedded import data_path
from spf_kit.errors import UserError
from spf_kit.studio import captions as writing
from spf_kit.studio import grid, pictures
from spf_kit.studio.captions import CaptionFolder, copy_samples
from spf_kit.studio.folders import Folders

TARGET = "wearing glasses"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures: a duplicate, a broken one, a caption over the window, a caption in an old encoding."""
    made = tmp_path / "mine"
    made.mkdir()
    for number, caption in enumerate([b"a man, wearing glasses\n", "naïve <b>, ${x}".encode("cp1252")]):
        Image.new("RGB", (64, 64), (number * 90, 0, 0)).save(made / f"{number}.png")
        (made / f"{number}.txt").write_bytes(caption)
    shutil.copy(made / "0.png", made / "2.png")
    (made / "2.txt").write_text(", ".join(f"word{number}" for number in range(60)))
    (made / "3.jpg").write_bytes(b"\xff\xd8 no picture")
    return made


def look(folder: Path, target: str = TARGET) -> pictures.Look:
    return pictures.look(folder, target, "embedded", Folders([folder]).allows)


@pytest.fixture
def edits(folder: Path, tmp_path: Path) -> CaptionFolder:
    return CaptionFolder(folder, tmp_path / "runs")


def texts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.txt"))}


def found(folder: Path) -> list:
    return [card.picture for card in look(folder).cards]


def test_what_is_wrong_is_told_at_its_picture(folder: Path) -> None:
    seen = look(folder)
    faults = {card.picture.sample_id: card.faults for card in seen.cards}
    assert faults["0.png"] == faults["1.png"] == []
    twin, cut = faults["2.png"]
    assert twin == "the same picture as 0.png"
    assert cut.startswith("beyond the window: word")
    assert cut.endswith("word59")
    assert faults["3.jpg"] == ["is no picture", "no caption"] or "no caption" in faults["3.jpg"]
    assert any("3.jpg" in error and "replace or remove it" in error for error in seen.errors)
    assert [card.names_target for card in seen.cards] == [True, False, False, False]
    assert seen.summary == "4 pictures, 1 captions name the target, 2 want attention"


def test_the_grid_marks_the_target_and_shows_text_as_itself(folder: Path) -> None:
    shown = grid.grid(look(folder).cards, TARGET, 1, chosen="1.png")
    assert "a man, <mark>wearing glasses</mark>" in shown
    assert "naïve &lt;b&gt;, &#36;&#123;x&#125;" in shown
    assert shown.count("<img alt=") == 3
    assert 'aria-label="broken: ' in shown
    assert shown.count('aria-pressed="true"') == 1
    assert grid.grid(look(folder).cards, TARGET, 2) == '<ul class="cards"></ul>'
    assert [grid.pages(count) for count in (0, 1, 60, 61)] == [1, 1, 1, 2]


def test_a_changed_picture_is_looked_at_again_and_no_other(folder: Path, monkeypatch) -> None:
    look(folder)
    examined, real = [], pictures.examine

    def examine(picture):
        examined.append(picture.sample_id)
        return real(picture)

    monkeypatch.setattr(pictures, "examine", examine)
    look(folder)
    assert examined == []
    Image.new("RGB", (65, 64)).save(folder / "1.png")
    look(folder)
    assert examined == ["1.png"]


def test_edits_and_their_undo_leave_every_byte_as_it_was(folder: Path, edits: CaptionFolder) -> None:
    before = texts(folder)
    assert edits.edit(found(folder)[:1], lambda _: " new ", "the caption of 0.png") == 1
    assert (folder / "0.txt").read_bytes() == b"new\n"
    assert edits.edit(found(folder), lambda text: f"{text}, tag".lstrip(", "), "adding 'tag'") == 4
    assert (folder / "1.txt").read_text(encoding="utf-8") == "naïve <b>, ${x}, tag\n"
    assert (folder / "3.txt").read_bytes() == b"tag\n"
    # another studio finds the edits
    again = CaptionFolder(folder, edits._notes.parents[1])
    assert again.last() == again.undo() == "adding 'tag'"
    assert "3.txt" not in texts(folder)
    assert again.undo() == "the caption of 0.png"
    assert texts(folder) == before
    with pytest.raises(UserError, match="no edit to undo"):
        again.undo()


def test_an_edit_that_changes_nothing_is_none(folder: Path, edits: CaptionFolder) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert edits.edit(found(folder), lambda text: text, "nothing") == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert edits.last() == ""


def test_undo_loses_nothing_that_others_wrote(folder: Path, edits: CaptionFolder) -> None:
    edits.edit(found(folder)[:1], lambda _: "new", "an edit")
    (folder / "0.txt").write_text("by another program")
    with pytest.raises(UserError, match=r"'0\.txt' was changed since 'an edit'"):
        edits.undo()
    assert (folder / "0.txt").read_text() == "by another program"


def test_a_disk_that_refuses_midway_changes_nothing(
    folder: Path, edits: CaptionFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = texts(folder), writing.atomic

    def refusing(path: Path, **options):
        if path.name == "2.txt":
            raise UserError("cannot write '2.txt': the disk is full")
        return real(path, **options)

    monkeypatch.setattr(writing, "atomic", refusing)
    with pytest.raises(UserError, match="the disk is full"):
        edits.edit(found(folder)[:3], lambda text: text + ", tag", "adding")
    assert texts(folder) == before
    assert edits.last() == ""


def test_what_a_crash_cut_short_can_be_undone(folder: Path, edits: CaptionFolder) -> None:
    before, put = texts(folder), writing._put

    def killed(*_: object) -> None:
        raise SystemExit

    with pytest.MonkeyPatch.context() as patched:

        def first_alone(files) -> None:  # and then the process is killed: nothing is tidied up
            put(dict(list(files.items())[:1]))
            patched.setattr(writing, "_put", killed)
            patched.setattr(CaptionFolder, "_save", killed)
            raise SystemExit

        patched.setattr(writing, "_put", first_alone)
        with pytest.raises(SystemExit):
            edits.edit(found(folder)[:3], lambda text: text + ", tag", "adding")
    assert texts(folder) != before
    assert edits.undo() == "adding"
    assert texts(folder) == before


def test_sample_pictures_are_copied_before_they_are_edited(tmp_path: Path) -> None:
    source = pictures.place("embedded:glasses", Folders([tmp_path]).check)
    assert source == data_path("glasses")
    seen = look(source)
    assert not seen.editable
    with pytest.raises(UserError, match="belong to the package"):
        CaptionFolder(source, tmp_path).edit([seen.cards[0].picture], lambda _: "x", "an edit")
    copy = copy_samples(source, tmp_path / "copy")
    assert look(copy).editable
    assert {path.name for path in copy.iterdir()} == {path.name for path in source.iterdir()}
    with pytest.raises(UserError, match="exists"):
        copy_samples(source, copy)


def test_links_that_lead_outside_are_left_out(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    Image.new("RGB", (64, 64), (0, 0, 200)).save(secret / "own.png")
    (secret / "words.txt").write_text("a secret")
    (folder / "more").symlink_to(secret)
    (folder / "3.txt").symlink_to(secret / "words.txt")
    seen = look(folder)
    assert [card.picture.sample_id for card in seen.cards] == ["0.png", "1.png", "2.png"]
    assert any("outside the studio's folders" in line and "more/own.png" in line for line in seen.warnings)
    assert "secret" not in grid.grid(seen.cards, TARGET, 1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("", "no folder is chosen"), ("embedded:nothing", "no embedded data"), ("/etc", "outside")],
)
def test_folders_that_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        pictures.place(text, Folders([tmp_path]).check)
    with pytest.raises(UserError, match="not on this machine"):
        pictures.look(tmp_path, TARGET, "owner/name", lambda _: True)
