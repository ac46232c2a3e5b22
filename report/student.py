"""Who hands in, and the file names that follow from it."""

import difflib
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from support.records import UserError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

STUDENT_FILE = Path(__file__).with_name("student.toml")
VARIABLES = ("SURNAME", "GIVEN_NAME", "MATRICULATION")
KEYS = ("surname", "given_name", "matriculation_number")
PLACEHOLDERS = ("Surname", "Given Name", "00000000")
MAX_BYTES = 120  # Windows and Linux refuse file names of more than 255
MAX_DIGITS = 20
APOSTROPHES = "'’‘ʼ`´"  # noqa: RUF001 - the characters people type for one


@dataclass(frozen=True)
class Student:
    """A checked identity."""

    surname: str
    given_name: str
    matriculation_number: str

    @property
    def is_placeholder(self):
        """Whether surname or number is still the placeholder."""
        return bool({self.surname, self.matriculation_number} & {*PLACEHOLDERS})

    @property
    def stem(self):
        """The name of the PDF and of the ZIP, without extension."""
        return f"{self.surname}-{self.matriculation_number}"


def read_student(path=STUDENT_FILE, environment=os.environ):
    """Read and check the identity: from the environment, else from a TOML file."""
    try:
        stored = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        stored = {}
    except UnicodeDecodeError as error:
        raise UserError(
            f"{Path(path).name} is not in UTF-8 (byte {error.start + 1}): save it as "
            "UTF-8, with your editor's 'Save as' or 'encoding'"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{Path(path).name} cannot be read ({error}): it has lines like "
            'surname = "Meier", with quotes'
        ) from error
    for key in stored.keys() - set(KEYS):
        meant = difflib.get_close_matches(key.lower(), KEYS, 1, 0.75) or KEYS
        raise UserError(
            f"{Path(path).name} gives {key[:40]!r}, which is not known: write "
            f"{' or '.join(meant)}"
        )
    values = []
    for variable, key, default in zip(VARIABLES, KEYS, PLACEHOLDERS, strict=True):
        value = environment.get(variable, stored.get(key, default))
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise UserError(f"{key} must be a text in quotes, got {value!r}")
        values.append(str(value))
    return check_student(*values)


def check_student(surname, given_name, matriculation_number):
    """Return a ``Student``, or raise a ``UserError`` that says what would do."""
    given = unicodedata.normalize("NFC", surname.strip(" "))
    name = _letters_and_hyphens(given)
    fits = 0 < len(name.encode()) <= MAX_BYTES
    if not fits or name != given.replace(" ", "-"):
        # Moodle strips apostrophes, and file systems refuse other signs
        raise UserError(
            f"the surname {surname[:40]!r} cannot be part of a file name on Moodle: "
            f"give it in letters and single hyphens ({MAX_BYTES} bytes at most), for "
            f"example {name if fits else 'Müller-Lüdenscheidt'}"
        )

    person = unicodedata.normalize("NFC", given_name.strip(" "))
    if len(person.encode()) > MAX_BYTES or not all(
        _is_letter(c) or c in f"- .{APOSTROPHES}" for c in person
    ):
        raise UserError(
            f"the given name {given_name[:40]!r} cannot be printed: give it in "
            f"letters, hyphens, spaces, dots, apostrophes ({MAX_BYTES} bytes at most)"
        )

    number = matriculation_number.strip(" ")
    digits = "".join(c for c in number if c in "0123456789")[:MAX_DIGITS]
    if not number or number != digits:
        raise UserError(
            f"the matriculation number {number[:40]!r} must be 1 to {MAX_DIGITS} "
            f"digits, for example {digits or '12345678'}"
        )
    person = "" if person == PLACEHOLDERS[1] else person
    return Student(name, person, number)


def _letters_and_hyphens(name):
    """Return the nearest spelling of letters and single hyphens between them."""
    kept = "".join(
        c if _is_letter(c) else " "
        for c in name
        if c not in APOSTROPHES and unicodedata.category(c) != "Cf"
    )
    # A mark belongs to the letter before it, and cannot begin a part
    marks = "".join(c for c in kept if unicodedata.category(c)[0] == "M")
    return "-".join(filter(None, (part.lstrip(marks) for part in kept.split())))


def _is_letter(character):
    category = unicodedata.category(character)
    return category[0] in "LM" and category != "Lm"
