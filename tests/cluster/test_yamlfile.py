"""A wrong file gives one line `FILE:LINE: key: what is wrong`, and YAML means what its writer thinks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import AliasChoices, BaseModel, Field

from cluster import yamlfile
from cluster.errors import WrongInputError
from cluster.yamlfile import STRICT, WrongKeyError


class Inner(BaseModel):
    model_config = STRICT

    path: str = Field(description="Where it lies.")
    weight: float = Field(default=1.0, gt=0, le=2)


class Outer(BaseModel):
    model_config = STRICT

    name: str = Field(description="What it is called.")
    size: int = Field(default=8, ge=1, validation_alias=AliasChoices("size", "max_size"))
    fast: bool = False
    entries: tuple[Inner, ...] = ()
    env: dict[str, str] = {}


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "it.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def complaint(folder: Path, text: str | bytes, *assignments: str) -> WrongInputError:
    """The error that reading and checking the text gives; one or two lines, whatever is wrong."""
    with pytest.raises(WrongInputError) as caught:
        document = yamlfile.read(write(folder, text))
        yamlfile.parse(Outer, yamlfile.override(document, assignments, yamlfile.spellings(Outer)))
    error = caught.value
    assert error.status == 2
    assert "\n" not in error.message + error.fix
    error.message = error.message.replace(f"{folder}/", "")
    error.fix = error.fix.replace(f"{folder}/", "")
    return error


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E-5", 2e-5),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-3", -3),
        ("0x10", 16),
        ("0o17", 15),
        ("0123", "0123"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-31", "2024-01-31"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("<<", "<<"),
        ("192.168.1.21", "192.168.1.21"),
        ("[a, {b: 1}]", ["a", {"b": 1}]),
    ],
)
def test_scalars_follow_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    read = yamlfile.read(write(tmp_path, f"key: {text}\n")).data["key"]
    assert (read, type(read)) == (value, type(value))


def test_infinities_and_nan_are_read_as_floats(tmp_path: Path) -> None:
    data = yamlfile.read(write(tmp_path, "a: .inf\nb: -.inf\nc: .nan\n")).data
    assert (data["a"], data["b"], math.isnan(data["c"])) == (math.inf, -math.inf, True)


def test_each_key_and_entry_knows_its_line(tmp_path: Path) -> None:
    text = "# a comment\nname: x\nentries:\n  - path: a\n    weight: 2\n  - {path: b}\nenv:\n\n  A: >\n    long\n    text\n"
    lines = yamlfile.read(write(tmp_path, text)).lines
    assert {path: lines[path] for path in [("name",), ("entries",), ("entries", 0), ("entries", 0, "weight")]} == {
        ("name",): 2,
        ("entries",): 3,
        ("entries", 0): 4,
        ("entries", 0, "weight"): 5,
    }
    assert (lines[()], lines["entries", 1, "path"], lines["env", "A"]) == (2, 6, 9)


def test_a_byte_order_mark_and_anchors_are_fine(tmp_path: Path) -> None:
    assert yamlfile.read(write(tmp_path, b"\xef\xbb\xbfa: &x [1]\nb: *x\n")).data == {"a": [1], "b": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it.yaml:1: the file is empty"),
        ("# nothing\n", "it.yaml:1: the file is empty"),
        ("- a\n- b\n", "it.yaml:1: expected `key: value` lines at the top level"),
        ("\njust words\n", "it.yaml:2: expected `key: value` lines at the top level"),
        ("name: a\nsize: 1\nname: b\n", "it.yaml:3: name: given twice, first in line 1"),
        ("env:\n  A: b\n  A: c\n", "it.yaml:3: env.A: given twice, first in line 2"),
        ("name: a\nenv:\n\tA: b\n", "it.yaml:3: a tab where YAML wants spaces"),
        ("name: a: b\n", "it.yaml:1: a `key: value` where none can stand"),
        ("env:\n    A: b\n  B: c\n", "it.yaml:3: the indentation does not fit the lines above"),
        ("name: a\nsize\n", "it.yaml:3: a key without `:`"),
        ("name: 'a\n", "it.yaml:1: a quote that is never closed"),
        ("env: {A: b\nname: c\n", "it.yaml:1: a bracket that is never closed"),
        ("entries: [a\n", "it.yaml:1: a bracket that is never closed"),
        ("name: @a\n", "it.yaml:1: @ cannot start a value"),
        ("name: *a\n", "it.yaml:1: found undefined alias 'a'"),
        ("name: a\n---\nname: b\n", "it.yaml:2: a second document after `---`"),
        ("name: !secret a\n", "it.yaml:1: the tag !secret means nothing here"),
        ("name: !!python/object/apply:os.system [id]\n", "the tag !!python/object/apply:os.system means nothing here"),
        ("name: !a%0Ab c\n", "it.yaml:1: the tag !a\\nb means nothing here"),
        ("name: !!binary aGk=\n", "it.yaml:1: the tag !!binary means nothing here"),
        ("name: !!int x\n", "it.yaml:1: 'x' is no usable int"),
        (f"size: {'9' * 50}\n", "is no usable int"),
        ('name: "\\ud800"\n', "it.yaml:1: '\\ud800' is no usable str"),
        ("1: a\n", "it.yaml:1: a key that is not text"),
        ("? [a]\n: b\n", "it.yaml:1: a key that is not text"),
        ("name: a\n\x07: b\n", "it.yaml:2: an unprintable character (U+0007)"),
        (b"name: a\nenv: \xff\n", "it.yaml:2: not UTF-8 text"),
        ("a: &a [x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b]\n"
         "d: &d [*c, *c, *c, *c, *c, *c, *c]\ne: [*d, *d, *d, *d, *d, *d, *d]\n", "more entries than any such file needs"),
        ("a: &a\n  b: *a\n", "more entries than any such file needs"),
        ("a: " + "[" * 5000, "it.yaml:1: nested too deeply"),
        (b"a: b\n" * 60_000, "it.yaml: larger than 256 KiB"),
    ],
)  # fmt: skip
def test_what_is_no_plain_yaml_is_named_by_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    error = complaint(tmp_path, text)
    assert message in error.message
    assert error.fix


def test_an_absent_file_and_a_folder_are_named_as_they_were_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for path, message in [("absent.yaml", "absent.yaml: no such file"), (".", ".: is a folder, not a file")]:
        with pytest.raises(WrongInputError) as caught:
            yamlfile.read(Path(path))
        assert caught.value.message == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size: 3\n", "it.yaml:1: name: is missing"),
        ("nmae: a\n", "it.yaml:1: nmae: unknown key; did you mean name?"),
        ("name: a\nsizes: 3\n", "it.yaml:2: sizes: unknown key; did you mean size?"),
        ("name: a\nmax_sizes: 3\n", "it.yaml:2: max_sizes: unknown key; did you mean max_size?"),
        ("name: a\nMAX-SIZE: 3\n", "it.yaml:2: MAX-SIZE: unknown key; did you mean max_size?"),
        ('name: a\n"\\e[31m\\n": 3\n', "it.yaml:2: \\x1b[31m\\n: unknown key"),
        ("name: a\nzzz: 3\n", "it.yaml:2: zzz: unknown key"),
        ("name: a\nsize: 3\nmax_size: 4\n", "it.yaml:3: max_size: means the same as size, which is given too; keep one"),
        ("name: 3\n", "it.yaml:1: name: must be text, not 3"),
        ("name: [a]\n", "it.yaml:1: name: must be text, not a list"),
        ("name:\n", "it.yaml:1: name: is empty"),
        ("name: a\nsize: two\n", "it.yaml:2: size: must be a whole number, not 'two'"),
        ("name: a\nsize: '2'\n", "it.yaml:2: size: must be a whole number, not '2'"),
        ("name: a\nsize: 2.0\n", "it.yaml:2: size: must be a whole number, not 2.0"),
        ("name: a\nsize: true\n", "it.yaml:2: size: must be a whole number, not true"),
        ("name: a\nmax_size: 0\n", "it.yaml:2: max_size: must be at least 1, not 0"),
        ("name: a\nfast: yes\n", "it.yaml:2: fast: must be true or false, not 'yes'; did you mean true?"),
        ("name: a\nfast: Off\n", "it.yaml:2: fast: must be true or false, not 'Off'; did you mean false?"),
        ("name: a\nfast: 1\n", "it.yaml:2: fast: must be true or false, not 1"),
        ("name: a\nentries: x\n", "it.yaml:2: entries: must be a list, not 'x'"),
        ("name: a\nentries: [x]\n", "it.yaml:2: entries.0: must be a mapping (`key: value` lines), not 'x'"),
        ("name: a\nentries:\n  - path: x\n  - weight: 1\n", "it.yaml:4: entries.1.path: is missing"),
        ("name: a\nentries:\n  - path: x\n    wieght: 1\n", "it.yaml:4: entries.0.wieght: unknown key; did you mean weight?"),
        ("name: a\nentries: [{path: x, weight: 0}]\n", "it.yaml:2: entries.0.weight: must be above 0, not 0"),
        ("name: a\nentries: [{path: x, weight: 2.5}]\n", "it.yaml:2: entries.0.weight: must be at most 2, not 2.5"),
        ("name: a\nentries: [{path: x, weight: .inf}]\n", "it.yaml:2: entries.0.weight: must be a finite number, not Infinity"),
        ("name: a\nenv: [A]\n", "it.yaml:2: env: must be a mapping (`key: value` lines), not a list"),
        ("name: a\nenv: {A: 1}\n", "it.yaml:2: env.A: must be text, not 1"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named_by_file_line_and_path(tmp_path: Path, text: str, message: str) -> None:
    assert complaint(tmp_path, text).message == message


def test_the_first_of_several_problems_is_told_and_the_others_are_counted(tmp_path: Path) -> None:
    error = complaint(tmp_path, "fast: 3\nsize: x\nname: 1\n")
    assert error.message == "it.yaml:1: fast: must be true or false, not 3"
    assert error.fix == "and 2 more, first it.yaml:2: size: must be a whole number, not 'x'"


def test_a_misspelt_key_is_told_before_the_missing_one_it_stands_for(tmp_path: Path) -> None:
    error = complaint(tmp_path, "size: 3\nnam: a\n")
    assert error.message == "it.yaml:2: nam: unknown key; did you mean name?"
    assert error.fix == "and 1 more, first it.yaml:1: name: is missing"


def test_a_missing_key_is_explained_by_its_description(tmp_path: Path) -> None:
    assert complaint(tmp_path, "size: 3\n").fix == "What it is called"


def test_a_long_value_is_cut_and_stays_on_one_line(tmp_path: Path) -> None:
    message = complaint(tmp_path, f'name: a\nsize: "{"x" * 500}\\n"\n').message
    assert len(message) < 150


def test_a_model_can_blame_one_of_its_keys_and_the_file_s_spelling_is_shown(tmp_path: Path) -> None:
    class Picky(Outer):
        def model_post_init(self, context: object) -> None:
            raise WrongKeyError("size", "is too much")

    with pytest.raises(WrongInputError) as caught:
        yamlfile.parse(Picky, yamlfile.read(write(tmp_path, "name: a\nmax_size: 9\n")))
    assert caught.value.message == f"{tmp_path}/it.yaml:2: max_size: is too much"


TEXT = "name: a\nmax_size: 3\nentries:\n  - {path: x}\n"


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["name=b"], {"name": "b"}),
        (["name=b", "name=c"], {"name": "c"}),
        (["size=5"], {"size": 5}),
        (["max_size=5"], {"size": 5}),
        (["size=null"], {"size": 8}),
        (["max_size="], {"size": 8}),
        (["fast=true"], {"fast": True}),
        (["env.A=x=y"], {"env": {"A": "x=y"}}),
        (["entries.0.weight=1e-1"], {"entries": (Inner(path="x", weight=0.1),)}),
        (["entries=[{path: y}]", "entries.0.path=z"], {"entries": (Inner(path="z"),)}),
    ],
)
def test_set_replaces_a_value_under_any_of_its_spellings(
    tmp_path: Path, assignments: list[str], expected: dict
) -> None:
    document = yamlfile.read(write(tmp_path, TEXT))
    model = yamlfile.parse(Outer, yamlfile.override(document, assignments, yamlfile.spellings(Outer)))
    assert {key: getattr(model, key) for key in expected} == expected
    assert document.data["name"] == "a", "the document that was read stays as it was"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("size", "--set size: expected KEY=VALUE"),
        ("=3", "--set =3: expected KEY=VALUE"),
        ("env..A=3", "--set env..A=3: expected KEY=VALUE"),
        ("size=two", "--set size=two: size: must be a whole number, not 'two'"),
        ("sise=2", "--set sise=2: sise: unknown key; did you mean size?"),
        ("name=", "--set name=: name: is missing"),
        ("name=[a", "--set name=[a: a bracket that is never closed"),
        ("name.first=a", "--set name.first=a: name is 'a', with no first in it"),
        ("fast.er=1", "--set fast.er=1: fast: must be true or false, not a mapping"),
        ("entries.1.path=y", "--set entries.1.path=y: entries has no entry 1; it has 1, counted from 0"),
        ("entries.x.path=y", "--set entries.x.path=y: entries has no entry x; it has 1, counted from 0"),
        ("entries.0.paht=y", "--set entries.0.paht=y: entries.0.paht: unknown key; did you mean path?"),
        ("entries=[{weight: 1}]", "--set entries=[{weight: 1}]: entries.0.path: is missing"),
        ("env.HF_TOKEN=[a]", "--set env.HF_TOKEN=***: env.HF_TOKEN: must be text, not a list"),
        ("env={api_key: [a]}", "--set env=***: env.api_key: must be text, not a list"),
    ],
)
def test_a_wrong_set_is_named_in_place_of_a_line(tmp_path: Path, assignment: str, message: str) -> None:
    assert complaint(tmp_path, TEXT, assignment).message == message
