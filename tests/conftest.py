"""Shared by the tests: where the project is, and a small model and data set."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import report.demo
import vision_transformer

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(2)


def small_model(seed=0, **changes):
    """A Vision Transformer that trains in seconds, made from a seed."""
    torch.manual_seed(seed)
    sizes = {"layers": 1, "hidden_size": 32, "mlp_size": 48, "n_heads": 4, **changes}
    return vision_transformer.VisionTransformer(**sizes)


def run_script(name, *arguments, folder=ROOT, timeout=120, **environment):
    """Run a Python file as a user would; return the completed process."""
    command = [sys.executable, str(name), *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def demo_data(monkeypatch):
    """Few generated images instead of CIFAR-10."""
    monkeypatch.setattr(report.demo, "SIZES", {True: 100, False: 40})
    monkeypatch.setattr(vision_transformer, "CIFAR10", report.demo.DemoCIFAR10)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def project(tmp_path):
    """A copy of the project, without data and build products."""
    folder = tmp_path / "Übung 11 ä"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".ipynb", ".toml") or path.name == "Makefile":
            shutil.copy(path, folder)
    ignored = shutil.ignore_patterns("*.pdf", "__pycache__")
    shutil.copytree(ROOT / "report", folder / "report", ignore=ignored)
    return folder
