"""Prompts about nothing in particular: what a router compares with, to find that no adapter is meant."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorchestra.errors import UserError

PROMPTS = (
    "Hello! How are you today?",
    "What is the weather like in autumn?",
    "Write a short poem about the sea.",
    "Explain how a bicycle stays upright.",
    "Give me three ideas for a birthday present.",
    "Translate this sentence into French: the train is late.",
    "Summarise the following text in two sentences.",
    "What is the capital of Australia?",
    "How do I cook rice so that it does not stick?",
    "Sort this list of numbers from small to large: 4, 19, 7, 2.",
    "Write a function that reverses a string.",
    "Who painted the ceiling of the Sistine Chapel?",
    "Tell me a joke about cats.",
    "What is the difference between a lake and a pond?",
    "How many minutes are there in a week?",
    "Rewrite this paragraph in a friendlier tone.",
    "Plan a weekend in a city by a river.",
    "Why is the sky blue?",
    "What should I pack for a hike in the mountains?",
    "Correct the spelling of this sentence: I recieved you're letter.",
    "Compare tea and coffee.",
    "How does a refrigerator work?",
    "Describe a house in the woods at night.",
    "What happened in the year 1969?",
    "Write an e-mail to a colleague to move a meeting to Friday.",
    "Which animals sleep through the winter?",
    "Continue the story: the door opened slowly and",
    "Make a table of the planets with their distances from the sun.",
    "What do you think of old films?",
    "How do I learn to play the guitar?",
    "List the ingredients of a simple bread.",
    "Is a tomato a fruit or a vegetable?",
)


@dataclass(frozen=True, eq=False)
class Background:
    """What a base makes of :data:`PROMPTS`.

    Args:
        x: ``[N, n]`` float32, their features.
        norm: ``[n]``, the weight by which the layer that reads the features scales them after it normalised them; ones
            where that is not known.

    Raises:
        UserError: fewer than two prompts, another length of the norm, or NaN or infinity.
    """

    x: Tensor
    norm: Tensor

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or len(self.x) < 2 or self.norm.shape != self.x.shape[1:]:
            raise UserError(
                f"a background is features [N, n] of at least 2 prompts and a norm [n]; got {tuple(self.x.shape)} and "
                f"{tuple(self.norm.shape)}"
            )
        if not bool(torch.isfinite(self.x).all() and torch.isfinite(self.norm).all()):
            raise UserError("the base makes NaN or infinity of plain prompts; its weights are damaged")
