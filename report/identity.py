"""Who hands in, and the file names that follow from it."""

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

STUDENT_FILE = Path(__file__).with_name("student.toml")
PLACEHOLDERS = {
    "surname": "Surname",
    "given_name": "Given Name",
    "matriculation_number": "00000000",
}
VARIABLES = {
    "surname": "SURNAME",
    "given_name": "GIVEN_NAME",
    "matriculation_number": "MATRICULATION",
}
MAX_NAME_BYTES = 120  # Windows and Linux refuse file names of more than 255
MAX_DIGITS = 20
APOSTROPHES = "'’‘ʼ`´"  # noqa: RUF001 - the characters people type for one


class IdentityError(ValueError):
    """An identity that cannot be handed in; the message says what would do."""


@dataclass(frozen=True)
class Student:
    """A checked identity.

    Attributes:
        surname: letters and hyphens, NFC: a name that Moodle keeps as it is.
        given_name: as it stands on the first page; empty while it is a placeholder.
        matriculation_number: digits.
        notes: what was changed in the spelling, as sentences.
    """

    surname: str
    given_name: str
    matriculation_number: str
    notes: tuple = ()

    @property
    def is_placeholder(self):
        """Whether the file still holds the surname or number it came with."""
        return (
            self.surname == PLACEHOLDERS["surname"]
            or self.matriculation_number == PLACEHOLDERS["matriculation_number"]
        )

    @property
    def stem(self):
        """The name of the PDF and of the ZIP, without extension."""
        return f"{self.surname}-{self.matriculation_number}"


def read_student(path=STUDENT_FILE, environment=None):
    """Read and check the identity.

    Args:
        path: a TOML file with ``surname``, ``given_name``, ``matriculation_number``.
        environment: SURNAME, GIVEN_NAME and MATRICULATION in it come first; by default
            that of the process.

    Returns:
        A ``Student``.

    Raises:
        IdentityError: the file cannot be read, or a value in it cannot be used.
    """
    environment = os.environ if environment is None else environment
    try:
        stored = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        stored = {}
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"{Path(path).name} cannot be read ({error}): each value needs quotes, as "
            f'in surname = "{PLACEHOLDERS["surname"]}"'
        ) from error
    values = {}
    for key, placeholder in PLACEHOLDERS.items():
        given = environment.get(VARIABLES[key])
        value = stored.get(key, placeholder) if given is None else given
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise IdentityError(f'{key} must be a text in quotes, got "{value!r}"')
        values[key] = str(value)
    return check_student(**values)


def check_student(surname, given_name, matriculation_number):
    """Check an identity and return it as a ``Student``; see ``read_student``."""
    checked, notes = _check_surname(surname)
    return Student(
        surname=checked,
        given_name=_check_given_name(given_name),
        matriculation_number=_check_number(matriculation_number),
        notes=notes,
    )


def _check_surname(text):
    name = unicodedata.normalize("NFC", text.strip(" "))
    spelling = _letters_and_hyphens(name)
    if not spelling:
        raise IdentityError(
            f"the surname {_shown(text)} holds no letter: give it as letters and "
            "hyphens, for example Müller-Lüdenscheidt"
        )
    if len(name.encode()) > MAX_NAME_BYTES:
        raise IdentityError(
            f"the surname is {len(name)} characters long, too long for a file name: "
            f"shorten it to {MAX_NAME_BYTES} bytes"
        )
    if "-".join(name.split(" ")) == spelling:
        if spelling == name:
            return name, ()
        return spelling, (f"The files are named {spelling}: no spaces in file names.",)
    odd = next((c for c in name if not _is_letter(c) and c not in "- "), None)
    why = "Moodle strips it" if odd and odd in APOSTROPHES else "not in a file name"
    what = f"holds {_shown(odd)} ({why})" if odd else "has a hyphen or space too many"
    raise IdentityError(
        f"the surname {_shown(text)} {what}: only letters and hyphens, for example "
        f"{spelling}"
    )


def _letters_and_hyphens(name):
    """Return the nearest spelling that can be used, empty if there is none."""
    kept = []
    for character in name:
        if _is_letter(character):
            kept.append(character)
        elif character not in APOSTROPHES and unicodedata.category(character) != "Cf":
            kept.append("-")
    parts = [part for part in "".join(kept).split("-") if part]
    # A mark belongs to the letter before it and cannot begin a part
    while parts and unicodedata.category(parts[0][0])[0] == "M":
        parts[0] = parts[0][1:]
        parts = [part for part in parts if part]
    return "-".join(parts)


def _is_letter(character):
    category = unicodedata.category(character)
    return (category[0] == "L" and category != "Lm") or category[0] == "M"


def _check_given_name(text):
    name = unicodedata.normalize("NFC", " ".join(text.split(" ")).strip())
    if name == PLACEHOLDERS["given_name"]:
        return ""
    allowed = f"- .{APOSTROPHES}"
    odd = [c for c in name if not _is_letter(c) and c not in allowed]
    if odd:
        raise IdentityError(
            f"the given name {_shown(text)} holds {_shown(odd[0])}: letters, hyphens, "
            "spaces, dots and apostrophes would do"
        )
    if len(name.encode()) > MAX_NAME_BYTES:
        raise IdentityError(
            f"the given name is {len(name)} characters long: shorten it to "
            f"{MAX_NAME_BYTES} bytes"
        )
    return name


def _check_number(text):
    number = text.strip(" ")
    if not (number.isascii() and number.isdigit()):
        digits = "".join(c for c in number if c.isascii() and c.isdigit())
        raise IdentityError(
            f"the matriculation number {_shown(text)} must be digits only, for example "
            f"{digits[:MAX_DIGITS] or '12345678'}"
        )
    if len(number) > MAX_DIGITS:
        raise IdentityError(
            f"the matriculation number has {len(number)} digits, at most {MAX_DIGITS} "
            "would do"
        )
    return number


def _shown(text):
    """Return a text as it can be printed safely: short, control characters escaped."""
    text = text if len(text) <= 40 else text[:37] + "..."
    shown = "".join(
        c if c.isprintable() or c == " " else f"\\u{ord(c):04x}" for c in text
    )
    return f'"{shown}"'
