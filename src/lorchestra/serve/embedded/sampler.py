"""Tokens from logits, for all rows of a batch at once.

Axis letters: b rows of the batch, s rows that are drawn, V tokens, L positions, n leading tokens.

For each row, in this order: ``logit_bias`` · log-probabilities are of this · penalties · ``stop_ids`` masked until
``min_tokens`` were generated · the likeliest at temperature 0, or else temperature · min_p · top_k · top_p (vLLM's
order) and one uniform number through the inverse of the distribution function. The number is of the request's own
generator, so that a result does not depend on who shares the batch. Of equally likely tokens the lowest id comes first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorchestra.errors import LorchestraError
from lorchestra.serve.embedded.generation import Sampling, Token

COLDEST = 1e-5  # below this temperature the likeliest token is taken (vLLM's bound)
_LEADING = (64, 512, 4096)  # tokens that top_k and top_p look at before all are sorted
_BLOCK = 256  # tokens that are summed up before the one is looked for
_AT_A_TIME = 2**20  # logits in float32 at a time: a CPU keeps them in its cache, and no step asks for new memory
_WIDTH = 64  # columns of so many tokens, whose highest are compared first
_SPARE = 11  # more leading tokens than were asked for, so that equal ones at the end seldom need a sort


Terms = tuple[Tensor, Tensor]  # tokens, and what is added to their logits


def _terms(given: Mapping[int, float]) -> Terms:
    return torch.tensor(list(given), dtype=torch.int64), torch.tensor(list(given.values()), dtype=torch.float32)


_NOTHING = _terms({})


class NotFiniteError(LorchestraError):
    """Logits that no token can be chosen from: NaN, +∞, or −∞ alone. Nothing was drawn for any row.

    Args:
        rows: of the batch, that have them; the others may be asked for again.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__("the model's logits are not finite: an adapter's or a mixture's weights are too large")
        self.rows = tuple(rows)


class Draws:
    """The sampler's state of one sequence.

    Args:
        sampling: how.
        rows: V, the tokens there are; those of ``stop_ids`` beyond it mean nothing.

    Attributes:
        sampling: as given.
        generated: tokens so far.

    Raises:
        ValueError: a bias that is NaN or +∞ (−∞ forbids a token).
    """

    def __init__(self, sampling: Sampling, rows: int) -> None:
        if any(math.isnan(bias) or bias == math.inf for bias in sampling.logit_bias.values()):
            raise ValueError("logit_bias: got NaN or +∞, expected a number or −∞")
        self.sampling = sampling
        self.generated = 0
        self._bias = _terms(sampling.logit_bias)
        self._stops = _terms({i: -math.inf for i in sampling.stop_ids if i < rows})
        self._counts: dict[int, int] = {}
        self._random = random.Random(None if sampling.seed is None else sampling.seed % 2**64)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.sampling.temperature < COLDEST

    @property
    def edited(self) -> bool:
        """Whether the next token is not of the model's logits as they are."""
        return bool(self.sampling.logit_bias or self._masks or (self._penalises and self._counts))

    @property
    def bias(self) -> Terms:
        """``logit_bias``."""
        return self._bias

    @property
    def penalties(self) -> Terms:
        """OpenAI's presence and frequency penalties, of tokens that were generated."""
        if not self._penalises:
            return _NOTHING
        presence, frequency = self.sampling.presence_penalty, self.sampling.frequency_penalty
        return _terms({token: -presence - frequency * count for token, count in self._counts.items()})

    @property
    def mask(self) -> Terms:
        """−∞ for tokens that may not come next."""
        return self._stops if self._masks else _NOTHING

    @property
    def _penalises(self) -> bool:
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)

    @property
    def _masks(self) -> bool:
        return self.generated < self.sampling.min_tokens

    def uniform(self) -> float:
        """The next number of its generator, in [0, 1)."""
        return self._random.random()

    def add(self, token: int) -> None:
        """``token`` was generated."""
        self.generated += 1
        self._counts[token] = self._counts.get(token, 0) + 1


