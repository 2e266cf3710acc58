"""Draw the bundled emoji set again from Debian's packages: `python maskgit/assets/emoji/render.py`.

Needs `apt-get install fonts-noto-color-emoji unicode-data unicode-cldr-core libraqm0 libfribidi0`
(raqm joins sequences such as flags and families into one drawing) and `pip install pyoxipng`.
Writes four tar shards, `info.json` and the licences into the folder `data` beside this file; see
the README there.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import PIL
from PIL import Image, ImageDraw, ImageFont, features
from webdataset import TarWriter

PACKAGES = (
    "fonts-noto-color-emoji",
    "unicode-data",
    "unicode-cldr-core",
    "libraqm0",
    "libfribidi0",
)
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
CLDR = Path("/usr/share/unicode/cldr/common")
LICENCES = {
    "LICENSE-APACHE-2.0.txt": Path("/usr/share/common-licenses/Apache-2.0"),
    "LICENSE-NOTO-EMOJI.txt": Path("/usr/share/doc/fonts-noto-color-emoji/copyright"),
    "LICENSE-UNICODE.txt": Path("/usr/share/doc/unicode-cldr-core/copyright"),
}
FONT_SIZE = 109  # the one size of the font's bitmaps, each 136x128
CROP = (4, 0, 132, 128)  # of that bitmap: every drawing lies inside this square
MISSING = "\u0378"  # never assigned: its advance is that of any one glyph, a lacking one too
TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
HELDOUT = 0.1

# Mirrored, drawings of these classes would be wrong: letters, digits, clock faces, arrows, flags,
# maps, notes, symbols, and hands that point left or right.
NO_MIRROR = [
    *("emotion", "hand-fingers-open", "hand-single-finger", "hand-fingers-closed", "place-map"),
    *("place-building", "time", "award-medal", "game", "music", "phone", "money", "mail", "office"),
    *("transport-sign", "warning", "arrow", "religion", "zodiac", "av-symbol", "gender", "math"),
    *("punctuation", "currency", "other-symbol", "keycap", "alphanum"),
    *("flag", "country-flag", "subdivision-flag"),
]

# Names that differ only in gender become one concept, as do these.
GENDER = re.compile(r"\b(man|woman|person|men|women|people|and|mrs|mx|santa)\b")
SAME = {
    "boy": "child",
    "girl": "child",
    "old": "older",
    "prince": "with crown",
    "princess": "with crown",
    "merman": "merperson",
    "mermaid": "merperson",
    "breast feeding": "feeding baby",
}


@dataclass(frozen=True)
class Emoji:
    text: str
    name: str
    group: str  # the class: Unicode's subgroup as a slug

    @property
    def key(self) -> str:
        """The name of the sample in its shard: the code points without the variation selector."""
        return "-".join(f"{ord(c):x}" for c in self.text if c != "\ufe0f")

    @property
    def toned(self) -> bool:
        return TONES.search(self.text) is not None


def read_emoji(path: Path = EMOJI_TEST) -> list[Emoji]:
    """All fully-qualified emoji in Unicode's order, the components (bare skin tones) left out."""
    emoji, group = [], ""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("# subgroup: "):
            group = re.sub(r"[^a-z0-9]+", "-", line.removeprefix("# subgroup: ").lower())
        if found := re.match(r"([0-9A-F ]+); fully-qualified +# \S+ E[\d.]+ (.+)", line):
            text = "".join(chr(int(point, 16)) for point in found[1].split())
            emoji.append(Emoji(text, found[2], group))
    return emoji


def read_keywords(folder: Path = CLDR) -> dict[str, list[str]]:
    """CLDR's English keywords of each emoji (its text without variation selectors)."""
    keywords = {}
    for part in ("annotationsDerived", "annotations"):
        for node in ElementTree.parse(folder / part / "en.xml").iter("annotation"):
            if node.get("type") is None:
                keywords[node.get("cp", "")] = [
                    word.strip() for word in (node.text or "").split("|")
                ]
    return keywords


