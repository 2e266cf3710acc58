"""What classes are called in texts."""

from collections.abc import Sequence
from functools import cache

from clip.texts import Texts, spoken
from maskgit.common.folder import ASSETS, read_json


@cache
def described() -> dict[str, list[str]]:
    """Several texts for each class of the bundled set. Its own name is Unicode's, such as
    "animal-mammal", which no caption has; these say what is in the class in words of captions."""
    return read_json(ASSETS / "emoji" / "prompts.json")


def class_texts(classes: Sequence[str]) -> list[Texts]:
    """What each class is called: the described texts, if these are the classes of the bundled set,
    all of them (a folder of one's own may be called "music", too), else its name with spaces for
    hyphens."""
    known = described()
    if set(classes) == known.keys():
        return [known[name] for name in classes]
    return [spoken(name) for name in classes]
