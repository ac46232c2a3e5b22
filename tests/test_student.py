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
    ("शर्मा", "शर्मा"),
    ("a" * 120, "a" * 120),
]
REFUSED = [
    ("O’Brien", "OBrien"),  # noqa: RUF001
    ("", None),
    ("-Meier-", "Meier"),
    ("$(touch x)", "touch-x"),
    ("Meier\x1b[31m", "Meier-m"),
    ("Meier\u202e", "Meier"),  # right-to-left override
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


@pytest.mark.parametrize("number", ["", "1234567a", "12 345", "١٢٣", "9" * 21])
def test_other_numbers_are_refused(number):
    with pytest.raises(UserError, match="digits"):
        check_student("Meier", "Anna", number)


def test_given_names_may_hold_what_a_page_can_show():
    assert check_student("Meier", "Anna María d'Arc Jr.", "1").given_name
    with pytest.raises(UserError, match="given name"):
        check_student("Meier", "Anna\x07", "1")


@pytest.fixture
def read(tmp_path):
    def read(content=None, **environment):
        path = tmp_path / "student.toml"
        if content is not None:
            path.write_bytes(content)
        return read_student(path, environment)

    return read


def test_the_environment_comes_before_the_file(read):
    text = b'surname = "Meier"\nmatriculation_number = 1234567\n'
    assert read(text).stem == "Meier-1234567"
    assert read(text, SURNAME="Huber").stem == "Huber-1234567"
    with pytest.raises(UserError, match="letters and single hyphens"):
        read(text, SURNAME="")


def test_placeholders_are_known(read):
    missing = read()
    assert missing.is_placeholder
    assert missing.given_name == ""
    assert not check_student("Meier", "Given Name", "123").is_placeholder
    assert check_student("Surname", "Anna", "123").is_placeholder


KNOWN = 'surname = "Surname"\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("surname = Meier", 'surname = "Meier", with quotes'),
        ('surname = ["x"]', "surname must be a text in quotes"),
        ('surname = "Müller"'.encode("latin-1"), "save it as UTF-8"),
        (KNOWN + 'Surname = "Meier"', "write surname"),
        (KNOWN + "matriculation = 1234567", "write matriculation_number"),
        (KNOWN + 'Vorname = "Anna"', "surname or given_name"),
    ],
)
def test_a_file_that_cannot_be_understood_is_told_so(read, content, said):
    with pytest.raises(UserError, match=said):
        read(content if isinstance(content, bytes) else content.encode())
