"""``doctor``: what it says is so, and it tells no password."""

from __future__ import annotations

import json
import sys

import torch


def test_the_facts(lorchestra, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "https://me:secret@packages.example.org/simple")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example.org")
    facts = json.loads(lorchestra("doctor", "--json").out)
    assert facts["python"] == sys.version.split()[0]
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cache"] == str(tmp_path / "home")
    assert facts["hub"] == "https://mirror.example.org"
    assert facts["package index"] == "https://…@packages.example.org/simple"


def test_for_people_every_fact_is_a_line(lorchestra):
    told = lorchestra("doctor")
    facts = json.loads(lorchestra("doctor", "--json").out)
    lines = told.out.splitlines()
    assert len(lines) == len(facts)
    assert all(line.startswith(name) for line, name in zip(lines, facts, strict=True))


def test_wrong_input(lorchestra):
    lorchestra("doctor", "--jason").refused("--jason", "--json")
