# SPDX-License-Identifier: MIT
"""Tests of the study: python -m pytest .study"""

import json
import re
import sys
from itertools import combinations
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
import train
from test_entropy import run, slow_segment


def test_readme_shows_what_was_measured(capsys) -> None:
    study.table()
    tables = capsys.readouterr().out
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for each in tables.strip().split("\n\n"):
        assert each in readme
    readme += (HERE.parent / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"\d+\.\d+ ± \d+\.\d+", readme)
    assert len(said) > 100
    assert set(said) <= set(re.findall(r"\d+\.\d+ ± \d+\.\d+", tables))


def test_commands(capsys) -> None:
    study.commands()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 * (
        4 * len(study.SETTINGS) + sum(map(len, study.ADDED.values()))
    )
    for line in lines[::20]:
        options = re.findall(r"python (?:train|eval).py (--[dc].*?)(?:;| &&)", line)
        made = train.parse_args(options[0].split())
        measured = evaluation.make_parser().parse_args(options[1].split())
        assert measured.checkpoint == f"{made.output_dir}/checkpoint.pt"
        assert measured.segmentation == made.dataset


def test_compare(monkeypatch, capsys) -> None:
    """Differences are between runs of the same seed; intervals are Student's t."""
    accuracy = {f"plain-{n}": 80.0 + n for n in range(4)}
    accuracy |= {f"mine-{n}": 81.0 + n * n for n in (2, 1, 0)}
    lines = {
        name: {"seed": int(name[-1]), "accuracy": a} for name, a in accuracy.items()
    }
    monkeypatch.setattr(study, "read_run", lambda name: ({"dataset": "x"}, lines[name]))
    command = "study compare plain-0 plain-1 plain-2 plain-3 -- mine-2 mine-1 mine-0"
    assert run(monkeypatch, command) == 0
    # Of 80, 81, 82, 83, of 81, 82, 85, and of 1, 1, 3, whose deviation is 2 / sqrt(3).
    expected = "81.50 ± 1.30 | 82.66 ± 2.09 | +1.66 ± 2.87 |"
    assert expected in capsys.readouterr().out
    with pytest.raises(ValueError, match="needs runs of different seeds"):
        study.compare(*command.split()[2:], "mine-0")
    monkeypatch.setattr(
        study, "read_run", lambda name: ({"dataset": name}, lines[name])
    )
    with pytest.raises(ValueError, match="different datasets"):
        study.compare("plain-0", "--", "mine-0")


def test_objects_and_collect(tmp_path, monkeypatch, capsys) -> None:
    """From training to a line of results."""
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 8, "test": 8})
    options = "--dataset shapes --epochs 1 --batch-size 8 --train-size 8"
    monkeypatch.setitem(study.SETTINGS, "tiny", options)
    folder = tmp_path / "tiny" / "sar-0.3-1"
    options = f"{study.options_of('tiny', 'sar-0.3', 1)} --output-dir {folder}"
    assert run(monkeypatch, f"train {options} --device cpu") == 0
    options = f"--segmentation shapes --checkpoint {folder} --json {folder}/eval.json"
    assert run(monkeypatch, f"eval {options} --device cpu") == 0
    assert run(monkeypatch, f"study objects {folder}") == 0
    capsys.readouterr()
    study.collect(str(tmp_path))
    found = json.loads(capsys.readouterr().out)
    assert (found["setting"], found["variant"], found["seed"]) == ("tiny", "sar-0.3", 1)

    checkpoint = evaluation.read_checkpoint(f"{folder}/checkpoint.pt")
    model = evaluation.load_model(checkpoint, "")[0].eval()
    images, masks = map(torch.stack, zip(*data.load_masks("shapes", "", (56, 56))))
    source = data.DATASETS["shapes"]
    normalize = data.normalizer(source.mean, source.std, torch.device("cpu"))
    with torch.inference_mode():
        _, maps = model(normalize(images))
    kept = maps > maps.mean((-2, -1), keepdim=True)
    for key, objects in {"": masks, "_other": masks.roll(1, 0)}.items():
        index, _ = slow_segment(kept, objects, void_counts=False)
        assert found[f"iou_mean{key}"] == pytest.approx(index, abs=1e-3)
    assert found["foreground"] == pytest.approx(100 * kept.double().mean().item())
    for key, pairs in {
        "heads_iou": list(combinations(kept.unbind(1), 2)),
        "images_iou": [(kept, kept.roll(1, 0))],
    }.items():
        index = [
            ((a & b).sum((-2, -1)) / (a | b).sum((-2, -1))).mean() for a, b in pairs
        ]
        assert found[key] == pytest.approx(100 * torch.stack(index).mean().item())

    for options in "--dataset shapes --epochs 1 --batch-size 8", "--dataset shapes":
        monkeypatch.setitem(study.SETTINGS, "tiny", options)
        with pytest.raises(ValueError, match="sar-0.3-1 was trained with"):
            study.collect(str(tmp_path))


def test_clipart(tmp_path, monkeypatch) -> None:
    """Drawings on white with their masks, of subjects with enough of them."""
    for subject, count in {"plants": 60, "tools": 49}.items():
        for n in range(count):
            drawing = Image.new("RGBA", (100, 50))
            drawing.paste("red", (0, 0, 100, 25))  # a quarter of the square
            path = tmp_path / "source" / subject / f"{n % 2}" / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            drawing.save(path)
    path.with_name("link.png").symlink_to(path)
    Image.new("RGBA", (9, 9)).save(path.with_name("empty.png"))
    monkeypatch.setattr(clipart, "SOURCE", tmp_path / "source")
    made = tmp_path / "made"
    assert run(monkeypatch, f"clipart {made}") == 0
    assert 30 < len(data.list_images(made / "train")) < 60
    assert len(data.list_images(made)) == 120
    image, mask = data.load_masks("folder", made, (64, 64), made / "masks")[0]
    assert mask.sum() == 64 * 16
    red = image[:, mask == 1].float().mean(1)
    assert red[0] == 255 and red[1:].max() < 5
    assert image[:, mask == 0].float().mean() > 250


def test_benchmark(monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    assert run(monkeypatch, "benchmark eval --batch-size 1") == 0
    assert "forward, plain ViT" in capsys.readouterr().out