def draw(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The drawing as a 64x64 RGB image on white; None where the font lacks it.

    The 128x128 square around the bitmap is halved by averaging 2x2 pixels: nothing is clipped,
    there is no ringing on the white ground, and the usual margin is 2 pixels. Values are rounded to
    multiples of 5 (an error of 48 dB, which the eye does not see), so that all fit into 13 MB.
    """
    if font.getlength(text) != font.getlength(MISSING):  # fell apart into several glyphs
        return None
    canvas = Image.new("RGB", (136, 128), "white")
    ImageDraw.Draw(canvas).text((0, 0), text, font=font, embedded_color=True)
    blank = canvas.getcolors(1) is not None
    return None if blank else canvas.crop(CROP).reduce(2).point(lambda v: (v + 2) // 5 * 5)


def open_font(path: Path = FONT) -> ImageFont.FreeTypeFont:
    missing = [str(p) for p in (path, EMOJI_TEST, CLDR) if not p.exists()]
    if missing or not features.check("raqm"):
        raise SystemExit(f"needs {missing or 'raqm'}: apt-get install {' '.join(PACKAGES)}")
    return ImageFont.truetype(path, FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)


def concept_of(name: str) -> str:
    """The name without skin tone and gender: 'woman cook: dark skin tone' -> 'cook'."""
    name = name.lower().replace("-", " ")
    name = re.sub(r"[:,] ?\w* ?\w* skin tone", "", name)
    name = re.sub(r"^(family|kiss|couple with heart): .*", r"\1", name)
    name = " ".join(re.sub(r"[ :,]+", " ", GENDER.sub(" ", name)).split())
    return SAME.get(name, name) or "person"


def group_concepts(emoji: list[Emoji], pictures: list[bytes]) -> list[str]:
    """The concept of each emoji; concepts that share a drawing to the pixel become one."""
    parent: dict[str, str] = {}

    def root(concept: str) -> str:
        while parent.setdefault(concept, concept) != concept:
            concept = parent[concept]
        return concept

    concepts = [concept_of(e.name) for e in emoji]
    first: dict[bytes, str] = {}
    for concept, picture in zip(concepts, pictures, strict=True):
        a, b = root(concept), root(first.setdefault(picture, concept))
        parent[max(a, b)] = min(a, b)
    return [root(concept) for concept in concepts]


def held_out(emoji: list[Emoji], concepts: list[str]) -> set[str]:
    """About a tenth of each class's concepts, those of the smallest hash; none if under five."""
    members: dict[str, list[str]] = {}
    for concept, home in {c: e.group for e, c in zip(emoji, concepts, strict=True)}.items():
        members.setdefault(home, []).append(concept)
    chosen: set[str] = set()
    for group in members.values():
        group.sort(key=lambda concept: hashlib.sha256(concept.encode()).digest())
        if len(group) >= 5:
            chosen.update(group[: max(1, round(HELDOUT * len(group)))])
    return chosen


def make_set() -> tuple[dict[str, list[tuple[Emoji, Image.Image]]], int]:
    """Each split's emoji with their drawings, and how many emoji the font lacks."""
    font = open_font()
    drawn = [(e, picture) for e in read_emoji() if (picture := draw(e.text, font))]
    emoji = [e for e, _ in drawn]
    concepts = group_concepts(emoji, [picture.tobytes() for _, picture in drawn])
    chosen = held_out(emoji, concepts)
    splits: dict[str, list[tuple[Emoji, Image.Image]]] = {
        name: [] for name in ("train", "train-tones", "heldout", "heldout-tones")
    }
    for (e, picture), concept in zip(drawn, concepts, strict=True):
        split = "heldout" if concept in chosen else "train"
        splits[split + "-tones" * e.toned].append((e, picture))
    return splits, len(read_emoji()) - len(drawn)


def encode(picture: Image.Image) -> bytes:
    """As PNG, without loss and small: a shard spends 13 MB or 15 on the same pixels."""
    import oxipng  # here, so that the tests, which only draw, do without it

    png = io.BytesIO()
    picture.save(png, "PNG")
    return oxipng.optimize_from_memory(png.getvalue(), level=4, strip=oxipng.StripChunks.all())


def write_shard(path: Path, samples: list[tuple[Emoji, Image.Image]]) -> None:
    """One WebDataset shard; the same samples give the same bytes."""
    keywords = read_keywords()
    with TarWriter(str(path), user="", group="", mtime=0, mode=0o644, encoder=False) as tar:
        for e, picture in samples:
            words = keywords.get(e.text.replace("\ufe0f", ""), [])
            record = {"name": e.name, "keywords": [w for w in words if w != e.name]}
            record |= {"class": e.group, "emoji": e.text}
            text = json.dumps(record, ensure_ascii=False).encode()
            tar.write({"__key__": e.key, "png": encode(picture), "json": text})


def package_version(package: str) -> str:
    query = ["dpkg-query", "--show", "--showformat=${Version}", package]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw the bundled emoji set from Debian's packages"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    splits, lacking = make_set()
    for split, samples in splits.items():
        write_shard(folder / f"emoji-{split}.tar", samples)
    for name, licence in LICENCES.items():
        shutil.copyfile(licence, folder / name)
    everything = [e for samples in splits.values() for e, _ in samples]
    present = {e.group for e in everything}
    info = {
        "classes": [g for g in dict.fromkeys(e.group for e in read_emoji()) if g in present],
        "no_mirror": NO_MIRROR,
        "drawings": {split: len(samples) for split, samples in splits.items()},
        "lacking": lacking,
        "per_class": {
            split: dict(Counter(e.group for e, _ in samples)) for split, samples in splits.items()
        },
        "unicode": EMOJI_TEST.read_text("utf-8").split("# Version: ")[1].split()[0],
        "font_sha256": hashlib.sha256(FONT.read_bytes()).hexdigest(),
        "pillow": PIL.__version__,
        "packages": {package: package_version(package) for package in PACKAGES},
    }
    text = json.dumps(info, indent=1, ensure_ascii=False)
    (folder / "info.json").write_text(text + "\n", "utf-8")
    print(f"{folder}: {info['drawings']}, {lacking} lacking in the font")


if __name__ == "__main__":
    main()
