"""Identities: kept as Moodle keeps them, or refused with what would do."""

import unicodedata

import pytest

from report.student import check_student, read_student
from support.records import UserError

pytestmark = pytest.mark.fault("identity")

KEPT = [
    ("Müller", "Müller"),
    ("Mu\u0308ller", "Müller"),  # NFD
    ("von der Leyen", "von-der-Leyen"),
    ("  Meier  ", "Meier"),
    ("Иванов", "Иванов"),
    ("शर्मा", "शर्मा"),
    ("a" * 120, "a" * 120),
]
REFUSED = [
    ("O'Brien", "OBrien"),
    ("O’Brien", "OBrien"),  # noqa: RUF001
    ("../Meier", "Meier"),
    ("", None),
    ("-Meier-", "Meier"),
    ("Meier--Huber", "Meier-Huber"),
    ("$(touch x)", "touch-x"),
    ("Meier\x1b[31m", "Meier-m"),
    ("Meier\u202e", "Meier"),  # right-to-left override
    ("Meier😀", "Meier"),
    ("\u0308Meier", "Meier"),  # a diaeresis on nothing
    ("a" * 300, None),
]


@pytest.mark.parametrize(("typed", "kept"), KEPT)
def test_names_that_moodle_keeps(typed, kept):
    who = check_student(typed, "Anna", "12345678")
    assert who.surname == kept
    assert who.stem == f"{kept}-12345678"
    assert unicodedata.is_normalized("NFC", who.stem)


@pytest.mark.parametrize(("typed", "suggested"), REFUSED)
def test_other_names_are_refused_with_a_suggestion(typed, suggested):
    with pytest.raises(UserError) as caught:
        check_student(typed, "Anna", "12345678")
    message = str(caught.value)
    assert message.isprintable(), "it goes to a terminal"
    assert len(message) < 300
    if suggested:
        assert message.endswith(f"for example {suggested}")
        assert check_student(suggested, "Anna", "12345678").surname == suggested


@pytest.mark.parametrize(
    "number", ["", "1234567a", "12 345", "١٢٣", "²³", "-1", "1.5", "9" * 21]
)
def test_other_numbers_are_refused(number):
    with pytest.raises(UserError, match="digits"):
        check_student("Meier", "Anna", number)


def test_given_names_may_hold_what_a_page_can_show():
    assert check_student("Meier", "Anna María d'Arc Jr.", "1").given_name
    with pytest.raises(UserError, match="given name"):
        check_student("Meier", "Anna\x07", "1")


def test_the_environment_comes_before_the_file(tmp_path):
    path = tmp_path / "student.toml"
    text = 'surname = "Meier"\nmatriculation_number = 1234567\n'
    path.write_text(text, encoding="utf-8")
    assert read_student(path, {}).stem == "Meier-1234567"
    assert read_student(path, {"SURNAME": "Huber"}).stem == "Huber-1234567"
    with pytest.raises(UserError, match="letters and single hyphens"):
        read_student(path, {"SURNAME": ""})


def test_placeholders_are_known(tmp_path):
    missing = read_student(tmp_path / "none.toml", {})
    assert missing.is_placeholder
    assert missing.given_name == ""
    assert not check_student("Meier", "Given Name", "123").is_placeholder
    assert check_student("Surname", "Anna", "123").is_placeholder


@pytest.mark.parametrize("text", ["surname = Meier", 'surname = ["x"]', "\x00"])
def test_a_broken_file_is_named(tmp_path, text):
    path = tmp_path / "student.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="surname"):
        read_student(path, {})


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ('Surname = "Meier"', "write surname"),
        ('given-name = "Anna"', "write given_name"),
        ("matriculation = 1234567", "write matriculation_number"),
        ('Vorname = "Anna"', "surname or given_name"),
        ("[x]", "write surname or given_name or matriculation_number"),
    ],
)
def test_an_unknown_key_is_named_with_the_one_that_is_meant(tmp_path, line, meant):
    path = tmp_path / "student.toml"
    path.write_text(f'surname = "Surname"\n{line}\n', encoding="utf-8")
    with pytest.raises(UserError, match=meant):
        read_student(path, {})


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_in_another_encoding_is_told_so(tmp_path, encoding):
    path = tmp_path / "student.toml"
    path.write_text('surname = "Müller"\n', encoding=encoding)
    with pytest.raises(UserError, match="save it as UTF-8"):
        read_student(path, {})
