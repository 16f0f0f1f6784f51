# SPDX-License-Identifier: MIT
"""Tests of the study: python -m pytest .study"""

import json
import re
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
import train
from entropy import spatial_entropy
from test_entropy import run, slow_segment


def test_readme_shows_what_was_measured(capsys) -> None:
    study.table()
    tables = capsys.readouterr().out
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for each in tables.strip().split("\n\n"):
        assert each in readme
    said = re.findall(r"\d+\.\d+ ± \d+\.\d+", readme)
    assert len(said) > 100
    assert set(said) <= set(re.findall(r"\d+\.\d+ ± \d+\.\d+", tables))


def test_commands(capsys) -> None:
    study.commands(list(study.SETTINGS))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 * len(study.SETTINGS) * len(study.VARIANTS)
    for line in lines[:: len(study.VARIANTS)]:
        _, first, second, _ = re.split(
            r"else python |; fi && python | && python ", line
        )
        made = train.parse_args(first.split()[1:])
        measured = evaluation.make_parser().parse_args(second.split()[1:])
        assert measured.checkpoint == f"{made.output_dir}/checkpoint.pt"
        assert measured.segmentation == made.dataset


def write_run(folder: Path, seed: int, accuracy: float) -> str:
    folder.mkdir()
    settings = dict.fromkeys(["torch", "torchvision", "python", "hardware"], "any")
    epoch = {"epoch": 1, "seconds": 60.0, "test_acc1": accuracy}
    for name in ("entropy", "components"):
        epoch |= {f"test_{name}": 2.0, f"test_{name}_per_head": [1.0, 3.0]}
    lines = [settings | {"seed": seed, "epochs": 1}, epoch]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def test_compare(tmp_path, monkeypatch, capsys) -> None:
    """Differences are between runs of the same seed; intervals are Student's t."""
    plain = [write_run(tmp_path / f"plain-{n}", n, 80.0 + n) for n in range(4)]
    mine = [write_run(tmp_path / f"mine-{n}", n, 81.0 + n * n) for n in (2, 1, 0)]
    command = f"study compare {' '.join(plain)} -- {' '.join(mine)}"
    assert run(monkeypatch, command) == 0
    # Of 80, 81, 82, 83, of 81, 82, 85, and of 1, 1, 3, whose deviation is 2 / sqrt(3).
    expected = r"81.50 ± 1.30 +82.66 ± 2.09 +\+1.66 ± 2.87"
    assert re.search(expected, capsys.readouterr().out)
    assert run(monkeypatch, f"{command} {mine[0]}") == 2
    assert "needs runs of different seeds" in capsys.readouterr().err


def test_objects_and_collect(tmp_path, monkeypatch, capsys) -> None:
    """A run of the study, from training to a line of results."""
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 8, "test": 8})
    monkeypatch.setitem(
        study.SETTINGS, "tiny", "--dataset shapes --epochs 1 --batch-size 8"
    )
    folder = tmp_path / "tiny" / "sar-0.3-1"
    options = f"{study.options_of('tiny', 'sar-0.3', 1)} --device cpu"
    assert run(monkeypatch, f"train {options} --output-dir {folder}") == 0
    command = (
        f"eval --checkpoint {folder} --segmentation shapes --json {folder}/eval.json"
    )
    assert run(monkeypatch, f"{command} --device cpu") == 0
    study.objects(str(folder))
    capsys.readouterr()
    study.collect([str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert (found["setting"], found["variant"], found["seed"]) == ("tiny", "sar-0.3", 1)
    model = evaluation.model_of_run(
        evaluation.read_checkpoint(f"{folder}/checkpoint.pt"), ""
    )
    images, masks = map(torch.stack, zip(*data.load_masks("shapes", "", (56, 56))))
    mean, std = data.DATASETS["shapes"].mean, data.DATASETS["shapes"].std
    normalize = data.normalizer(mean, std, torch.device("cpu"))
    with torch.inference_mode():
        _, maps = model.eval()(normalize(images))
    kept = maps > maps.mean((-2, -1), keepdim=True)
    for key, objects in {"": masks, "_other": masks.roll(1, 0)}.items():
        index, _ = slow_segment(kept, objects, lambda each: each, void_counts=False)
        assert found[f"iou_mean{key}"] == pytest.approx(index, abs=1e-3)
    assert found["foreground"] == pytest.approx(100 * kept.double().mean().item())
    pairs = [(kept[:, a], kept[:, b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    ratios = [((a & b).sum((1, 2)) / (a | b).sum((1, 2))).mean() for a, b in pairs]
    assert found["heads_iou"] == pytest.approx(100 * sum(ratios).item() / 3)
    monkeypatch.setitem(study.SETTINGS, "tiny", "--dataset shapes --epochs 1 --lr 1")
    with pytest.raises(ValueError, match="has another (lr|batch_size)"):
        study.collect([str(tmp_path)])


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
    assert run(monkeypatch, f"clipart {tmp_path}/made") == 0
    images = data.list_images(tmp_path / "made" / "train")
    assert 30 < len(images) < 60
    assert len(data.list_images(tmp_path / "made")) == 120
    masked = data.load_masks(
        "folder", tmp_path / "made", (64, 64), tmp_path / "made/masks"
    )
    image, mask = masked[0]
    assert mask.sum() == 64 * 16
    red = image[:, mask == 1].float().mean(1)
    assert red[0] == 255 and red[1:].max() < 5
    assert image[:, mask == 0].float().mean() > 250


def test_benchmark(monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    assert run(monkeypatch, "benchmark eval --batch-size 1") == 0
    assert "forward, plain ViT" in capsys.readouterr().out
    maps = torch.randn(2, 3, 14, 14)
    pytest.importorskip("cv2")
    torch.testing.assert_close(benchmark.opencv_entropy(maps), spatial_entropy(maps))
