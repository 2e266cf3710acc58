"""The wheel holds all that the commands need, and works away from the checkout."""

import zipfile

import pytest
from conftest import ROOT, execute
from PIL import Image

pytestmark = pytest.mark.slow

THREE_LINES = """
from maskgit import Pipeline
pipe = Pipeline.from_pretrained("emoji", device="auto", dtype="auto", revision=None)
images = pipe.sample(["cat-face", 3], steps=8, guidance=2.0, seed=0)

import clip, maskgit, vqgan
print(clip.__file__, maskgit.__file__, vqgan.__file__, *images.shape)
assert 0 <= images.min() < images.max() <= 1
"""


@pytest.fixture(scope="module")
def programs(new_environment):
    return new_environment()


@pytest.fixture(scope="module")
def wheel(programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    done = execute(programs / "python", "-m", "pip", *build, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(programs, wheel):
    """The programs of an environment in which the wheel is installed."""
    install = ("install", "--no-index", "--no-deps", "--force-reinstall", wheel)
    done = execute(programs / "python", "-m", "pip", *install, cwd=wheel.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return programs


def files_of(folder):
    files = (file for file in (ROOT / folder).rglob("*") if file.is_file())
    return {str(file.relative_to(ROOT)) for file in files if "__pycache__" not in file.parts}


def test_the_wheel_holds_packages_configs_data_and_weights(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    configs = {f"maskgit/{name}" for name in files_of("configs")}
    assert configs
    assert names == files_of("maskgit") | files_of("vqgan") | files_of("clip") | configs
    assert {name for name in names if name.endswith(".safetensors")} >= {
        "maskgit/assets/emoji/vqgan/model.safetensors",
        "maskgit/assets/emoji/transformer/model.safetensors",
    }
    assert wheel.stat().st_size < 50e6


def test_the_command_works_there(installed, tmp_path):
    command = ["sample", "--class", "cat-face", "--num", "8", "--out", "cats.png"]
    done = execute(installed / "maskgit", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("cats.png")
    with Image.open(tmp_path / "cats.png") as sheet:
        assert sheet.convert("L").getextrema() != (255, 255)


def test_three_lines_of_python_work_there(installed, tmp_path):
    done = execute(installed / "python", "-c", THREE_LINES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *packages, a, b, c, d = done.stdout.split()
    assert all(path.startswith(str(installed.parent)) for path in packages)
    assert [a, b, c, d] == ["2", "3", "64", "64"]


def test_doctor_is_content_there(installed, tmp_path):
    done = execute(installed / "maskgit", "doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "maskgit: 0." in done.stdout


def test_training_finds_its_config_and_data_there(installed, tmp_path):
    command = ["train", "emoji_vqgan", "--smoke", "run=run", "train.steps=50"]
    done = execute(installed / "maskgit", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