@torch.no_grad()
def choose(logits: Tensor, draws: Sequence[Draws]) -> list[Token]:
    """The next token of each row.

    Where bias and mask leave no token, the likeliest of the model is taken, with log-probability −∞ if the bias did it.

    Args:
        logits: ``[b, V]``, of any floating type, on any device; they are not changed.
        draws: of the rows; they count what was chosen.

    Raises:
        NotFiniteError: rows without finite logits; nothing was drawn or counted.
    """
    best, first = logits.max(-1)
    bad = [i for i, value in enumerate(best.tolist()) if not math.isfinite(value)]
    if bad:
        raise NotFiniteError(bad)
    tokens = [Token(token) for token in first.tolist()]
    # The others need their logits in float32.
    rows = [i for i, d in enumerate(draws) if d.edited or not d.greedy or d.sampling.logprobs is not None]
    at_a_time = _rows_at_a_time(logits)
    for start in range(0, len(rows), at_a_time):
        part = rows[start : start + at_a_time]
        x = _some(logits, part).to(torch.float32, copy=True)
        for i, token in zip(part, _chosen(x, first[part], [draws[i] for i in part]), strict=True):
            tokens[i] = token
    for draw, token in zip(draws, tokens, strict=True):
        draw.add(token.id)
    return tokens


@torch.no_grad()
def score(logits: Tensor, ids: Sequence[int] | Tensor, sampling: Sampling) -> list[Token]:
    """Tokens of a prompt with their log-probabilities, and alternatives as ``sampling.prompt_logprobs`` asks.

    Args:
        logits: ``[L, V]``, of any floating type: each position's are of the token that follows it.
        ids: ``[L]``, the tokens that follow.
        sampling: whose ``logit_bias`` and ``prompt_logprobs`` count.

    Raises:
        NotFiniteError: positions without finite logits.
    """
    following = torch.as_tensor(ids, dtype=torch.int64, device=logits.device)
    bias, values = (term.to(logits.device) for term in _terms(sampling.logit_bias))
    tokens: list[Token] = []
    at_a_time = _rows_at_a_time(logits)
    for start in range(0, len(following), at_a_time):
        x = logits[start : start + at_a_time].to(torch.float32, copy=True)
        bad = [start + i for i, value in enumerate(x.amax(-1).tolist()) if not math.isfinite(value)]
        if bad:
            raise NotFiniteError(bad)
        x[:, bias] += values
        report = _Report(x, [sampling.prompt_logprobs or 0] * len(x))
        tokens += report.tokens(following[start : start + at_a_time])
    return tokens


