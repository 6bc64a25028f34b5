"""What `make newcomer` reads out of the README. The run itself (a Label Studio, a training) is not a test."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from scripts import newcomer
from scripts.newcomer import Guide, Passage, Said, TextWrong, checked, fill_in, read_guide
from worker.label_studio import VIEW_TITLE
from worker.settings import parse_project_settings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def guide() -> Guide:
    return read_guide(README)


def changed(old: str, new: str) -> str:
    assert old in README
    return README.replace(old, new)


def line_of(text: str) -> int:
    return README[: README.index(text)].count("\n") + 1


def test_every_passage_is_found_with_its_line(guide: Guide) -> None:
    assert guide.start_label_studio.text == "SSRF_PROTECTION_ENABLED=false ML_BLOCK_LOCAL_IP=false label-studio start"
    assert guide.start_label_studio.line == line_of("   SSRF_PROTECTION_ENABLED=false")
    assert guide.start_hardfirst.text.splitlines()[1] == "echo LABEL_STUDIO_API_KEY=... >> .env"
    assert guide.upload.text == 'scripts/hardfirst upload images/ --new "Parts" --classes bolt,nut'
    assert (guide.model_name.text, guide.model_url.text) == ("hardfirst", "http://localhost:9090")
    assert guide.backend.text == guide.model_url.text == guide.page.text
    assert parse_project_settings(guide.extra_params.text).batch_size == 100
    assert (guide.card.text, guide.tab.text, guide.button.text) == ("Connected", VIEW_TITLE, "Label All Tasks")
    assert (guide.doctor.text, guide.report.text) == ("scripts/hardfirst doctor", "hardfirst report")
    assert guide.report_file.text == "hardfirst-p7.html"
    assert guide.prefix.text == "scripts/hardfirst"
    assert (guide.workers.text, guide.data_folder.text) == ("three", "hardfirst-data/")
    names = [said.text for said in guide.score_files]
    assert names == ["ranked/contact_sheet.html", "ranked/label_studio.json", "ranked/random.txt"]


def test_the_readme_of_this_clone_can_be_followed(guide: Guide) -> None:
    assert checked(README, ROOT) == guide
    assert parse_project_settings(newcomer.SMALL).batch_size == newcomer.SMALL["batch_size"]


@pytest.mark.parametrize(
    ("right", "wrong", "sentence"),
    [
        ("make up ", "make hardfirst ", "no shell block here has `make up`"),
        ("hardfirst up\n", "hardfirst start\n", "hardfirst has no command `start`"),
        ("--classes bolt,nut\n", "--labels bolt,nut\n", "No such option: --labels"),
        ('--new "Parts"', '--new "Parts', "unexpected EOF"),
        ("upload images/ --new", "upload --new", "Missing argument"),
        ("upload images/ --new", "upload photos/ --new", "`images/`, which a reader replaces"),
        ("LABEL_STUDIO_API_KEY=...", "LABEL_STUDIO_TOKEN=...", "`LABEL_STUDIO_API_KEY=...`, which a reader replaces"),
        ('{"batch_size": 100, ', '{"batchsize": 100, ', "batchsize"),
        ('"epochs": 60}', '"epochs": 60', "not JSON"),
        ("`scripts/hardfirst doctor`", "`scripts/hardfirst physician`", "nothing here names the doctor"),
        ("Data Manager tab *", "Data Manager view *", "nothing here names the Data Manager's tab"),
        ("Backend URL:\n   `http://", "Backend URL:\n   `localhost:", "this is no address"),
        ("In a clone, `scripts/hardfirst`", "In a clone, `scripts/hf`", "the clone has no such file"),
        ("label-studio==1.23.2`", "label-studio==1.22.0`", "requirements-label-studio.lock has another version"),
        ("--with-random --out ranked", "--with-chance --out ranked", "No such option: --with-chance"),
        ("simulate --data data.yaml", "simulate --dataset data.yaml", "No such option: --dataset"),
        ("## The first ten minutes", "## Ten minutes", "there is no section"),
        ("## Before you connect anything", "## Before", "there is no section “Before you connect anything”"),
        ("echo LABEL_STUDIO_URL=", "echo LABEL_STUDIO_HOST=", "no setting has the name LABEL_STUDIO_HOST"),
        ("and three workers", "and some more", "nothing here names how many workers start"),
        ("--weights yours.pt", "--weights best.pt", "`yours.pt`, which a reader replaces"),
    ],
)
def test_a_wrong_text_is_named(right: str, wrong: str, sentence: str) -> None:
    text = changed(right, wrong)
    with pytest.raises(TextWrong, match=re.escape(sentence)) as refused:
        checked(text, ROOT)
    assert re.match(r"README\.md:\d+: “", str(refused.value))


def test_other_pages_are_held_to_the_same(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements-label-studio.lock", "scripts/hardfirst"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "docs").mkdir()
    page = "# A page\n\nRun `hardfirst worker train`, or\n\n```sh\nmake upp\n```\n"
    (tmp_path / "docs" / "page.md").write_text(page)
    with pytest.raises(TextWrong, match=r"^docs/page\.md:6: “make upp”\n.*no target `upp`"):
        checked(README, tmp_path)
    (tmp_path / "docs" / "page.md").write_text("# A page\n\nRun\n`hardfirst start trains`.\n")
    with pytest.raises(TextWrong, match=r"^docs/page\.md:4: .*\n.*no command `start`"):
        checked(README, tmp_path)


def test_what_a_reader_looks_for_on_a_screen_must_be_on_one(guide: Guide) -> None:
    assert [said.text for said in guide.screens][:2] == [
        "Account & Settings → Personal Access Token",
        "Settings → Model → Connect Model",
    ]
    assert VIEW_TITLE in [said.text for said in guide.screens]
    source = 'children:"Settings"}),label:"Model",title:"Connect Model!"'
    assert newcomer.check_screens([guide.screens[1]], source) == 3
    with pytest.raises(TextWrong, match="hardfirst's have the words “Connect Model”") as refused:
        newcomer.check_screens(guide.screens[1:], source.replace("Connect Model", "Connect Models"))
    assert refused.value.said.line == line_of("*Settings → Model → Connect Model*")


def test_pages_that_lead_through_screens_are_held_to_them_too() -> None:
    found = newcomer.screens_of_docs(ROOT)
    assert {said.page for said in found} == {f"docs/{name}.md" for name in newcomer.SCREEN_PAGES}
    assert "Validate and Save" in [said.text for said in found]


def test_the_pages_are_those_of_label_studio_and_ours(tmp_path: Path) -> None:
    theirs = tmp_path / "lib" / "python3.11" / "site-packages" / "web" / "dist" / "apps" / "labelstudio"
    theirs.mkdir(parents=True)
    (theirs / "main.js").write_text('"Label All Tasks"')
    (theirs / "main.js.map").write_text("a comment that nobody sees")
    pages = newcomer.source_of_pages(tmp_path / "bin" / "python", ROOT)
    assert '"Label All Tasks"' in pages
    assert "nobody sees" not in pages
    assert VIEW_TITLE in pages
    assert "Start a round now" in pages


def test_a_target_that_the_makefile_does_not_have_is_named_with_its_line() -> None:
    text = changed("   make up  ", "   make upp && make up  ")
    with pytest.raises(TextWrong, match="no target `upp`") as refused:
        checked(text, ROOT)
    assert refused.value.said.line == line_of("   make up  ")


def test_only_the_section_of_the_first_ten_minutes_is_followed() -> None:
    text = changed("```sh\n   SSRF_PROTECTION_ENABLED", "```text\n   SSRF_PROTECTION_ENABLED")
    with pytest.raises(TextWrong, match="no shell block here has `label-studio start`") as refused:
        read_guide(text + "\n## Later\n\n```sh\nlabel-studio start\n```\n")
    assert refused.value.said == Said(f"## {newcomer.SECTION}", line_of(f"## {newcomer.SECTION}"))


def test_a_pattern_goes_over_the_ends_of_lines() -> None:
    found = Passage("a\nThe card\n   then says **Connected**.", 0, 40).find(r"card then says \*\*(\w+)\*\*", "it")
    assert found == Said("Connected", 3)


def test_a_reader_replaces_what_is_there() -> None:
    said = Said("echo KEY=... >> .env", 4)
    assert fill_in(said, {"=...": "=abc"}) == "echo KEY=abc >> .env"
    with pytest.raises(TextWrong, match="`images/`, which a reader replaces, is not in it"):
        fill_in(said, {"images/": "photos/"})


def test_the_working_tree_is_copied_with_what_is_not_committed_and_without_what_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = tmp_path / "origin"
    (origin / "scripts").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", str(origin)], check=True)
    for name, text in ((".gitignore", "/.env\n"), (".env", "TOKEN=x"), ("scripts/new.sh", "true")):
        (origin / name).write_text(text)
    (origin / "scripts" / "new.sh").chmod(0o755)
    monkeypatch.setattr(newcomer, "ROOT", origin)
    newcomer.clone(tmp_path / "copy", here=True)
    copied = sorted(path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*"))
    assert copied == [".gitignore", "scripts", "scripts/new.sh"]
    assert (tmp_path / "copy" / "scripts" / "new.sh").stat().st_mode & 0o100


def test_a_port_that_is_taken_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"http://localhost:{taken.getsockname()[1]}"
        other = newcomer._free_address(url)
    assert other != url
    assert re.fullmatch(r"http://localhost:\d+", other)
    assert f"{url} is taken" in capsys.readouterr().out


def test_a_wrong_readme_ends_with_code_1_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def clone_with_a_mistake(place: Path, here: bool) -> None:
        for name in ("Makefile", "requirements-label-studio.lock", "scripts/hardfirst"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes((ROOT / name).read_bytes())
        (place / "README.md").write_text(changed("--classes bolt,nut\n", "--labels bolt,nut\n"), encoding="utf-8")

    monkeypatch.setattr(newcomer, "clone", clone_with_a_mistake)
    monkeypatch.setattr(newcomer, "Newcomer", None)  # would fail if it came to that
    monkeypatch.setattr("sys.argv", ["newcomer"])
    monkeypatch.setattr(newcomer.signal, "signal", lambda *_: None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert newcomer.main() == 1
    printed = capsys.readouterr().err
    assert f"README.md:{line_of('scripts/hardfirst upload')}: “scripts/hardfirst upload images/" in printed
    assert "No such option: --labels" in printed
