"""docs/tutorial.md: its commands, in order, on made pictures and a small network."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
COMMANDS = [line for line in PAGE.splitlines() if line.startswith("python3 ")]


def smaller(line: str) -> list[str]:
    """The words of a command with a network and images that take no time, and without a download."""
    line = line.replace("torchvision/mobilenet_v3_small", "resnet8").replace(" --pretrained", "")
    words = re.sub(r"(--image-size|--batch-size|--n-epochs) \d+", lambda found: f"{found[1]} {TINY[found[1]]}", line).split()[1:]
    return words + (["--calibration-images", "2", "--int8-tolerance", "100"] if "--int8" in words else [])


TINY = {"--image-size": 32, "--batch-size": 4, "--n-epochs": 1}


@pytest.mark.thorough
def test_from_a_folder_of_photos_to_int8(tmp_path, monkeypatch, image_writer, run_script):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("cat", "dog")):
        image_writer(tmp_path / "photos" / name, sizes=(40, 36, 44, 48, 40), seed=seed)
    assert [line.split()[1] for line in COMMANDS] == ["initial_train.py", "pruning.py", "export.py", "predict.py"]
    for line in COMMANDS:
        script, *words = smaller(line)
        ended = run_script(script.removesuffix(".py"), *words)
        assert ended.status == 0, ended.errors
    assert json.loads(Path("saves/photos-small/summary.json").read_text())["compact"]["compact"]["macs"] > 0
    assert Path("photos-int8.onnx").stat().st_size > 1000
    assert re.search(r"\b(cat|dog)\b", ended.output)
