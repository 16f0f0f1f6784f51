# SPDX-License-Identifier: MIT
"""Tests of the study: python -m pytest .study"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import benchmark
import clipart
import study

import data
import eval as evaluation
from test_entropy import run


def test_readme_shows_what_was_measured(capsys) -> None:
    study.table()
    tables = capsys.readouterr().out
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert all(each in readme for each in tables.strip().split("\n\n"))
    readme += (HERE.parent / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"\d+\.\d+ ± \d+\.\d+", readme)
    assert said and set(said) <= set(re.findall(r"\d+\.\d+ ± \d+\.\d+", tables))


def test_compare(monkeypatch, capsys) -> None:
    """Differences are between runs of the same seed; intervals are Student's t."""

    def read_run(name: str) -> tuple[dict, dict]:
        dataset, seed, accuracy = name.split("-")
        return {"dataset": dataset}, {"seed": seed, "accuracy": float(accuracy)}

    monkeypatch.setattr(study, "read_run", read_run)
    runs = "x-0-80 x-1-81 x-2-82 x-3-83 -- x-2-85 x-1-82 x-0-81"
    study.compare(*runs.split())
    # The differences are 1, 1 and 3, whose deviation is 2 / sqrt(3).
    expected = "81.50 ± 1.30 | 82.66 ± 2.09 | +1.66 ± 2.87 |"
    assert expected in capsys.readouterr().out
    for mistake in (["x-0-80", "x-0-81"], ["x-0-80", "--", "y-0-81"]):
        with pytest.raises(ValueError, match="different (seeds|datasets)"):
            study.compare(*mistake)


def test_from_command_to_results(tmp_path, monkeypatch, capsys) -> None:
    """A printed command trains and measures a run, whose numbers are then collected."""
    options = "--dataset shapes --epochs 1 --train-size 32"
    monkeypatch.setitem(study.SETTINGS, "tiny", options)
    study.commands("tiny")
    command = capsys.readouterr().out.splitlines()[0]
    command = command.replace("python ", f"{sys.executable} {HERE.parent}/")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    study.collect("runs/study")
    found = json.loads(capsys.readouterr().out)
    assert (found["setting"], found["variant"], found["seed"]) == ("tiny", "plain", 0)
    # What is measured if all heads attend to exactly the objects, each elsewhere:
    objects = torch.eye(4).view(4, 2, 2)
    batch = None, 9 * objects[:, None].expand(-1, 3, -1, -1), objects.to(torch.uint8)
    monkeypatch.setattr(evaluation, "predict_all", lambda *_: [batch])
    measured = study.measure("runs/study/tiny/plain-0")
    assert measured.keys() <= found.keys()
    assert list(measured.values()) == [0, 0, 25, 100, 0]
    monkeypatch.setitem(study.SETTINGS, "tiny", "--dataset shapes")
    with pytest.raises(ValueError, match="plain-0 was trained with"):
        study.collect("runs/study")


def test_clipart(tmp_path, monkeypatch) -> None:
    """Drawings on white with their masks, of subjects with enough of them."""
    drawing = Image.new("RGBA", (100, 50))
    drawing.paste("red", (0, 0, 100, 25))  # a quarter of the square
    for n in range(60 + 49):
        path = tmp_path / "source" / ("plants" if n < 60 else "tools") / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.save(path)
    made = tmp_path / "made"
    monkeypatch.setattr(clipart, "SOURCE", tmp_path / "source")
    assert run(monkeypatch, f"clipart {made}") == 0
    assert len(data.list_images(made)) == 120
    image, mask = data.load_masks("folder", made, (64, 64), made / "masks")[0]
    assert mask.sum() == 64 * 16
    assert image[1:, mask == 1].float().mean() < 5
    assert image[:, mask == 0].float().mean() > 250


def test_benchmark(monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    assert run(monkeypatch, "benchmark eval --batch-size 1") == 0
    assert "forward, plain ViT" in capsys.readouterr().out
