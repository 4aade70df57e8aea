"""Which texts go through a model together: so that little of the work is padding, and a call is worth what it costs.

Nothing of one library lives here. How rows are cut has no influence on answers, but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from headrace.models.torch_device import is_accelerator


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """most_tokens: with padding, that go through the model at once. call_tokens: what a call costs beside its tokens, as tokens
    that take as long: so much padding is worth avoiding a call.
    """

    most_tokens: int
    call_tokens: int


DEVICE = TokenCosts(16_384, 4096)  # 32 texts of 512 fill a large GPU with a model of BERT's size; a call is some ms of launches
CORE = TokenCosts(1024, 16)  # activations stay in the core's cache: MiniLM takes 20% longer with 16,384. A call: 5 ms of Python


def token_costs(device: str, threads: int, most_tokens: int | None = None) -> TokenCosts:
    """Of a model on this device, with so many threads if that is a CPU. most_tokens: as the user wants it."""
    if is_accelerator(device):
        found = DEVICE
    else:
        found = TokenCosts(CORE.most_tokens * max(1, threads), CORE.call_tokens * max(1, threads))
    return found if most_tokens is None else TokenCosts(most_tokens, found.call_tokens)


def cuts_by_length(lengths: Sequence[int], costs: TokenCosts) -> Iterator[np.ndarray]:
    """Places of rows, the longest first, in cuts of at most `most_tokens` tokens with padding (or a single row). A cut ends
    before its padding is more than a call costs.

    lengths: in tokens. Deterministic: rows of one length stay in order.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    cut: list[int] = []
    longest = padding = 0
    for row in order.tolist():
        padding += longest - lengths[row]
        if cut and (padding > costs.call_tokens or (len(cut) + 1) * longest > costs.most_tokens):
            yield np.array(cut)
            cut = []
        if not cut:
            longest, padding = lengths[row], 0
        cut.append(row)
    if cut:
        yield np.array(cut)