def _rows_at_a_time(logits: Tensor) -> int:
    """Rows of ``logits [b, V]`` that are worked on at once."""
    at_a_time = _AT_A_TIME if logits.device.type == "cpu" else 64 * _AT_A_TIME
    return max(1, at_a_time // logits.shape[1])


def _chosen(x: Tensor, first: Tensor, draws: Sequence[Draws]) -> list[Token]:
    """The next token of each row.

    Args:
        x: float32 ``[s, V]``, the model's logits, which are written to.
        first: ``[s]``, the likeliest.
        draws: of the rows.
    """
    _add(x, [draw.bias for draw in draws])
    told = [j for j, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    report = _Report(_some(x, told), [draws[j].sampling.logprobs or 0 for j in told]) if told else None
    edited = [j for j, draw in enumerate(draws) if draw.edited]
    ids = first.clone()
    if edited:
        _add(x, [draw.penalties for draw in draws])
        _add(x, [draw.mask for draw in draws])
        best, ids[edited] = _some(x, edited).max(-1)
        nothing = torch.tensor(edited, device=x.device)[best == -math.inf]
        ids[nothing] = first[nothing]
        x[nothing, first[nothing]] = 0.0
    drawn = [j for j, draw in enumerate(draws) if not draw.greedy]
    if drawn:
        ids[drawn] = _drawn(_some(x, drawn), [draws[j] for j in drawn])
    tokens = [Token(token) for token in ids.tolist()]
    if report is not None:
        for j, token in zip(told, report.tokens(ids[told]), strict=True):
            tokens[j] = token
    return tokens


def _some(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of ``x``, in rising order; a view where they follow each other."""
    start, stop = rows[0], rows[-1] + 1
    return x[start:stop] if stop - start == len(rows) else x[rows]


def _add(x: Tensor, terms: Sequence[Terms]) -> None:
    """Adds to each row of ``x [s, V]`` its own."""
    rows = [row for row, (tokens, _) in enumerate(terms) if len(tokens)]
    if rows:
        row = torch.tensor(rows).repeat_interleave(torch.tensor([len(terms[i][0]) for i in rows]))
        token, value = (torch.cat([terms[i][part] for i in rows]).to(x.device) for part in (0, 1))
        x[row.to(x.device), token] += value


class _Report:
    """Log-probabilities of rows.

    Args:
        x: float32 ``[s, V]``, not written to.
        counts: how many of the likeliest to tell, of each row.
    """

    def __init__(self, x: Tensor, counts: Sequence[int]) -> None:
        self._counts = counts
        self._logprobs = torch.log_softmax(x, -1)
        nowhere = self._logprobs[:, 0].isnan().nonzero()[:, 0]  # rows that are −∞ everywhere have no distribution
        self._logprobs[nowhere] = -math.inf
        most = min(max(counts), x.shape[1])
        # By x itself: close ones may be equal after the subtraction.
        self._likeliest = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        if most:
            _, leading, sure = _leading(x, most + _SPARE)
            self._likeliest = leading[:, :most]
            doubtful = (sure < most).nonzero()[:, 0]
            if len(doubtful):
                self._likeliest[doubtful] = _leading(x[doubtful], x.shape[1])[1][:, :most]

    def tokens(self, ids: Tensor) -> list[Token]:
        """Of the rows, those of ``ids [s]``."""
        own = _at(self._logprobs, ids).tolist()
        high = self._logprobs.gather(1, self._likeliest).tolist()
        columns = (ids.tolist(), own, self._likeliest.tolist(), high, self._counts)
        return [
            Token(token, value, tuple(zip(likely[:count], values[:count], strict=True)))
            for token, value, likely, values, count in zip(*columns, strict=True)
        ]


def _leading(x: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n highest of each row of ``x [s, V]``, or all of it where that is not much more.

    Returns:
        values ``[s, n]``, highest first, their tokens ``[s, n]``, lowest first where values are equal, and how many
        of them are sure ``[s]``: instead of those after there may be others of the same value.
    """
    size = x.shape[1]
    width = min(_WIDTH, size // (4 * n))
    if width < 2:
        values, tokens = x.sort(dim=-1, descending=True, stable=True)
        return values, tokens, torch.full((len(x),), size, device=x.device)
    # The n columns with the highest heads hold the n highest values, but for others that equal the lowest head.
    columns = size // width
    heads, column = x[:, : width * columns].reshape(len(x), width, columns).amax(1).topk(n)
    tokens = (column[:, :, None] + columns * torch.arange(width, device=x.device)).flatten(1)
    tail = torch.arange(width * columns, size, device=x.device).expand(len(x), -1)
    tokens = torch.cat([tokens, tail], 1)
    # One number orders by value and then by token: a float's bits are ordered as it is, negative ones the other way.
    bits = (x.gather(1, tokens) + 0.0).view(torch.int32)
    keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) + (size - tokens)
    tokens = size - (keys.topk(n).values & 0xFFFFFFFF)
    values = x.gather(1, tokens)
    lowest = heads[:, -1]
    # Where that is −∞, no other has any probability.
    sure = torch.where(lowest == -math.inf, n, (values > lowest[:, None]).sum(-1))
    return values, tokens, sure


def _drawn(x: Tensor, draws: Sequence[Draws]) -> Tensor:
    """Tokens ``[s]`` by a number of each generator.

    Args:
        x: ``[s, V]``, logits, one finite in each row; they are written to.
        draws: of the rows.
    """
    own = [draw.sampling for draw in draws]
    number = torch.tensor([draw.uniform() for draw in draws], dtype=torch.float64, device=x.device)
    # The highest is 0 now: no temperature makes it overflow.
    x.sub_(x.amax(-1, keepdim=True)).div_(_column([how.temperature for how in own], x))
    if any(how.min_p > 0 for how in own):
        x.masked_fill_(x < _column([how.min_p for how in own], x).log(), -math.inf)
    cut = [j for j, how in enumerate(own) if 0 < how.top_k < x.shape[1] or how.top_p < 1]
    free = sorted(set(range(len(own))) - set(cut))
    result = torch.empty(len(own), dtype=torch.int64, device=x.device)
    if cut:
        result[cut] = _of_leading(_some(x, cut), [own[j] for j in cut], number[cut])
    if free:
        result[free] = _of_all(_some(x, free).exp_(), number[free])
    return result


def _column(values: Sequence[float], x: Tensor) -> Tensor:
    return torch.tensor(values, dtype=x.dtype, device=x.device)[:, None]


def _of_leading(x: Tensor, samplings: Sequence[Sampling], number: Tensor) -> Tensor:
    """Tokens ``[s]`` by top_k and top_p.

    Args:
        x: ``[s, V]``, logits by their temperature, the highest 0.
        samplings: of the rows.
        number: ``[s]``, uniform.
    """
    size = x.shape[1]
    k = torch.tensor([how.top_k if 0 < how.top_k < size else size for how in samplings], device=x.device)
    p = torch.tensor([how.top_p for how in samplings], dtype=torch.float64, device=x.device)
    result = torch.empty(len(x), dtype=torch.int64, device=x.device)
    left = torch.arange(len(x), device=x.device)
    for n in (*_LEADING, size):
        mine = x if len(left) == len(x) else x[left]
        values, tokens, sure = _leading(mine, n)
        n = values.shape[1]
        total = values.double().exp().cumsum(-1)
        before = torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1]], -1)
        everything = total[:, -1] if n == size else mine.exp().sum(-1).double()
        mine_k, sure = k[left], sure.clamp(min=1)
        mass = p[left] * torch.where(mine_k == size, everything, _at(total, mine_k.clamp(max=n) - 1))
        count = torch.minimum((before < mass[:, None]).sum(-1).clamp(min=1), mine_k)
        known = (mine_k <= sure) | (mine_k == size) & ((_at(total, sure - 1) >= mass) | (n == size))
        at = torch.minimum(_inverse(total, number[left] * _at(total, count - 1)), count - 1)
        result[left[known]] = _at(tokens, at)[known]
        left = left[~known]
        if not len(left):
            break
    return result


