"""The README tells the truth: its commands, options, paths and keys exist."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from cdt_export.cli import export_command
from cdt_runtime.cli import infer_command
from cdt_runtime.dicomweb_cli import dicomweb_command
from cdt_runtime.doctor_cli import OTHERS, doctor_command
from cdt_runtime.enroll_cli import enroll_command
from cdt_runtime.serve.cli import serve_command
from cdt_train.cli import COMMANDS as SUBCOMMANDS
from cdt_train.cli import train_command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
BOTH = f"{README}\n{DOCS}"
COMMANDS = {
    "cdt-train": train_command,
    "cdt-export": export_command,
    "cdt-infer": infer_command,
    "cdt-doctor": doctor_command,
    "cdt-enroll": enroll_command,
    "cdt-serve": serve_command,
    "cdt-dicomweb": dicomweb_command,
}
SHOWN = sorted(
    set(re.findall(r"`((?:cdt-\w+|make|pytest) [^`]+)`", BOTH))
    | set(re.findall(r"^\$ ((?:cdt-\w+|make|pytest)[^#\n]*)", BOTH, flags=re.MULTILINE))
)


def command_of(words: list[str]) -> click.Command:
    """The command of a line, or of its first word."""
    if words[0] == "cdt-train" and words[1:] and words[1] in SUBCOMMANDS:
        module, _, name = SUBCOMMANDS[words[1]].partition(":")
        found: click.Command = getattr(importlib.import_module(module), name)
        return found
    if words[0] == "cdt-doctor" and words[1:] and words[1] in OTHERS:
        return OTHERS[words[1]]
    if words[0] == "cdt-dicomweb" and words[1:] and words[1] in dicomweb_command.commands:
        return dicomweb_command.commands[words[1]]
    return COMMANDS[words[0]]


def options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts} | {"--help", "-h"}


@pytest.mark.parametrize("line", [line for line in SHOWN if line.startswith("cdt-")])
def test_every_option_shown_exists(line: str) -> None:
    words = shlex.split(line.replace("[", "").replace("]", ""))
    used = {word for word in words if word.startswith("-")}
    assert used <= options(command_of(words))


@pytest.mark.parametrize("line", [line for line in SHOWN if line.startswith("make")])
def test_every_make_target_shown_exists(line: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("line", [line for line in SHOWN if line.startswith("pytest")])
def test_every_proof_named_exists(line: str) -> None:
    assert (ROOT / line.split()[1]).exists()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", README))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_every_key_of_a_recipe_shown_exists() -> None:
    from cdt_train.config import known_keys

    shown = set(re.findall(r"\b((?:data|model|training)\.\w+)=", BOTH))
    assert shown
    assert shown <= set(known_keys())


def test_demo_and_test_stand_in_the_first_screen() -> None:
    first = "\n".join(README.splitlines()[:24])
    assert "make demo" in first
    assert "make test" in first
    assert "not a medical device" in first


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_newcomer_needs_with_an_example(command: str) -> None:
    program = Path(sys.executable).with_name(command)
    result = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
    assert f"  {command} " in result.stdout.partition("Examples:")[2]
    assert "Research use only: not a medical device." in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_the_encoder_of_ones_own_in_the_documentation_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import save_file

    from cdt_train.encoders import registry

    class Net(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(3, width, 16, 16)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.layer(images).mean(dim=(2, 3)),)

    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(Net=Net))
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    monkeypatch.setitem(registry.ENCODERS, "mine", found["ENTRY"])
    save_file(Net(384).state_dict(), tmp_path / "model.safetensors")
    encoder = registry.load_encoder("mine", tmp_path)
    assert encoder.encode(torch.zeros(2, 3, 224, 224)).embedding.shape == (2, 384)
    assert encoder.card.origin == "weights"
