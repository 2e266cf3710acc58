"""Who may import whom (see CONTRIBUTING.md), read from the source; and that help loads no torch."""

import ast
import io
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

from maskgit.commands.evaluate import COMMANDS as EVALUATE
from maskgit.commands.main import COMMANDS

PACKAGES = [name for name in ("maskgit", "vqgan", "clip") if (ROOT / name).is_dir()]
ENTRY_POINTS = {"maskgit.__main__", "sample"}
CORE = (
    "maskgit/schedule.py",
    "maskgit/masking.py",
    "maskgit/decode.py",
    "maskgit/model.py",
    "vqgan/quantizer.py",
    "vqgan/model.py",
)


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
MODULES = {module_name(file): file for file in [*FILES, ROOT / "sample.py"]}


def imports(module, source, is_package):
    """Full names of all modules that the source imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def is_in(module, *packages):
    return any(module == package or module.startswith(package + ".") for package in packages)


def allowed(module, target):
    """Whether `module` may import `target`."""
    if not is_in(target, *PACKAGES):
        return True  # not of the project
    if is_in(target, "maskgit.commands") and module not in ENTRY_POINTS:
        return is_in(module, "maskgit.commands")
    if is_in(module, "maskgit.common"):
        return is_in(target, "maskgit.common")
    for library in ("vqgan", "clip", "maskgit.engine"):
        if is_in(module, library):
            return is_in(target, library, "maskgit.common")
    return True


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_rule(module):
    file = MODULES[module]
    found = imports(module, file.read_text(), file.name == "__init__.py")
    assert [target for target in found if not allowed(module, target)] == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("maskgit.common.folder", "from maskgit import Pipeline"),
        ("maskgit.common.folder", "from .. import engine"),
        ("maskgit.common.folder", "import vqgan.model"),
        ("vqgan.model", "from maskgit.engine import optim"),
        ("vqgan.model", "def f():\n    from maskgit.model import MaskGIT"),
        ("vqgan.model", "import importlib\nimportlib.import_module('maskgit.model')"),
        ("maskgit.engine.optim", "from ..model import MaskGIT"),
        ("maskgit.model", "from .commands import main"),
        ("clip.model", "from maskgit.engine.images import fit"),
    ],
)
def test_the_rule_sees_offences(module, line):
    assert not all(allowed(module, target) for target in imports(module, line, False))


def loaded_modules(code, tmp_path):
    program = f"{code}\nimport sys\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


HELP = """
from maskgit.commands.main import main
try:
    main({!r})
except SystemExit as end:
    assert not end.code
"""


@pytest.mark.parametrize(
    "code",
    [
        "import maskgit.common",
        "import maskgit, vqgan; assert 'Pipeline' in dir(maskgit); assert 'VQGAN' in dir(vqgan)",
        "import clip; assert 'CLIP' in dir(clip) and 'CLIPConfig' in dir(clip)",
        "from maskgit.common.device import pick_device",
        "from maskgit.common.progress import progress",
        "from maskgit.common.folder import find",
        HELP.format(["--help"]),
        *(HELP.format([name, "--help"]) for name in COMMANDS),
        *(HELP.format(["evaluate", name, "--help"]) for name in EVALUATE),
    ],
)
def test_loads_no_torch(code, tmp_path):
    heavy = {"torch", "torchvision", "numpy", "PIL", "rich", "omegaconf", "huggingface_hub"}
    assert not loaded_modules(code, tmp_path) & heavy


def test_public_names_are_not_hidden_by_modules_of_the_same_name():
    import maskgit.decode
    from maskgit import MaskGIT, MaskGITConfig, Pipeline, decode, guided
    from maskgit.decode import decode as original
    from vqgan import VQGAN, VQGANConfig

    assert decode is original
    assert maskgit.decode is original
    assert all(map(callable, (MaskGIT, MaskGITConfig, Pipeline, guided, VQGAN, VQGANConfig)))
    with pytest.raises(AttributeError, match="Pipelin"):
        _ = maskgit.Pipelin


def code_lines(source):
    """Lines of code: no blank line, no comment, no docstring."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    skipped |= {tokenize.ENCODING, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_code_lines():
    assert (
        code_lines('"""Two\nlines."""\n\n# note\ndef f():\n    """Doc."""\n    return (\n1)') == 3
    )


def test_the_core_reads_in_half_an_hour():
    assert (
        code_lines('"""Two\nlines."""\n\n# note\ndef f():\n    """Doc."""\n    return (\n1)\n') == 3
    )
    sizes = {name: code_lines((ROOT / name).read_text()) for name in CORE}
    assert sum(sizes.values()) <= 700, sizes