def _of_all(weights: Tensor, number: Tensor) -> Tensor:
    """Tokens ``[s]``, each as likely as its weight of ``weights [s, V]`` says, by ``number [s]``, uniform."""
    size = weights.shape[1]
    full = size - size % _BLOCK
    sums = weights[:, :full].reshape(len(weights), -1, _BLOCK).sum(-1)
    if full < size:
        sums = torch.cat([sums, weights[:, full:].sum(-1, keepdim=True)], -1)
    total = sums.cumsum(-1, dtype=torch.float64)
    at = number * total[:, -1]
    block = _inverse(total, at)
    before = torch.where(block > 0, _at(total, (block - 1).clamp(min=0)), 0.0)
    places = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    own = weights.gather(1, places.clamp(max=size - 1)).masked_fill(places >= size, 0.0)
    return block * _BLOCK + _inverse(own.cumsum(-1, dtype=torch.float64), at - before)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Of each row of ``x [s, n]``, what is at ``index [s]``."""
    return x.gather(1, index[:, None])[:, 0]


def _inverse(total: Tensor, at: Tensor) -> Tensor:
    """Index ``[s]`` of the first of ``total [s, n]``, running sums, above ``at [s]``; never one that adds nothing."""
    last = torch.searchsorted(total, total[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(total, at[:, None], right=True), last)[:, 0]
